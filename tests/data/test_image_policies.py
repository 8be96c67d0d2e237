"""Pictures to patches: grids, squares, tiles, the cache."""
import io
import pickle

import numpy as np
import PIL.Image
import pytest

from vora_jax.data.config import ImagePolicy
from vora_jax.data.frame import Frame
from vora_jax.data.images.decode import read_size
from vora_jax.data.images.patches import fit_grid, fit_grids, load_pictures, patchify
from vora_jax.data.images.picture_cache import PictureCache
from vora_jax.data.packing import Picture
from vora_jax.types import UserError

BICUBIC = PIL.Image.Resampling.BICUBIC
NEXT = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))


def random_pixels(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def saved(pixels, format='PNG'):
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, format)
    return file


def tiled(*tiles, side=28, **options):
    return ImagePolicy(kind='tiles', side=side, tiles=tiles, **options)


# Sizes of the smart resize with patches of 14, at least 16 and at most 4,000 of them.
@pytest.mark.parametrize('size, expected', [
    ((211, 422), (210, 420)), ((1080, 1920), (658, 1176)), ((30, 600), (28, 602)),
    ((2000, 3000), (714, 1078)), ((50, 50), (56, 56)), ((3000, 4000), (756, 1022))])
def test_fit_grid_matches_known_sizes(size, expected):
    rows, cols = fit_grid(*size, 14, ImagePolicy(max_patches=4000, min_patches=16))
    assert (rows * 14, cols * 14) == expected


def test_fit_grid_keeps_the_limits_and_exact_sizes():
    assert fit_grid(64, 64, 8, ImagePolicy(64)) == (8, 8)
    rng = np.random.default_rng(0)
    for _ in range(500):
        lowest = int(rng.integers(1, 20))
        policy = ImagePolicy(lowest + int(rng.integers(0, 30)), lowest)
        height, width = (int(2 ** rng.uniform(0, 12)) for _ in range(2))
        rows, cols = fit_grid(height, width, 8, policy)
        assert rows >= 1 and cols >= 1 and rows * cols <= policy.max_patches, (height, width, policy, rows, cols)


def test_patch_order_is_row_column_channel():
    pixels = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    patches = patchify(pixels, 2)
    floats = patchify(pixels.astype(np.float32), 2)
    assert floats.dtype == np.float32
    np.testing.assert_array_equal(floats, patches)
    assert patches.shape == (6, 12)
    for number in range(6):
        row, col = divmod(number, 3)
        np.testing.assert_array_equal(patches[number].reshape(2, 2, 3), pixels[2 * row:2 * row + 2, 2 * col:2 * col + 2])


def test_a_picture_of_the_right_size_keeps_every_pixel():
    pixels = random_pixels(16, 24)
    picture, = load_pictures(saved(pixels), 8, ImagePolicy(64))
    assert (picture.rows, picture.cols) == (2, 3) and picture.pixels.dtype == np.uint8
    np.testing.assert_array_equal(picture.pixels, patchify(pixels, 8))
    resized, = load_pictures(Frame('a', lambda: saved(pixels)), 8, ImagePolicy(2))
    assert resized.pixels.shape == (resized.rows * resized.cols, 192) and resized.rows * resized.cols <= 2


@pytest.mark.parametrize('size', [(50, 30), (30, 50), (40, 40), (28, 201)])
def test_square_policies(size):
    width, height = size
    pixels = random_pixels(height, width)
    crop = ImagePolicy(kind='square_crop', side=28)
    picture, = load_pictures(saved(pixels), 14, crop)
    assert fit_grids(height, width, 14, crop) == [(2, 2)] == [(picture.rows, picture.cols)]
    scaled = (int(28 * size[0] / min(size)), int(28 * size[1] / min(size)))
    left, top = (scaled[0] - 28) // 2, (scaled[1] - 28) // 2
    whole = PIL.Image.fromarray(pixels).resize(scaled, BICUBIC)
    np.testing.assert_array_equal(picture.pixels, patchify(np.asarray(whole)[top:top + 28, left:left + 28], 14))

    picture, = load_pictures(saved(pixels), 14, ImagePolicy(kind='square_pad', side=28, color=(1, 2, 3)))
    canvas = np.full((max(size), max(size), 3), (1, 2, 3), np.uint8)
    left, top = (max(size) - size[0]) // 2, (max(size) - size[1]) // 2
    canvas[top:top + height, left:left + width] = pixels
    whole = PIL.Image.fromarray(canvas).resize((28, 28), BICUBIC)
    np.testing.assert_array_equal(picture.pixels, patchify(np.asarray(whole), 14))

    picture, = load_pictures(saved(pixels), 14, ImagePolicy(kind='square_stretch', side=28))
    whole = PIL.Image.fromarray(pixels).resize((28, 28), BICUBIC)
    np.testing.assert_array_equal(picture.pixels, patchify(np.asarray(whole), 14))


@pytest.mark.parametrize('size, tiles', [
    ((30, 30), (2, 2)), ((28, 56), (1, 2)), ((57, 28), (3, 1)), ((20, 90), (1, 3)), ((500, 500), (2, 2)), ((9, 9), (1, 2))])
def test_tiles_show_the_picture_whole_and_cut(size, tiles):
    pixels, policy = random_pixels(*size), tiled(*NEXT, color=(9, 8, 7))
    rows, cols = tiles
    whole, *pieces = load_pictures(saved(pixels), 14, policy)
    assert fit_grids(*size, 14, policy) == [(2, 2)] * (1 + rows * cols) == [(p.rows, p.cols) for p in (whole, *pieces)]
    image = PIL.Image.fromarray(pixels)
    np.testing.assert_array_equal(whole.pixels, patchify(np.asarray(image.resize((28, 28), BICUBIC)), 14))
    canvas = np.concatenate([np.concatenate([unpatchify(pieces[row * cols + col]) for col in range(cols)], 1)
                             for row in range(rows)])
    scale = min(rows * 28 / size[0], cols * 28 / size[1])
    height, width = (min(int(np.ceil(side * scale)), 28 * room) for side, room in zip(size, tiles))
    top, left = (28 * rows - height) // 2, (28 * cols - width) // 2
    np.testing.assert_array_equal(canvas[top:top + height, left:left + width],
                                  np.asarray(image.resize((width, height), BICUBIC)))
    around = np.ones(canvas.shape[:2], bool)
    around[top:top + height, left:left + width] = False
    assert (canvas[around] == (9, 8, 7)).all()


def unpatchify(picture):
    return picture.pixels.reshape(2, 2, 14, 14, 3).transpose(0, 2, 1, 3, 4).reshape(28, 28, 3)


@pytest.mark.parametrize('size', [(1, 1), (1, 20000), (20000, 1), (3, 5000)])
def test_extreme_shapes_stay_small(size):
    file = saved(np.full((*size, 3), 77, np.uint8))
    for policy in (ImagePolicy(64), *(ImagePolicy(kind=f'square_{kind}', side=56) for kind in ('pad', 'crop', 'stretch')),
                   tiled(*NEXT, side=56)):
        pictures = load_pictures(file, 14, policy)
        assert [(p.rows, p.cols) for p in pictures] == fit_grids(*read_size(file), 14, policy)
        assert policy.kind != 'square_crop' or (pictures[0].pixels == 77).all()
        assert all(p.pixels.max() == 77 for p in pictures[:1]) or policy.kind == 'square_pad'


def test_a_square_must_be_whole_patches_within_the_limit():
    with pytest.raises(UserError, match='ImagePolicy.side: 30 pixels are no whole patches of 14 pixels'):
        fit_grids(30, 30, 14, ImagePolicy(kind='square_pad', side=30))
    with pytest.raises(UserError, match='more than 3 of them'):
        fit_grids(30, 30, 14, ImagePolicy(kind='square_pad', side=28, max_patches=3))
    fit_grids(30, 30, 14, tiled((1, 2), (2, 2), max_patches=20))
    with pytest.raises(UserError, match='5 squares of 28 pixels are no whole .* more than 19 of them'):
        fit_grids(30, 30, 14, tiled((1, 2), (2, 2), max_patches=19))


def test_policies_that_make_no_sense_are_told():
    for options, message in (({'kind': 'square_crop'}, 'do not fit; give square pictures a side'),
                             ({'side': 28}, 'do not fit; give square pictures a side'),
                             ({'kind': 'tiles', 'side': 28}, "give the kind 'tiles'"),
                             ({'tiles': ((1, 2),)}, "give the kind 'tiles'"),
                             ({'kind': 'tiles', 'side': 28, 'tiles': ((1, 0),)}, 'pairs .rows, columns. of 1 or more'),
                             ({'color': (1, 2)}, 'ImagePolicy.color is .1, 2.; it must be three values'),
                             ({'background': (1, 2, 256)}, 'ImagePolicy.background is'),
                             ({'min_patches': 9, 'max_patches': 8}, 'in this order')):
        with pytest.raises(UserError, match=message):
            ImagePolicy(**options)


def test_the_background_of_a_policy_is_seen():
    file = io.BytesIO()
    PIL.Image.new('RGBA', (14, 14), (0, 0, 0, 0)).save(file, 'PNG')
    picture, = load_pictures(file, 14, ImagePolicy(background=(1, 2, 3)))
    assert (picture.pixels.reshape(-1, 3) == (1, 2, 3)).all()


def test_cache_forgets_the_oldest_and_is_pickled_empty():
    loads = []

    def load(key):
        half = Picture(np.zeros((1, 20), np.uint8), 1, 1)
        return lambda: loads.append(key) or [half, half]

    cache = PictureCache(100)
    for key in 'abacab':
        assert len(cache.get(key, load(key))) == 2
    assert loads == ['a', 'b', 'c', 'b']
    copy = pickle.loads(pickle.dumps(cache))
    copy.get('a', load('d'))
    assert loads[-1] == 'd'
