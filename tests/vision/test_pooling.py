"""Pooled vision tokens against plain loops."""
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_methods import ENCODER, PROJECTOR
from tiny_model import LLM, PATCH, VOCAB, apply, gradients, random_params, strict  # noqa: F401

from vora_jax import variants
from vora_jax.data.fake import fake_batch, random_segments
from vora_jax.data.packing import Budgets, Picture, Text, layout, stack
from vora_jax.method import VisionTokenRule
from vora_jax.params import flatten, unflatten
from vora_jax.types import UserError
from vora_jax.vision.encoder_frontend import EncoderFrontend
from vora_jax.vision.pooling import window_means
from vora_jax.vision.vit import VisionTransformer

BUDGETS = Budgets(slots=40, patches=49, images=4, patch_dim=12)


def picture(rows, cols):
    return Picture(np.zeros((rows * cols, 12), np.uint8), rows, cols)


def windows(rows, cols, side):
    """The patches (numbers in the image) of each window, in reading order of the windows."""
    return [[row * cols + col for row in range(top, min(top + side, rows)) for col in range(left, min(left + side, cols))]
            for top in range(0, rows, side) for left in range(0, cols, side)]


def random_patches(rng, cls, rows=3):
    """`Patches` of random grids, many of them odd."""
    def row():
        images = []
        while len(images) < BUDGETS.images:
            grid = rng.integers(1, 6, 2)
            room = BUDGETS.patches - sum(a * b + cls for a, b in images)
            if math.prod(grid) + cls > room:
                break
            images.append(grid.tolist())
        return layout([[picture(*grid) for grid in images]], BUDGETS._replace(slots=60), rule=VisionTokenRule(2, cls))
    return stack([row() for _ in range(rows)]).patches


@pytest.mark.parametrize('cls', [False, True])
@pytest.mark.parametrize('side', [2, 3, 7])
def test_means_and_their_gradients_equal_a_loop(side, cls):
    rng = np.random.default_rng(side)
    patches = random_patches(rng, cls)
    x, cotangent = rng.normal(size=(2, 3, BUDGETS.patches, 5)).astype(np.float32)
    expected, gradient, corner = np.zeros_like(x), np.zeros_like(x), np.zeros(x.shape[:2], bool)
    for row in range(3):
        for image, (rows, cols) in enumerate(patches.grid[row]):
            if not rows:
                continue
            first = np.flatnonzero(patches.image_id[row] == image)[0] + cls
            for window in windows(rows, cols, side):
                places = first + np.array(window)
                corner[row, places[0]] = True
                expected[row, places[0]] = x[row, places].mean(0)
                gradient[row, places] += cotangent[row, places[0]] / len(places)
    assert corner.sum() >= 6 and not (patches.grid % side == 0).all()

    pooled, pull = jax.vjp(lambda x: window_means(x, patches, side), x)
    np.testing.assert_allclose(np.where(corner[..., None], pooled, 0), expected, atol=1e-6)  # measured 1.2e-7
    np.testing.assert_allclose(pull(jnp.where(corner[..., None], cotangent, 0))[0], gradient, atol=1e-6)


def test_the_worked_example():
    patches = stack([layout([[picture(2, 3)]], Budgets(6, 6, 1, 12))]).patches
    a, b, c, d, e, f = values = np.arange(1.0, 7.0, dtype=np.float32) ** 2
    pooled = window_means(jnp.asarray(values)[None, :, None], patches, 2)[0, :, 0]
    np.testing.assert_allclose(pooled, [(a+b+d+e)/4, (b+c+e+f)/4, (c+f)/2, (d+e)/2, (e+f)/2, f], rtol=1e-6)


def test_pooling_takes_no_scatter_and_keeps_the_dtype():
    patches = random_patches(np.random.default_rng(0), True)
    x = jnp.ones((3, BUDGETS.patches, 4), jnp.bfloat16)
    assert window_means(x, patches, 2).dtype == jnp.bfloat16
    back = jax.jit(jax.grad(lambda x: window_means(x, patches, 2).astype(jnp.float32).sum()))
    assert 'scatter' not in back.lower(x).as_text()


@pytest.mark.parametrize('rule', [VisionTokenRule(2, pool=2), VisionTokenRule(2, True, pool=3), VisionTokenRule(
    2, True, False, pool=2, tokens_per_place=2)])
def test_rows_equal_a_plain_loop(rule):
    rng = np.random.default_rng(5)
    pictures, odd = 0, 0
    for _ in range(200):
        segments = random_segments(rng, BUDGETS, 50, rule)
        row = layout(segments, BUDGETS, rule=rule)
        slots, slot, place, expected = [], 0, 0, []
        for segment in segments:
            for part in segment:
                if isinstance(part, Text):
                    slot += len(part.ids)
                    continue
                first = place + rule.cls
                for kind in range(rule.tokens_per_place):
                    for window in windows(part.rows, part.cols, rule.pool):
                        expected.append((first + window[0]) * rule.tokens_per_place + kind)
                        slots.append(slot)
                        slot += 1
                place = first + part.rows * part.cols
                pictures, odd = pictures + 1, odd + bool(part.rows % rule.pool or part.cols % rule.pool)
        assert row.vision_slot[row.vision_slot >= 0].tolist() == slots
        assert row.vision_source[:len(slots)].tolist() == expected
        assert len(row.vision_slot) == rule.max_tokens(BUDGETS.patches, BUDGETS.images)
        np.testing.assert_array_equal(np.flatnonzero(row.modality == 2), slots)
        inside = row.key_stop[row.vision_slot[row.vision_slot >= 0]]
        assert (inside > np.array(slots, int)).all() and (row.key_stop <= BUDGETS.slots).all()
    assert pictures > 100 and odd > 50


@pytest.mark.parametrize('pool', [1, 2, 3, 5])
def test_the_budget_is_the_most_that_any_grids_need(pool):
    rule = VisionTokenRule(2, pool=pool)
    most = {0: {0: 0}}  # {images: {patches: most tokens of so many images that hold exactly so many patches}}
    for images in range(1, 4):
        most[images] = {}
        for held, tokens in most[images - 1].items():
            for rows in range(1, 16):
                for cols in range(1, 16):
                    if (now := held + rows * cols) <= 15:
                        most[images][now] = max(most[images].get(now, 0), tokens + rule.num_tokens(rows, cols))
    for patches in range(16):
        for images in range(1, 4):
            needed = max(tokens for n in range(images + 1) for held, tokens in most[n].items() if held <= patches)
            assert rule.max_tokens(patches, images) == needed


def pooled_llava(pool):
    method = variants.llava(LLM, ENCODER, PROJECTOR, pool=pool)
    return method.stage('finetune').model, method.vision_tokens


def test_a_model_pools_before_it_projects():
    model, rule = pooled_llava(2)
    example = fake_batch(3, 40, 27, PATCH.patch_size, VOCAB, 4, 1, rule=rule)
    assert (example.vision_slot >= 0).sum() < (example.patches.row >= 0).sum()
    params = random_params(model, example)
    unpooled = EncoderFrontend(model.vision.encoder, model.vision.taps, model.vision.projector)

    def outputs(frontend, patches):
        module = frontend.module(LLM.width, model.attend, jnp.float32)
        return module.apply({'params': params['frontend']}, patches)

    encoder = {'params': params['frontend']['encoder']}
    features = VisionTransformer(model.vision.encoder, model.attend).apply(encoder, example.patches).blocks[-2]
    pooled = np.array(outputs(model.vision, example.patches))
    projector = params['frontend']
    for row in range(3):
        real = example.vision_slot[row] >= 0
        sources, seen = example.vision_source[row][real], 0
        for image, (rows, cols) in enumerate(example.patches.grid[row]):
            first = int(np.argmax(example.patches.image_id[row] == image)) + 1
            for window in windows(rows, cols, 2):
                mean = np.asarray(features)[row, first + np.array(window)].mean(0)
                inner = mean @ projector['projector_0']['kernel'] + projector['projector_0']['bias']
                inner = np.asarray(nn.gelu(jnp.asarray(inner), approximate=False))
                vector = inner @ projector['projector_1']['kernel'] + projector['projector_1']['bias']
                np.testing.assert_allclose(pooled[row, sources[seen]], vector, atol=5e-6)  # measured 5e-7, of values up to 4
                seen += 1
        assert seen == real.sum()
    x = model.apply({'params': params}, example, method='embed')
    for row, (slots, sources) in enumerate(zip(example.vision_slot, example.vision_source)):
        real = slots >= 0
        np.testing.assert_allclose(x[row, slots[real]], pooled[row, sources[real]], atol=1e-6)
    assert np.abs(outputs(unpooled, example.patches) - pooled).max() > 0.1


def test_a_pooled_model_has_gradients_in_every_part():
    model, rule = pooled_llava(2)
    example = fake_batch(3, 40, 27, PATCH.patch_size, VOCAB, 4, 2, rule=rule)
    params = random_params(model, example)
    one, none = np.float32(1), np.float32(0)
    loss, grads = gradients(model)(params, example, one, none)
    assert np.isfinite(loss)
    flat = flatten(grads)
    for part in ('frontend/encoder/patch_embed/kernel', 'frontend/projector_0/kernel', 'decoder/embedding'):
        assert np.abs(flat[part]).max() > 0, part

    path, rng = 'frontend/projector_0/kernel', np.random.default_rng(0)
    step = rng.normal(size=params['frontend']['projector_0']['kernel'].shape).astype(np.float32)

    def moved(by):
        return unflatten(flatten(params) | {path: flatten(params)[path] + np.float32(by) * step})

    numeric = [gradients(model)(moved(by), example, one, none)[0] for by in (1e-3, -1e-3)]
    slope = float(numeric[0] - numeric[1]) / 2e-3
    np.testing.assert_allclose(slope, float((flat[path] * step).sum()), rtol=2e-2)  # measured 6e-3


def test_a_side_of_one_is_the_model_without_pooling():
    method = variants.llava(LLM, ENCODER, PROJECTOR)
    assert pooled_llava(1) == (method.stage('finetune').model, method.vision_tokens)


def test_a_picture_in_one_window_is_one_token():
    model, rule = pooled_llava(7)
    example = stack([layout([[Text([3, 4]), Picture(np.arange(72, dtype=np.uint8).reshape(6, 12), 2, 3), Text([5])]],
                            Budgets(8, 8, 2, 12), rule=rule)])
    assert example.vision_slot.tolist() == [[2, -1]] and rule.num_tokens(2, 3) == 1
    assert np.isfinite(apply(model)(random_params(model, example), example).hidden).all()


@pytest.mark.parametrize('options', [{'pool': 0}, {'pool': 2, 'select': 'cls'}], ids=str)
def test_what_cannot_be_pooled_is_told(options):
    with pytest.raises(UserError, match='^pool = '):
        EncoderFrontend(ENCODER, (-1,), PROJECTOR, **options)
