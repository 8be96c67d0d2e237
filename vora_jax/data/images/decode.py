"""Picture files to upright RGB pictures."""
from typing import Any

import numpy as np
import PIL.Image

from vora_jax.types import UserError

# What Pillow raises for a file that is missing, no picture, damaged, or absurdly large.
_UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, PIL.Image.DecompressionBombError)
_ORIENTATION_TAG = 0x0112
_TURN = PIL.Image.Transpose
_ORIENTATIONS = {
    2: _TURN.FLIP_LEFT_RIGHT, 3: _TURN.ROTATE_180, 4: _TURN.FLIP_TOP_BOTTOM, 5: _TURN.TRANSPOSE,
    6: _TURN.ROTATE_270, 7: _TURN.TRANSVERSE, 8: _TURN.ROTATE_90}


def read_size(path: Any) -> tuple[int, int]:
    """(height, width) of a picture as it is to be seen; reads only the file's header.

    Raises:
        UserError: the file is missing or no picture.
    """
    try:
        with PIL.Image.open(path) as image:
            width, height = image.size
            return (width, height) if _orientation(image) >= 5 else (height, width)
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error


def decode(path: Any) -> PIL.Image.Image:
    """The picture in RGB: turned upright, transparency over white, every byte verified.

    Args:
        path: a file name or a binary file.
    Raises:
        UserError: the file is missing, no picture, or truncated.
    """
    try:
        with PIL.Image.open(path) as image:
            image.verify()  # a PNG's checksums up to its end mark: `load` is content once it has all pixels
        if hasattr(path, 'seek'):
            path.seek(0)
        with PIL.Image.open(path) as image:
            orientation = _orientation(image)
            image.load()
            if image.mode.startswith('I'):  # 16 and 32 bit grey; Pillow would clip it
                deep = np.asarray(image).astype(np.float64)
                deep = deep / 257 if deep.max() > 255 else deep
                image = PIL.Image.fromarray(deep.clip(0, 255).astype(np.uint8))
            elif 'A' in image.getbands() or 'transparency' in image.info:
                rgba = image.convert('RGBA')
                image = PIL.Image.new('RGBA', rgba.size, 'white')
                image.alpha_composite(rgba)
            image = image.convert('RGB')
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error
    return image.transpose(_ORIENTATIONS[orientation]) if orientation in _ORIENTATIONS else image


def _orientation(image: PIL.Image.Image) -> int:
    """EXIF orientation, 1 if there is none; from the header: Pillow would decode a whole PNG for it."""
    if image.format == 'PNG' and 'exif' not in image.info:
        return 1
    return image.getexif().get(_ORIENTATION_TAG, 1)


def _unreadable(path: Any, error: Exception) -> UserError:
    name = getattr(path, 'name', 'in memory') if hasattr(path, 'read') else path
    if isinstance(error, FileNotFoundError):
        return UserError(f'image {name} does not exist; check the frames and the image root.')
    reason = str(error) or type(error).__name__
    if isinstance(error, PIL.UnidentifiedImageError):
        reason = 'no known image format'
    return UserError(f'image {name} cannot be read ({reason}); replace or remove it.')
