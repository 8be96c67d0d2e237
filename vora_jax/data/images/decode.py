"""Picture files to upright RGB pictures."""
from typing import Any

import numpy as np
import PIL.Image

from vora_jax.data.frame import Frame
from vora_jax.data.images import png_chunks
from vora_jax.data.images.fast_jpeg import check_decoder, decode_jpeg
from vora_jax.data.images.open_picture import open_picture

WHITE = (255, 255, 255)

_ORIENTATION_TAG = 0x0112
_TURN = PIL.Image.Transpose
_ORIENTATIONS = {
    2: _TURN.FLIP_LEFT_RIGHT, 3: _TURN.ROTATE_180, 4: _TURN.FLIP_TOP_BOTTOM, 5: _TURN.TRANSPOSE,
    6: _TURN.ROTATE_270, 7: _TURN.TRANSVERSE, 8: _TURN.ROTATE_90}
_SIDEWAYS = (_TURN.TRANSPOSE, _TURN.ROTATE_270, _TURN.TRANSVERSE, _TURN.ROTATE_90)
_RANGES = (1, 255, 65535)  # what white may be in floats, which have no limit of their own


def read_size(source: Any) -> tuple[int, int]:
    """(height, width) of a picture as it is to be seen; reads only the file's header.

    Args:
        source: a file name, a binary file, or a `Frame`, which may know its size.
    Raises:
        UserError: the file is missing, no picture of a known format, or too large.
    """
    if isinstance(source, Frame) and source.size is not None:
        return source.size
    with open_picture(source) as image:
        width, height = image.size
        return (width, height) if _turn(image) in _SIDEWAYS else (height, width)


def decode(source: Any, background: tuple[int, int, int] = WHITE, decoder: str = 'pillow') -> PIL.Image.Image:
    """The picture in RGB: the first of an animation, turned upright, of 8 bits, transparency over the background.

    Args:
        source: a file name, a binary file or a `Frame`.
        background: red, green and blue under transparent pixels.
        decoder: of JPEG files, see `ImagePolicy`.
    Raises:
        UserError: the file is missing, no picture of a known format, too large, or damaged; or the decoder's package is
            missing.
    """
    check_decoder(decoder)
    with open_picture(source, whole=True) as image:
        turn = _turn(image)
        rgb = None
        if image.format == 'PNG':
            png_chunks.verify(image.fp)
        elif decoder == 'simplejpeg' and image.format in ('JPEG', 'MPO') and image.mode in ('RGB', 'L'):
            rgb = decode_jpeg(image.fp.getvalue())
        if rgb is None:
            image.load()
            rgb = _to_rgb(image, background)
        return rgb if turn is None else rgb.transpose(turn)


def _turn(image: PIL.Image.Image) -> PIL.Image.Transpose | None:
    """How the picture is turned upright, from the header: Pillow would decode a whole PNG for it.

    A TIFF file turns itself. Metadata that cannot be understood does not spoil a picture: it stays as it is.
    """
    if image.format == 'TIFF':
        return None
    if image.format == 'PNG' and 'exif' not in image.info:
        position = image.fp.tell()
        exif = png_chunks.find_exif(image.fp)
        image.fp.seek(position)
        if exif:
            image.info['exif'] = exif
    try:
        # The class is named because that of PNG decodes the pixels first.
        return _ORIENTATIONS.get(PIL.Image.Image.getexif(image).get(_ORIENTATION_TAG))
    except Exception:
        return None


def _to_rgb(image: PIL.Image.Image, background: tuple[int, int, int]) -> PIL.Image.Image:
    if image.mode == 'RGB' and 'transparency' not in image.info:
        return image
    if image.mode == 'F':
        with np.errstate(all='ignore'):  # files hold any float; what is none is black
            bright = np.asarray(image, np.float64)
            brightest = bright[np.isfinite(bright)].max(initial=0)
            white = next((white for white in _RANGES if brightest <= white), brightest)
            image = PIL.Image.fromarray(np.nan_to_num((bright / white * 255).clip(0, 255)).astype(np.uint8))
    elif image.mode.startswith('I'):  # 16 and 32 bit grey; Pillow would clip it
        deep = np.asarray(image).astype(np.float64)
        deep = deep / 257 if deep.max() > 255 else deep
        image = PIL.Image.fromarray(deep.clip(0, 255).astype(np.uint8))
    elif 'A' in image.getbands() or 'transparency' in image.info:
        above = image.convert('RGBA')
        image = PIL.Image.new('RGBA', above.size, (*background, 255))
        image.alpha_composite(above)
    return image.convert('RGB')
