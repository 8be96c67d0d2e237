"""Exports of models that see tiles, or another background."""
import dataclasses
import json

import numpy as np
import PIL.Image
import pytest
from tiny_models import PATCH

from vora_jax.data.config import ImagePolicy
from vora_jax.data.images.patches import load_pictures

torch = pytest.importorskip('torch', reason="needs pip install 'vora_jax[torch]'")
pytest.importorskip('transformers', reason="needs pip install 'vora_jax[torch]'")

NEXT = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
TILES = ImagePolicy(60, kind='tiles', side=2 * PATCH, tiles=NEXT, color=(9, 99, 200), background=(250, 120, 0))
# Height and width of strips, squares, and of what is as large as a tile, or smaller.
SIZES = [(9, 30), (40, 21), (16, 16), (8, 8), (4, 3), (8, 16), (1, 50), (300, 2), (31, 29)]

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
