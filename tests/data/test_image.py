"""Decoding: what any picture file becomes."""
import io
import os
import struct
import subprocess
import sys
import zlib

import numpy as np
import PIL.features
import PIL.Image
import PIL.ImageOps
import pytest

from vora_jax.data.frame import Frame
from vora_jax.data.images.decode import decode, read_size
from vora_jax.types import UserError

RNG = np.random.default_rng(0)
# Ours are ignored, but pytest sets its own filters for each test.
pytestmark = pytest.mark.filterwarnings('ignore:::PIL')


def noise(*shape):
    return RNG.integers(0, 256, shape, np.uint8)


def smooth(height=24, width=40):
    """A picture that lossy formats keep well, different in every corner."""
    corners = PIL.Image.fromarray(noise(2, 3, 3))
    return corners.resize((width, height), PIL.Image.Resampling.BILINEAR)


def saved(image, format='PNG', **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return io.BytesIO(file.getvalue())


def pixels(file, **options):
    return np.asarray(decode(file, **options)).astype(int)


def chunk(kind, content):
    return struct.pack('>I4s', len(content), kind) + content + struct.pack('>I', zlib.crc32(kind + content))


def png(height, width, *chunks, depth=8, color=2, rows=b''):
    head = chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, depth, color, 0, 0, 0))
    return b'\x89PNG\r\n\x1a\n' + head + b''.join(chunks) + chunk(b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b'')


@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('format', ['JPEG', 'PNG', 'WEBP', 'TIFF', 'AVIF', 'MPO'])
def test_exif_orientation_as_pillow_does_it(orientation, format):
    if format == 'AVIF' and not PIL.features.check('avif'):
        pytest.skip('this Pillow reads no AVIF')
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    options = {'save_all': True, 'append_images': [smooth()]} if format == 'MPO' else {}
    file = saved(smooth(), format, exif=exif, **options)
    expected = PIL.ImageOps.exif_transpose(PIL.Image.open(file)).convert('RGB')
    np.testing.assert_array_equal(pixels(file), np.asarray(expected))
    assert read_size(file) == (expected.height, expected.width) == ((24, 40) if orientation < 5 else (40, 24))
    if format == 'JPEG':
        pytest.importorskip('simplejpeg')
        np.testing.assert_array_equal(pixels(file, decoder='simplejpeg'), np.asarray(expected))


def test_orientation_behind_the_pixels_of_a_png():
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    whole = saved(smooth()).getvalue()
    late = io.BytesIO(whole[:-12] + chunk(b'eXIf', exif.tobytes()[6:]) + whole[-12:])
    expected = np.rot90(np.asarray(PIL.Image.open(late).convert('RGB')), -1)
    np.testing.assert_array_equal(pixels(late), expected)
    assert read_size(late) == (40, 24)


def test_metadata_that_makes_no_sense_leaves_a_picture_as_it_is():
    whole = saved(smooth(), 'JPEG', exif=b'Exif\0\0II*\0\xff\xff\xff\xff' + bytes(40))
    assert read_size(whole) == (24, 40) and decode(whole).size == (40, 24)
    text = chunk(b'tEXt', b'Raw profile type exif\0\nexif\n 4\nzzzz')
    assert read_size(io.BytesIO(png(3, 2, text, rows=bytes(21)))) == (3, 2)


def test_transparency_shows_the_background():
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, 0], rgba[0, :, 3] = 200, [0, 255, 128]
    for background, half in (((255, 255, 255), (227, 127)), ((10, 20, 30), (105, 10))):
        result = pixels(saved(PIL.Image.fromarray(rgba)), background=background)[0].tolist()
        assert result[0] == list(background) and result[1] == [200, 0, 0]
        assert np.abs(np.array(result[2][:2]) - half).max() <= 1
    assert pixels(saved(PIL.Image.fromarray(rgba)))[0, 0].tolist() == [255, 255, 255]
    grey = PIL.Image.merge('LA', [PIL.Image.new('L', (1, 1), value) for value in (9, 0)])
    assert pixels(saved(grey)).tolist() == [[[255] * 3]]
    assert pixels(saved(PIL.Image.new('L', (1, 1), 7), transparency=7)).tolist() == [[[255] * 3]]
    assert pixels(saved(PIL.Image.new('RGB', (1, 1), (1, 2, 3)), transparency=(1, 2, 3))).tolist() == [[[255] * 3]]


def test_palettes():
    palette = PIL.Image.new('P', (1, 1), 0)
    palette.putpalette([10, 20, 30])
    for format in ('PNG', 'GIF', 'BMP'):
        assert pixels(saved(palette, format)).tolist() == [[[10, 20, 30]]]
    assert pixels(saved(palette, transparency=0)).tolist() == [[[255] * 3]]
    assert pixels(saved(palette, 'GIF', transparency=0)).tolist() == [[[255] * 3]]
    half = pixels(saved(palette, transparency=bytes([128])))[0, 0]
    assert np.abs(half - np.rint(127 / 255 * 255 + np.array([10, 20, 30]) * 128 / 255)).max() <= 1


def test_deep_and_narrow_pictures():
    grey16 = PIL.Image.fromarray(np.array([[0, 257 * 100, 65535]], np.uint16))
    for format in ('PNG', 'TIFF', 'PPM'):
        assert pixels(saved(grey16, format))[0, :, 0].tolist() == [0, 100, 255]
    deep = RNG.integers(0, 65536, (2, 3, 3)).astype('>u2')
    rows = b''.join(b'\0' + row.tobytes() for row in deep)
    assert np.abs(pixels(io.BytesIO(png(2, 3, depth=16, rows=rows))) - deep / 257).max() <= 1
    bits = PIL.Image.fromarray(np.array([[True, False]]))
    for format in ('PNG', 'TIFF', 'PPM', 'BMP'):
        assert pixels(saved(bits, format))[0].tolist() == [[255] * 3, [0] * 3]
    assert pixels(saved(PIL.Image.new('L', (1, 1), 7))).tolist() == [[[7, 7, 7]]]
    whole = PIL.Image.fromarray(np.array([[-5, 0, 257 * 9, 1 << 20]], np.int32))
    assert pixels(saved(whole, 'TIFF'))[0, :, 0].tolist() == [0, 0, 9, 255]


@pytest.mark.parametrize('white', [1, 255, 65535, 1e9])
def test_floats_are_taken_by_their_range(white):
    values = np.array([[-1, 0, 0.25, 0.5, 1, np.nan]], np.float32) * white
    result = pixels(saved(PIL.Image.fromarray(values), 'TIFF'))[0, :, 0]
    assert np.abs(result - [0, 0, 63, 127, 255, 0]).max() <= 1
    odd = np.array([[np.inf, -np.inf, np.nan, white]], np.float32)
    odd.view(np.uint32)[0, 2] = 0x7f800001  # a NaN that signals
    assert pixels(saved(PIL.Image.fromarray(odd), 'TIFF'))[0, :, 0].tolist() == [255, 0, 0, 255]


def test_colour_spaces():
    image = smooth()
    for mode, format in (('CMYK', 'JPEG'), ('CMYK', 'TIFF'), ('YCbCr', 'TIFF'), ('RGB', 'WEBP'), ('RGB', 'JPEG2000')):
        file = saved(image.convert(mode), format, **({'lossless': True} if format == 'WEBP' else {}))
        np.testing.assert_array_equal(pixels(file), np.asarray(PIL.Image.open(file).convert('RGB')), f'{mode} {format}')
        assert np.abs(pixels(file) - np.asarray(image).astype(int)).mean() < 4, (mode, format)  # not inverted


@pytest.mark.parametrize('format', ['GIF', 'WEBP', 'PNG', 'TIFF', 'MPO', 'AVIF'])
def test_the_first_picture_of_several(format):
    if format == 'AVIF' and not PIL.features.check('avif'):
        pytest.skip('this Pillow reads no AVIF')
    first, *others = (PIL.Image.new('RGB', (16, 8), color) for color in ('red', 'lime', 'blue'))
    file = saved(first, format, save_all=True, append_images=others)
    assert np.abs(pixels(file) - [255, 0, 0]).max() <= 8 and read_size(file) == (8, 16)


def test_damaged_files_give_one_sentence(tmp_path):
    whole = saved(PIL.Image.fromarray(noise(64, 64, 3))).getvalue()
    jpeg = saved(smooth(), 'JPEG').getvalue()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 4
    cases = {
        'cut.png': (whole[:-200], 'truncated'),
        'half.png': (whole[:len(whole) // 2], 'truncated'),
        'end.png': (whole[:-5], 'truncated'),
        'mark.png': (whole[:-12], 'truncated'),
        'flipped.png': (bytes(flipped), 'broken PNG'),
        'cut.jpg': (jpeg[:-2], 'truncated'),
        'half.jpg': (jpeg[:len(jpeg) // 2], 'truncated'),
        'head.jpg': (jpeg[:40], 'truncated'),
        'noise.jpg': (b'\xff\xd8\xff' + bytes(40), 'damaged JPEG header'),
        'empty.png': (b'', 'the file is empty'),
        'text.png': (b'hi', 'no known image'),
        'figure.eps': (b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n', 'format EPS is not one of JPEG, '),
        'figure.pdf': (b'%PDF-1.5\n', 'format PDF is not'),
        'phone.heic': (b'\0\0\0\x18ftypheic' + bytes(60), 'format HEIF is not'),
    }
    for name, (content, reason) in cases.items():
        (tmp_path / name).write_bytes(content)
        for file in (str(tmp_path / name), Frame(name, lambda content=content: io.BytesIO(content))):
            with pytest.raises(UserError, match=f'(?i)^image .*{name} cannot be read .*{reason}.*; replace or remove it.$'):
                decode(file)
    assert read_size(str(tmp_path / 'cut.png')) == (64, 64)
    os.mkfifo(tmp_path / 'pipe.png')
    for name in ('', 'pipe.png', 'a\0b'):
        for read in (read_size, decode):
            with pytest.raises(UserError, match='cannot be read'):
                read(str(tmp_path / name))
    for read in (read_size, decode):
        with pytest.raises(UserError, match='none.png does not exist'):
            read(str(tmp_path / 'none.png'))


def test_the_content_decides_what_a_file_is(tmp_path):
    for number, format in enumerate(('JPEG', 'PNG', 'GIF', 'WEBP')):
        path = tmp_path / f'{number}.bmp'
        path.write_bytes(saved(smooth(), format).getvalue())
        assert decode(path).size == (40, 24) and read_size(path) == (24, 40)


def test_a_frame_that_knows_its_size_is_not_opened():
    assert read_size(Frame('a', None, (3, 4))) == (3, 4)
    assert read_size(Frame('a', lambda: saved(smooth()))) == (24, 40)


def test_too_large_files_are_refused_before_they_are_decoded(monkeypatch):
    tag = struct.pack('<HHII', 256, 4, 1, 40)
    bombs = {
        'zeros': png(30000, 30000, rows=bytes(1 << 20)),
        'just too large': png(1 << 14, (1 << 13) + 1, rows=b''),
        'screen': b'GIF89a\xff\xff\xff\xff\0\0\0,\0\0\0\0\1\0\1\0\0\2\2D\1\0;',
        'tiff': saved(smooth(), 'TIFF').getvalue().replace(tag, struct.pack('<HHII', 256, 4, 1, 1 << 25)),
        'ppm': b'P6 40000 40000 255\n',
        'bmp': saved(smooth(), 'BMP').getvalue().replace(struct.pack('<II', 40, 24), struct.pack('<II', 1 << 24, 24)),
        'webp': b'RIFF\x1a\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0\xff\xff\xff\xff\xff\xff',
    }
    for name, content in bombs.items():
        for read in (read_size, decode):
            with pytest.raises(UserError, match='pixels' if name != 'webp' else 'cannot be read'):
                read(io.BytesIO(content))
    profile = chunk(b'iCCP', b'a\0\0' + zlib.compress(bytes(64 << 20)))
    for text in (profile, chunk(b'zTXt', b'a\0\0' + zlib.compress(bytes(64 << 20)))):
        with pytest.raises(UserError, match='too large'):
            read_size(io.BytesIO(png(1, 1, text, rows=bytes(4))))
    monkeypatch.setattr('vora_jax.data.images.open_picture.MAX_BYTES', 99)
    with pytest.raises(UserError, match='bytes are more than 99'):
        decode(saved(smooth()))


def test_nothing_is_printed():
    """Not even of a large picture, which Pillow warns of; not with warnings as errors either."""
    code = ('import io, PIL.Image; from vora_jax.data.images.decode import decode, read_size; file = io.BytesIO();'
            "PIL.Image.new('1', (9600, 9600)).save(file, 'TIFF', compression='group4'); file.write(bytes(9999));"
            'print(read_size(file)); file.seek(150); file.write(bytes(9)); print(read_size(file))')
    done = subprocess.run([sys.executable, '-W', 'error', '-c', code], capture_output=True, text=True)
    assert done.stderr == '' and done.stdout == '(9600, 9600)\n' * 2


def test_simplejpeg_differs_at_most_by_a_rounding(monkeypatch):
    pytest.importorskip('simplejpeg')
    for mode in ('RGB', 'L', 'CMYK'):
        for subsampling in (0, 1, 2):
            for progressive in (False, True):
                height, width = (int(side) for side in RNG.integers(1, 90, 2))
                file = saved(smooth(height, width).convert(mode), 'JPEG', subsampling=subsampling, progressive=progressive)
                assert np.abs(pixels(file, decoder='simplejpeg') - pixels(file)).max() <= 1
    assert pixels(saved(smooth()), decoder='simplejpeg').shape == (24, 40, 3)
    jpeg = saved(smooth(200, 200), 'JPEG').getvalue()
    with pytest.raises(UserError, match='truncated'):
        decode(io.BytesIO(jpeg[:len(jpeg) // 2]), decoder='simplejpeg')
    monkeypatch.setitem(sys.modules, 'simplejpeg', None)
    with pytest.raises(UserError, match=r"needs the package simplejpeg; install vora_jax\[jpeg\]"):
        decode(saved(smooth()), decoder='simplejpeg')
