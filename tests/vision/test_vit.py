"""Vision encoders on packed patches."""
import jax
import numpy as np
import pytest
from tiny_model import PATCH, TEACHER, VOCAB, apply, batch, quick_jit, random_params, strict  # noqa: F401

from vora_jax.data.packing import Budgets, Picture, Text, layout, stack
from vora_jax.types import VISION, UserError
from vora_jax.vision.patch_embed import CLIP_MEAN, CLIP_STD, PatchEmbed, PatchEmbedding
from vora_jax.vision.token_classifier import TokenClassifier
from vora_jax.vision.vit import VisionTransformer

BUDGETS = Budgets(slots=30, patches=24, images=4, patch_dim=PATCH.patch_size**2 * 3)
GRIDS = ((2, 3), (3, 4), (1, 1))


@pytest.fixture(scope='module')
def pictures():
    rng = np.random.default_rng(0)
    return [Picture(rng.integers(0, 256, (rows * cols, BUDGETS.patch_dim)).astype(np.uint8), rows, cols)
            for rows, cols in GRIDS]


def test_packed_pictures_give_the_features_of_single_ones(pictures):
    packed = stack([layout([pictures], BUDGETS)]).patches
    single = stack([layout([[picture]], BUDGETS) for picture in pictures]).patches
    encoder = VisionTransformer(TEACHER)
    params = random_params(encoder, packed)
    run = quick_jit(lambda params, patches: encoder.apply({'params': params}, patches))
    together, apart = run(params, packed), run(params, single)
    offset = 0
    for index, (rows, cols) in enumerate(GRIDS):
        here, size = slice(offset, offset + rows * cols), rows * cols
        np.testing.assert_allclose(together[0][0, here], apart[0][index, :size], atol=2e-6)
        np.testing.assert_allclose(together[1][:, 0, here], apart[1][:, index, :size], atol=2e-6)
        offset += size
    assert together[1].shape == (TEACHER.num_layers, 1, BUDGETS.patches, PATCH.width)


def test_bytes_are_normalised_and_floats_taken_as_they_are(pictures):
    patches = stack([layout([pictures], BUDGETS)]).patches
    module = PatchEmbedding(PATCH)
    params = random_params(module, patches)
    channels = patches.pixels.reshape(1, BUDGETS.patches, -1, 3) / 255
    normalised = ((channels - np.array(CLIP_MEAN)) / np.array(CLIP_STD)).reshape(patches.pixels.shape)
    floats = patches._replace(pixels=normalised.astype(np.float32))
    expected = module.apply({'params': params}, floats)
    np.testing.assert_allclose(module.apply({'params': params}, patches), expected, atol=2e-6)
    # From the definition, for the one patch of the 1 x 1 picture: the table's centre.
    place = sum(rows * cols for rows, cols in GRIDS[:-1])
    x = normalised[0, place] @ params['kernel'] + params['bias']
    x = x / np.sqrt((x**2).mean() + PATCH.norm_eps) * params['norm']['scale']
    centre = params['positions'][1, 1:3].mean(0)
    np.testing.assert_allclose(expected[0, place], x + centre, atol=2e-5)


def test_another_patch_size_is_refused(pictures):
    patches = stack([layout([pictures], BUDGETS)]).patches
    with pytest.raises(UserError, match='PatchEmbed.patch_size: 4 needs 48 values .* batch has 12'):
        PatchEmbedding(PatchEmbed(patch_size=4, width=8)).init(jax.random.key(0), patches)


def test_the_classifier_sees_the_last_picture_of_its_own_segment(pictures):
    first, second, third = pictures
    segments = [[Text([1]), first, Text([2]), second, Text([3, 4])], [Text([5, 6])], [third, Text([7])]]
    example = stack([layout(segments, BUDGETS._replace(slots=40))])
    model = TokenClassifier(TEACHER, VOCAB)
    params = random_params(model, example)

    @quick_jit
    def run(params, batch):
        features = VisionTransformer(TEACHER).apply({'params': params['encoder']}, batch.patches).output
        return model.apply({'params': params}, batch).hidden[0], features
    hidden, features = (np.asarray(x) for x in run(params, example))
    means = [np.asarray(features[0][example.patches.image_id[0] == image]).mean(0) for image in range(3)]
    zero = np.zeros_like(means[0])
    seen = {1: zero, 2: means[0], 3: means[1], 4: means[1], 5: zero, 6: zero, 7: means[2]}
    for token, expected in seen.items():
        slot, = np.flatnonzero(example.tokens[0] == token)
        np.testing.assert_allclose(hidden[slot], expected, atol=1e-6, err_msg=str(token))


def test_the_classifier_learns_only_from_pixels():
    example = batch()
    model = TokenClassifier(TEACHER, VOCAB)
    params = random_params(model, example)
    other = example._replace(tokens=np.where(example.modality == VISION, 0, (example.tokens + 5) % VOCAB))
    hidden = np.asarray(apply(model)(params, example).hidden)
    np.testing.assert_array_equal(apply(model)(params, other).hidden, hidden)
    assert (hidden != 0).any()
