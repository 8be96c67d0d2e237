"""Damaged pictures of every format: each is read, or refused with one sentence."""
import io
import struct
import time
import zlib

import numpy as np
import PIL.features
import PIL.Image
import pytest

from vora_jax.data.config import ImagePolicy
from vora_jax.data.images.decode import decode, read_size
from vora_jax.data.images.patches import fit_grids, load_pictures
from vora_jax.types import UserError

MOST_SECONDS = 2  # of one picture, once
POLICIES = (ImagePolicy(64), ImagePolicy(kind='square_pad', side=28), ImagePolicy(kind='square_crop', side=28),
            ImagePolicy(kind='tiles', side=28, tiles=((1, 2), (2, 1), (2, 2))))
KINDS = {  # name: mode, format, options of saving
    'jpeg': ('RGB', 'JPEG', {'quality': 90}), 'progressive': ('RGB', 'JPEG', {'progressive': True}),
    'grey jpeg': ('L', 'JPEG', {}), 'cmyk jpeg': ('CMYK', 'JPEG', {}), 'exif jpeg': ('RGB', 'JPEG', {'exif': 6}),
    'png': ('RGB', 'PNG', {}), 'alpha png': ('RGBA', 'PNG', {}), 'palette png': ('P', 'PNG', {'transparency': 3}),
    'grey alpha png': ('LA', 'PNG', {}), 'bits png': ('1', 'PNG', {}), 'deep png': ('I;16', 'PNG', {}),
    'exif png': ('RGB', 'PNG', {'exif': 8}), 'animated png': ('RGB', 'PNG', {'save_all': True}),
    'gif': ('P', 'GIF', {}), 'animated gif': ('RGB', 'GIF', {'save_all': True}),
    'webp': ('RGB', 'WEBP', {}), 'lossless webp': ('RGBA', 'WEBP', {'lossless': True}),
    'exif webp': ('RGB', 'WEBP', {'exif': 5}), 'animated webp': ('RGB', 'WEBP', {'save_all': True}),
    'bmp': ('RGB', 'BMP', {}), 'palette bmp': ('P', 'BMP', {}), 'ppm': ('RGB', 'PPM', {}), 'bits ppm': ('1', 'PPM', {}),
    'tiff': ('RGB', 'TIFF', {}), 'exif tiff': ('RGB', 'TIFF', {'exif': 7}), 'float tiff': ('F', 'TIFF', {}),
    'packed tiff': ('RGB', 'TIFF', {'compression': 'tiff_lzw'}),
    'zipped tiff': ('RGBA', 'TIFF', {'compression': 'tiff_adobe_deflate'}),
    'jpeg tiff': ('YCbCr', 'TIFF', {'compression': 'jpeg'}), 'fax tiff': ('1', 'TIFF', {'compression': 'group4'}),
    'jpeg2000': ('RGB', 'JPEG2000', {}), 'several jpegs': ('RGB', 'MPO', {'save_all': True}),
    **({'avif': ('RGB', 'AVIF', {})} if PIL.features.check('avif') else {}),
}
pytestmark = pytest.mark.filterwarnings('ignore:::PIL')


def encoded(kind, size, rng):
    """A picture of smooth noise as bytes."""
    mode, format, options = KINDS[kind]
    coarse = rng.integers(0, 256, (4, 4, 4), np.uint8)
    image = PIL.Image.fromarray(coarse).resize(size[::-1], PIL.Image.Resampling.BICUBIC)
    if mode in ('F', 'I;16'):
        image = PIL.Image.fromarray(np.asarray(image.convert('L')).astype({'F': np.float32, 'I;16': np.uint16}[mode]) * 200)
    else:
        image = image.convert(mode)
    options = dict(options)
    if 'exif' in options:
        exif = PIL.Image.Exif()
        exif[0x0112] = options['exif']
        options['exif'] = exif
    if options.get('save_all'):
        options['append_images'] = [image.transpose(PIL.Image.Transpose.ROTATE_180)]
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def cut(content, rng):
    return content[:int(rng.integers(0, len(content)))]


def zeroed(content, rng):
    first = int(rng.integers(0, len(content)))
    count = min(int(rng.integers(1, 200)), len(content) - first)
    return content[:first] + bytes(count) + content[first + count:]


def flipped(content, rng):
    """A few bits, of which some are in the header, where they do most."""
    damaged = bytearray(content)
    for _ in range(int(rng.integers(1, 9))):
        most = len(damaged) if rng.random() < 0.5 else min(len(damaged), 200)
        damaged[int(rng.integers(0, most))] ^= 1 << int(rng.integers(0, 8))
    return bytes(damaged)


def overwritten(content, rng):
    first = int(rng.integers(0, len(content)))
    return content[:first] + rng.bytes(int(rng.integers(1, 40))) + content[first + 20:]


def repeated(content, rng):
    first, last = sorted(int(at) for at in rng.integers(0, len(content), 2))
    return content[:last] + content[first:]


def maxed(content, rng):
    """A number of the header becomes as large as it can be."""
    first = int(rng.integers(4, min(len(content), 120)))
    count = int(rng.choice([2, 4]))
    return content[:first] + b'\xff' * count + content[first + count:]


MUTATIONS = (cut, zeroed, flipped, overwritten, repeated, maxed)


def repaired(content):
    """A PNG's checksums made right again, so that damage gets past them."""
    if not content.startswith(b'\x89PNG\r\n\x1a\n'):
        return content
    whole, at = bytearray(content), 8
    while at + 12 <= len(whole):
        stop = at + 8 + int.from_bytes(whole[at:at + 4], 'big')
        whole[stop:stop + 4] = struct.pack('>I', zlib.crc32(whole[at + 4:stop])) if stop + 4 <= len(whole) else b''
        at = stop + 4
    return bytes(whole)


def read(content, policy, decoder):
    """What became of the picture: 'read', 'refused', or 'damaged' behind a good header. Checks every promise."""
    size = image = None
    try:
        size = timed(read_size, io.BytesIO(content))
    except UserError as error:
        assert_sentence(error)
    try:
        image = timed(decode, io.BytesIO(content), decoder=decoder)
        assert image.mode == 'RGB' and size == (image.height, image.width)
        pictures = timed(load_pictures, io.BytesIO(content), 14, policy)
        assert [(p.rows, p.cols) for p in pictures] == fit_grids(*size, 14, policy)
    except UserError as error:
        assert_sentence(error)
        assert image is None, 'decoding depends on the policy'
    return 'read' if image is not None else 'refused' if size is None else 'damaged'


def timed(call, *args, **options):
    start = time.thread_time()
    try:
        return call(*args, **options)
    finally:
        assert time.thread_time() - start < MOST_SECONDS, 'hangs'


def assert_sentence(error):
    text = str(error)
    assert text.startswith('image ') and text.endswith('.') and '\n' not in text and len(text) < 400, text


def fuzz(count, seed, decoder='pillow'):
    outcomes = {'read': 0, 'refused': 0, 'damaged': 0}
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        kind = list(KINDS)[number % len(KINDS)]
        content = encoded(kind, tuple(int(side) for side in rng.integers(1, 80, 2)), rng)
        mutation = MUTATIONS[int(rng.integers(len(MUTATIONS)))]
        content = mutation(content, rng)
        if rng.random() < 0.7:
            content = repaired(content)
        try:
            outcomes[read(content, POLICIES[number % len(POLICIES)], decoder)] += 1
        except Exception as error:
            error.add_note(f'picture {number}: {kind}, {mutation.__name__}')
            raise
    assert sum(outcomes.values()) == count and min(outcomes.values()) > 0, outcomes
    return outcomes


@pytest.mark.parametrize('kind', KINDS)
def test_whole_pictures_are_read(kind):
    rng = np.random.default_rng(0)
    for size in ((1, 1), (37, 50), (1, 90), (90, 1)):
        assert read(encoded(kind, size, rng), ImagePolicy(64), 'pillow') == 'read', size


def test_damaged_pictures():
    fuzz(500, 0)


@pytest.mark.slow
@pytest.mark.parametrize('decoder', ['pillow', 'simplejpeg'])
def test_many_damaged_pictures(decoder):
    if decoder == 'simplejpeg':
        pytest.importorskip('simplejpeg')
    fuzz(5000, 1, decoder)


@pytest.mark.parametrize('kind', ['jpeg', 'png', 'gif', 'bmp', 'tiff'])
def test_strips(kind):
    for size in ((1, 20000), (20000, 1)):
        assert read(encoded(kind, size, np.random.default_rng(0)), ImagePolicy(64), 'pillow') == 'read'


def test_bombs():
    bombs = [encoded('png', (1, 1), np.random.default_rng(0)).replace(struct.pack('>II', 1, 1), struct.pack('>II', *size))
             for size in ((30000, 30000), (11585, 11585), (1, 1 << 27))]
    bombs += [saved_small('gif', b'\1\0\1\0', b'\xff\x3f\xff\x1f')]
    bombs += [b'P6 11000 11000 255\n' + bytes(9999), b'P1 11000 11000\n1 0']
    for content in bombs:
        assert read(repaired(content), ImagePolicy(64), 'pillow') != 'read'


def saved_small(kind, old, new):
    content = encoded(kind, (1, 1), np.random.default_rng(0))
    assert old in content
    return content.replace(old, new, 1)


def test_what_is_no_picture():
    rng = np.random.default_rng(0)
    starts = (b'', b'\xff\xd8\xff', b'\x89PNG\r\n\x1a\n', b'GIF89a', b'RIFF\x99\0\0\0WEBPVP8 ', b'BM', b'II*\0', b'MM\0*',
              b'P6 ', b'P1 ', b'Pf\n', b'\0\0\0\x20ftypavif', b'\0\0\0\x0cjP  \r\n\x87\n', b'%!PS', b'%PDF-',
              b'8BPS', b'<svg>', b'II+\0')
    for start in starts:
        for count in (0, 1, 30, 3000):
            assert read(start + rng.bytes(count), ImagePolicy(64), 'pillow') != 'read', start
