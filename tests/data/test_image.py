"""Decoding, resizing, patches."""

import io
import pickle

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest

from vora_jax.data.config import ImagePolicy
from vora_jax.data.images.decode import decode, read_size
from vora_jax.data.images.patches import fit_grid, load_picture, patchify
from vora_jax.data.images.picture_cache import PictureCache
from vora_jax.data.packing import Picture
from vora_jax.types import UserError


def saved(image, **options):
    file = io.BytesIO()
    image.save(file, **{'format': 'PNG'} | options)
    return io.BytesIO(file.getvalue())


# Sizes of the smart resize with patches of 14, at least 16 and at most 4,000 of them.
@pytest.mark.parametrize(
    'size, expected',
    [
        ((211, 422), (210, 420)),
        ((1080, 1920), (658, 1176)),
        ((30, 600), (28, 602)),
        ((2000, 3000), (714, 1078)),
        ((50, 50), (56, 56)),
        ((3000, 4000), (756, 1022)),
    ],
)
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
        assert rows >= 1 and cols >= 1 and rows * cols <= policy.max_patches, (
            height,
            width,
            policy,
            rows,
            cols,
        )


def test_patch_order_is_row_column_channel():
    pixels = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    patches = patchify(pixels, 2)
    assert patches.shape == (6, 12)
    for number in range(6):
        row, col = divmod(number, 3)
        np.testing.assert_array_equal(
            patches[number].reshape(2, 2, 3), pixels[2 * row : 2 * row + 2, 2 * col : 2 * col + 2]
        )


def test_a_picture_of_the_right_size_keeps_every_pixel():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3)).astype(np.uint8)
    picture = load_picture(saved(PIL.Image.fromarray(pixels)), 8, ImagePolicy(64))
    assert (picture.rows, picture.cols) == (2, 3) and picture.pixels.dtype == np.uint8
    np.testing.assert_array_equal(picture.pixels, patchify(pixels, 8))
    resized = load_picture(saved(PIL.Image.fromarray(pixels)), 8, ImagePolicy(2))
    assert resized.pixels.shape == (resized.rows * resized.cols, 192) and resized.rows * resized.cols <= 2


@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('format', ['JPEG', 'PNG'])
def test_exif_orientation_as_pillow_does_it(orientation, format):
    image = PIL.Image.fromarray(
        np.kron(np.arange(0, 240, 40, np.uint8).reshape(2, 3), np.ones((8, 8), np.uint8))
    )
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    file = saved(image.convert('RGB'), format=format, exif=exif)
    expected = PIL.ImageOps.exif_transpose(PIL.Image.open(file))
    np.testing.assert_array_equal(np.asarray(decode(file)), np.asarray(expected))
    assert read_size(file) == (expected.height, expected.width)


def test_modes_become_rgb_over_white():
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, 0], rgba[0, :, 3] = 200, [0, 255, 128]
    result = np.asarray(decode(saved(PIL.Image.fromarray(rgba))))[0].tolist()
    assert result[0] == [255, 255, 255] and result[1] == [200, 0, 0]
    assert abs(result[2][0] - 227) <= 1 and abs(result[2][1] - 127) <= 1
    palette = PIL.Image.new('P', (1, 1), 0)
    palette.putpalette([10, 20, 30])
    assert np.asarray(decode(saved(palette))).tolist() == [[[10, 20, 30]]]
    assert np.asarray(decode(saved(palette, transparency=0))).tolist() == [[[255, 255, 255]]]
    grey16 = PIL.Image.fromarray(np.array([[0, 257 * 100, 65535]], np.uint16))
    assert np.asarray(decode(saved(grey16)))[0, :, 0].tolist() == [0, 100, 255]
    assert np.asarray(decode(saved(PIL.Image.new('L', (1, 1), 7)))).tolist() == [[[7, 7, 7]]]


def test_unreadable_files_give_one_sentence(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    whole = saved(PIL.Image.fromarray(noise)).getvalue()
    cases = {
        'cut.png': (whole[:-200], 'truncated'),
        'half.png': (whole[: len(whole) // 2], 'truncated'),
        'end.png': (whole[:-5], 'broken PNG'),
        'empty.png': (b'', 'no known image'),
        'text.png': (b'hi', 'no known image'),
    }
    for name, (content, reason) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f'(?i){name} cannot be read .*{reason}'):
            decode(str(tmp_path / name))
    with pytest.raises(UserError, match='none.png does not exist'):
        decode(str(tmp_path / 'none.png'))
    with pytest.raises(UserError, match='does not exist'):
        read_size(str(tmp_path / 'none.png'))
    with pytest.raises(UserError, match='cannot be read'):
        decode(str(tmp_path))
    with pytest.raises(UserError, match='cannot be read'):
        decode('a\0b')
    assert read_size(str(tmp_path / 'cut.png')) == (64, 64)


def test_cache_forgets_the_oldest_and_is_pickled_empty():
    loads = []

    def load(key):
        return lambda: loads.append(key) or Picture(np.zeros((1, 40), np.uint8), 1, 1)

    cache = PictureCache(100)
    for key in 'abacab':
        cache.get(key, load(key))
    assert loads == ['a', 'b', 'c', 'b']
    copy = pickle.loads(pickle.dumps(cache))
    copy.get('a', load('d'))
    assert loads[-1] == 'd'


@pytest.mark.parametrize('size', [(50, 30), (30, 50), (40, 40), (28, 201)])
def test_square_policies(size):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, 'PNG')
    crop = ImagePolicy(kind='square_crop', side=28)
    picture = load_picture(file, 14, crop)
    assert fit_grid(size[1], size[0], 14, crop) == (2, 2) == (picture.rows, picture.cols)
    scaled = (int(28 * size[0] / min(size)), int(28 * size[1] / min(size)))
    left, top = (scaled[0] - 28) // 2, (scaled[1] - 28) // 2
    whole = PIL.Image.fromarray(pixels).resize(scaled, PIL.Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(picture.pixels, patchify(np.asarray(whole)[top:top + 28, left:left + 28], 14))

    file.seek(0)
    picture = load_picture(file, 14, ImagePolicy(kind='square_pad', side=28, color=(1, 2, 3)))
    canvas = np.full((max(size), max(size), 3), (1, 2, 3), np.uint8)
    left, top = (max(size) - size[0]) // 2, (max(size) - size[1]) // 2
    canvas[top:top + size[1], left:left + size[0]] = pixels
    whole = PIL.Image.fromarray(canvas).resize((28, 28), PIL.Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(picture.pixels, patchify(np.asarray(whole), 14))

    file.seek(0)
    picture = load_picture(file, 14, ImagePolicy(kind='square_stretch', side=28))
    whole = PIL.Image.fromarray(pixels).resize((28, 28), PIL.Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(picture.pixels, patchify(np.asarray(whole), 14))


def test_a_square_must_be_whole_patches_within_the_limit():
    with pytest.raises(UserError, match='no whole patches of 14 pixels'):
        fit_grid(30, 30, 14, ImagePolicy(kind='square_pad', side=30))
    with pytest.raises(UserError, match='more than 3 of them'):
        fit_grid(30, 30, 14, ImagePolicy(kind='square_pad', side=28, max_patches=3))
    with pytest.raises(UserError, match='do not fit; give square pictures a side'):
        ImagePolicy(kind='square_crop')
