"""Exports of models that see tiles, or another background."""
import dataclasses
import json

import numpy as np
import PIL.Image
import pytest
import tiny_layouts
from tiny_models import PATCH, make_any, make_tokenizer, prompting

from vora_jax.cli.imported_data import imported_data
from vora_jax.convert.export.to_hf import export
from vora_jax.convert.families.recognise import recognise
from vora_jax.convert.verify.comparison import Question, load_folder, verify
from vora_jax.data.config import Data, ImagePolicy, Source
from vora_jax.data.images.patches import fit_grids, load_pictures
from vora_jax.data.text.tokenizer import load_tokenizer
from vora_jax.evaluation.prompts import Prompt, PromptRows
from vora_jax.method import VisionTokenRule
from vora_jax.types import UserError

torch = pytest.importorskip('torch', reason="needs pip install 'vora_jax[torch]'")
pytest.importorskip('transformers', reason="needs pip install 'vora_jax[torch]'")

EOS = 3
NEXT = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
TILES = ImagePolicy(60, kind='tiles', side=2 * PATCH, tiles=NEXT, color=(9, 99, 200), background=(250, 120, 0))
# Height and width of strips, squares, and of what is as large as a tile, or smaller.
SIZES = [(9, 30), (40, 21), (16, 16), (8, 8), (4, 3), (8, 16), (1, 50), (300, 2), (31, 29)]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('tiles')
    make_tokenizer(folder)
    rng = np.random.default_rng(5)
    for number, (height, width) in enumerate(SIZES):
        PIL.Image.fromarray(rng.integers(0, 256, (height, width, 4), np.uint8)).save(folder / f'{number}.png')
    return folder


@pytest.fixture(scope='module')
def written(folder):
    """kind of a model -> its export with TILES, each made once."""
    made = set()

    def get(kind):
        if kind not in made:
            params, model, rule = make_any(kind)
            export(params, model, told(folder), str(folder / kind), rule=rule)
            made.add(kind)
        return folder / kind

    return get


def told(folder, policy=TILES):
    return prompting(str(folder / 'tokenizer'), min_patches=policy.min_patches, max_patches=policy.max_patches,
                     image_kind=policy.kind, side=policy.side, color=policy.color, background=policy.background,
                     tiles=policy.tiles)


def questions(folder):
    """A prompt without pictures, with one of each shape, and with two, side by side or apart."""
    files = [str(folder / f'{number}.png') for number in range(len(SIZES))]
    return [Question('is it red?'), *(Question('what is this?', (file,)) for file in files[:5]),
            Question('<image> and <image>same?', (files[5], files[1])),
            Question('<image><image>\nwhat', (files[0], files[6]))]


def batches_of(folder, asked, rule, rows):
    data = Data((Source('none'),), str(folder / 'tokenizer'), max_patches=200, image=TILES)
    prompts = [Prompt(question.text, question.images) for question in asked]
    return PromptRows(prompts, data, rule, load_tokenizer(data.tokenizer)).batches(rows)


@pytest.mark.parametrize('kind', ['pooled_tokens', *(
    pytest.param(kind, marks=pytest.mark.slow) for kind in ('all', 'clip', 'routed'))])
def test_verify_finds_nothing(kind, folder, written):
    """Ids, pixels, logits and answers; squares that see themselves only, and whose tokens are pooled, or tapped thrice."""
    params, model, rule = make_any(kind)
    asked = questions(folder)
    found = verify(params, model, str(written(kind)), asked, batches_of(folder, asked, rule, 4), eos_id=EOS, rule=rule,
                   prompting=told(folder), max_new_tokens=3, tolerance=1e-4)
    assert found.problems == [] and found.left_out == []
    assert found.num_prompts == found.same_answers + found.near_ties == len(asked)
    assert 0 < found.max_abs_logit_diff < 1e-4  # measured 4e-6 at logits up to 4


def test_each_square_has_a_grid_and_slots_of_its_own(folder, written):
    torch_model, tokenizer = load_folder(str(written('all')))
    wide, small = (PIL.Image.open(folder / f'{number}.png') for number in (0, 4))  # of three and two tiles
    inputs = torch_model.prepare_inputs(tokenizer, ['<image>a<image>?', 'what?'], [[wide, small], wide])
    assert inputs['image_grid'].tolist() == [[[2, 2]] * 7, [[2, 2]] * 4 + [[0, 0]] * 3]
    assert inputs['pixel_values'].shape == (2, 28, 3 * PATCH**2)
    is_picture = (inputs['input_ids'] == torch_model.config.image_token_id).numpy()
    runs = np.flatnonzero(np.diff(is_picture[0].astype(int), prepend=0, append=0)).reshape(-1, 2)
    assert np.diff(runs).ravel().tolist() == [16, 12] and is_picture[1].sum() == 16
    assert torch_model.answer(tokenizer, [wide, small], '<image>a<image>?', max_new_tokens=2) is not None


def test_the_folder_tells_the_policy(folder, written):
    policy = json.loads((written('all') / 'config.json').read_text())['image_policy']
    assert policy == json.loads(json.dumps({name: value for name, value in dataclasses.asdict(TILES).items()
                                            if name != 'decoder'}))


POLICIES = [TILES, ImagePolicy(24, background=(0, 0, 0)), ImagePolicy(kind='square_pad', side=12, background=(1, 2, 250)),
            ImagePolicy(kind='square_crop', side=12), ImagePolicy(kind='square_stretch', side=12, background=(90, 0, 0)),
            ImagePolicy(kind='tiles', side=12, tiles=((1, 1), (4, 2), (2, 4))),
            ImagePolicy(kind='tiles', side=4, tiles=((1, 7), (5, 1)), background=(0, 255, 0))]


@pytest.mark.parametrize('policy', POLICIES)
def test_pixels_are_those_of_training(policy, tmp_path):
    """Byte for byte, of pictures of any shape, transparent or not, turned or not."""
    from vora_jax.convert.torch_model.processing_vora_jax import to_patches, to_squares
    rng, settings = np.random.default_rng(), json.loads(json.dumps(dataclasses.asdict(policy)))
    sizes = SIZES + rng.integers(1, 70, (12, 2)).tolist()
    for number, (height, width) in enumerate(sizes):
        shape = (height, width, int(rng.integers(2, 5))) if number % 4 else (height, width)
        picture = PIL.Image.fromarray(rng.integers(0, 256, shape, np.uint8))
        exif = PIL.Image.Exif()
        exif[0x0112] = int(rng.integers(1, 9))
        file = str(tmp_path / f'{number}.png')
        picture.save(file, exif=exif)
        ours = load_pictures(file, PATCH, policy)
        theirs = [to_patches(square, PATCH, settings) for square in to_squares(PIL.Image.open(file), settings)]
        assert [grid for _, grid in theirs] == [(square.rows, square.cols) for square in ours], (height, width)
        for square, (patches, _) in zip(ours, theirs):
            np.testing.assert_array_equal(patches.numpy(), square.pixels, str((height, width)))


def test_a_strip_whose_square_would_be_too_large(tmp_path):
    from vora_jax.convert.torch_model.processing_vora_jax import to_patches
    pixels = np.random.default_rng(1).integers(0, 256, (3, 12000, 3), np.uint8)
    PIL.Image.fromarray(pixels).save(tmp_path / 'strip.png')
    for kind in ('square_pad', 'square_crop'):
        policy = ImagePolicy(kind=kind, side=12)
        ours, = load_pictures(str(tmp_path / 'strip.png'), PATCH, policy)
        patches, _ = to_patches(PIL.Image.fromarray(pixels), PATCH, dataclasses.asdict(policy))
        np.testing.assert_array_equal(patches.numpy(), ours.pixels)


def test_tiles_are_chosen_as_in_training():
    from vora_jax.convert.torch_model.processing_vora_jax import fit_tiles
    from vora_jax.data.images import squares
    rng = np.random.default_rng()
    for _ in range(3000):
        height, width, side = (int(x) for x in rng.integers(1, (900, 900, 400)))
        tiles = rng.integers(1, 6, (int(rng.integers(1, 7)), 2)).tolist()
        size = height, width, side
        assert tuple(fit_tiles(*size, tiles)) == tuple(squares.fit_tiles(*size, [*map(tuple, tiles)])), (size, tiles)


@pytest.mark.parametrize(('layout', 'name'), [('llava', 'clip'), ('vora', 'adapted')])
@pytest.mark.parametrize(('policy', 'message'), [
    (TILES, 'this model sees a picture as several tiles, and .* makes one square of it; take the layout `own`.$'),
    (ImagePolicy(background=(0, 0, 9)), r'transparent pixels over the colour \(0, 0, 9\), and .* take the layout `own`.$')],
    ids=['tiles', 'background'])
def test_what_a_stock_processor_cannot_do_is_refused(layout, name, policy, message, folder, tmp_path):
    params, model, rule = tiny_layouts.make(name)
    with pytest.raises(UserError, match=message):
        export(params, model, told(folder, policy), str(tmp_path / 'no'), rule=rule, layout=layout)
    assert not list(tmp_path.iterdir())


def test_imported_again_the_policy_is_the_same(folder, written):
    config = json.loads((written('clip') / 'config.json').read_text())
    data = imported_data(recognise(config, {}).hints, VisionTokenRule(PATCH, cls=True), str(folder / 'tokenizer'), 'chatml')
    assert dataclasses.replace(data.image_policy, max_patches=60) == TILES
    assert data.max_patches == 5 * (4 + 1) and data.max_images >= 5  # the largest room has four tiles
    fit_grids(50, 50, PATCH, data.image_policy)
