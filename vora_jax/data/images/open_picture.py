"""Opens picture files within safe limits."""
import contextlib
import functools
import io
import logging
import os
import struct
import warnings
from typing import Any, BinaryIO, Iterator

import PIL.Image
import PIL.ImageFile

from vora_jax.data.frame import Frame
from vora_jax.data.sources.files import open_binary
from vora_jax.types import UserError

# What Pillow may read. Others start programs (EPS, WMF), have no mark to know them by (TGA), or are not for pictures.
FORMATS = ('JPEG', 'PNG', 'WEBP', 'GIF', 'BMP', 'TIFF', 'PPM', 'AVIF', 'JPEG2000')
MAX_PIXELS = 1 << 27
MAX_BYTES = 1 << 28
# Large pictures in very few bytes are damaged, made to harm, or blank: no PNG has more than 8,256 pixels a byte.
MAX_PIXELS_A_BYTE, SMALL = 1 << 14, 1 << 24

# The limits above are the ones that count. Pillow's warnings, of pictures half as large and of odd metadata, concern nobody.
warnings.filterwarnings('ignore', module=r'PIL\.')
logging.getLogger('PIL').setLevel(logging.CRITICAL)


@contextlib.contextmanager
def open_picture(source: Any, whole: bool = False) -> Iterator[PIL.ImageFile.ImageFile]:
    """A picture of which only the header was read; its pixels may still turn out to be damaged.

    Args:
        source: a file name, a `Frame`, or a binary file that can seek.
        whole: the file's bytes are read at once, in `image.fp`, for decoding.
    Raises:
        UserError: whatever goes wrong here or inside the `with`; one sentence that names the picture.
    """
    name = _name(source)
    try:
        with _open_file(source) as file:
            num_bytes = file.seek(0, io.SEEK_END)
            if num_bytes > MAX_BYTES:
                raise ValueError(f'{num_bytes} bytes are more than {MAX_BYTES}')
            file.seek(0)
            with PIL.Image.open(io.BytesIO(file.read()) if whole else file, formats=_formats()) as image:
                _check_size(image.width, image.height, num_bytes)
                # In one piece: Pillow feeds its decoders in small ones, which is a little slower.
                image.decodermaxblock = max(image.decodermaxblock, num_bytes)
                yield image
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f'image {name} does not exist; check the frames and the image root.') from error
    except Exception as error:  # Pillow's readers raise anything for damaged files: struct.error, KeyError, TypeError, ...
        raise UserError(f'image {name} cannot be read ({_reason(source, error)}); replace or remove it.') from error


def _check_size(width: int, height: int, num_bytes: int) -> None:
    if width * height > MAX_PIXELS:
        raise ValueError(f'{width} x {height} pixels are more than {MAX_PIXELS}')
    if width * height > max(SMALL, num_bytes * MAX_PIXELS_A_BYTE):
        raise ValueError(f'{width} x {height} pixels in {num_bytes} bytes can be no picture')


def _open_file(source: Any) -> contextlib.AbstractContextManager[BinaryIO]:
    if isinstance(source, Frame):
        return source.open()
    return contextlib.nullcontext(source) if hasattr(source, 'read') else open_binary(os.fspath(source))


def _name(source: Any) -> str:
    return str(getattr(source, 'name', 'in memory') if isinstance(source, Frame) or hasattr(source, 'read') else source)


@functools.cache
def _formats() -> tuple[str, ...]:
    PIL.Image.init()
    return tuple(name for name in FORMATS if name in PIL.Image.OPEN)  # a build of Pillow may lack some


def _reason(source: Any, error: Exception) -> str:
    if isinstance(error, PIL.UnidentifiedImageError):
        return _unidentified(source)
    if isinstance(error, PIL.Image.DecompressionBombError):
        return f'more than {MAX_PIXELS} pixels'
    if isinstance(error, MemoryError):
        return 'it takes more memory than there is'
    if isinstance(error, struct.error):
        return 'truncated file'
    text = ' '.join(str(error).split()).rstrip('.')
    return text if isinstance(error, (OSError, ValueError, SyntaxError)) and text else f'{type(error).__name__}: {text}'


def _unidentified(source: Any) -> str:
    """Why Pillow knows nothing to open the file with; from its first bytes alone."""
    try:
        with _open_file(source) as file:
            file.seek(0)
            start = file.read(64)
    except (OSError, UserError) as error:
        return str(error)
    if not start:
        return 'the file is empty'
    known = 'PDF' if start.startswith(b'%PDF') else next((
        name for name, (_, accept) in PIL.Image.OPEN.items() if accept and _accepts(accept, start[:16])), '')
    if start[4:12] in (b'ftypheic', b'ftypheix', b'ftypmif1', b'ftypmsf1'):
        known = 'HEIF'
    if not known:
        return 'no known image format'
    readable = ', '.join(_formats())
    return f'damaged {known} header' if known in _formats() else f'format {known} is not one of {readable}'


def _accepts(accept: Any, start: bytes) -> bool:
    try:
        return accept(start) is True
    except Exception:  # of fewer bytes than it looks at
        return False
