"""Picture files to patches of bytes."""
import collections
import math
import threading
from typing import Any, Callable, Hashable

import numpy as np
import PIL.Image

from vora_jax.data.config import ImagePolicy
from vora_jax.data.packing import Picture
from vora_jax.types import Array, UserError

# What Pillow raises for a file that is missing, no picture, damaged, or absurdly large.
_UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, PIL.Image.DecompressionBombError)
_ORIENTATION_TAG = 0x0112
_TURN = PIL.Image.Transpose
_ORIENTATIONS = {
    2: _TURN.FLIP_LEFT_RIGHT, 3: _TURN.ROTATE_180, 4: _TURN.FLIP_TOP_BOTTOM, 5: _TURN.TRANSPOSE,
    6: _TURN.ROTATE_270, 7: _TURN.TRANSVERSE, 8: _TURN.ROTATE_90}


def fit_grid(height: int, width: int, patch_size: int, policy: ImagePolicy) -> tuple[int, int]:
    """(rows, cols) of patches that a picture of this size is resized to: its own aspect ratio, within the
    policy's limits.

    Qwen2-VL's rule: each side to the nearest multiple of the patch size; if that is over (under) the limit,
    both sides are scaled by the same factor first and rounded down (up). A square policy has one answer for all.
    """
    if policy.kind != 'native':
        if policy.side % patch_size or (policy.side // patch_size)**2 > policy.max_patches:
            raise UserError(f'ImagePolicy.side: {policy.side} pixels are no whole patches of {patch_size} pixels, or more '
                            f'than {policy.max_patches} of them; choose another side or raise the limit of patches.')
        return (policy.side // patch_size,) * 2
    rows, cols = max(1, round(height / patch_size)), max(1, round(width / patch_size))
    area = height * width / patch_size ** 2
    if rows * cols > policy.max_patches:
        shrink = math.sqrt(policy.max_patches / area)
        rows, cols = (max(1, math.floor(side / patch_size * shrink)) for side in (height, width))
        # In a strip so thin that one side is stuck at one patch, the other side alone must keep the limit.
        rows, cols = min(rows, policy.max_patches), min(cols, policy.max_patches)
    elif rows * cols < policy.min_patches:
        grow = math.sqrt(policy.min_patches / area)
        rows, cols = (math.ceil(side / patch_size * grow) for side in (height, width))
        rows = min(rows, policy.max_patches)  # rounding up may overshoot limits that are close together
        cols = min(cols, policy.max_patches // rows)
    return rows, cols


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


def patchify(pixels: Array, patch_size: int) -> Array:
    """Patches in reading order, each in (row, column, channel) order.

    Args:
        pixels: u8[rows * patch_size, cols * patch_size, 3].
    Returns:
        u8[rows * cols, patch_size * patch_size * 3].
    """
    rows, cols = pixels.shape[0] // patch_size, pixels.shape[1] // patch_size
    patches = pixels.reshape(rows, patch_size, cols, patch_size, 3).transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(patches).reshape(rows * cols, -1)


def load_picture(path: Any, patch_size: int, policy: ImagePolicy) -> Picture:
    """The picture as patches, resized (bicubic) where its size is not already right.

    Raises:
        UserError: see `decode`.
    """
    image = decode(path)
    rows, cols = fit_grid(image.height, image.width, patch_size, policy)
    size = (cols * patch_size, rows * patch_size)
    if policy.kind == 'square_pad':
        image = pad_to_square(image, policy.color)
    elif policy.kind == 'square_crop':
        image = crop_to_square(image, policy.side)
    if image.size != size:
        image = image.resize(size, PIL.Image.Resampling.BICUBIC)
    return Picture(patchify(np.asarray(image), patch_size), rows, cols)


def pad_to_square(image: PIL.Image.Image, color: tuple[int, int, int]) -> PIL.Image.Image:
    """The picture in the middle of a square as large as its longer side."""
    side = max(image.size)
    if image.width == image.height:
        return image
    square = PIL.Image.new('RGB', (side, side), tuple(color))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def crop_to_square(image: PIL.Image.Image, side: int) -> PIL.Image.Image:
    """The middle of the picture, its shorter side resized to `side` first; as CLIP's processor does it."""
    short = min(image.size)
    size = tuple(side if edge == short else int(side * edge / short) for edge in image.size)
    if size != image.size:
        image = image.resize(size, PIL.Image.Resampling.BICUBIC)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


class PictureCache:
    """The most recently used pictures up to a number of bytes. Thread-safe; pickled empty."""

    def __init__(self, max_bytes: int):
        self._max_bytes = max_bytes
        self.__setstate__({'_max_bytes': max_bytes})

    def get(self, key: Hashable, load: Callable[[], Picture]) -> Picture:
        """The picture of this key, loaded if it is not there; what `load` raises passes through."""
        with self._lock:
            if key in self._pictures:
                self._pictures.move_to_end(key)
                return self._pictures[key]
        picture = load()
        with self._lock:
            if key not in self._pictures:
                self._pictures[key] = picture
                self._bytes += picture.pixels.nbytes
            while self._bytes > self._max_bytes:
                self._bytes -= self._pictures.popitem(last=False)[1].pixels.nbytes
        return picture

    def __getstate__(self) -> dict[str, Any]:
        return {'_max_bytes': self._max_bytes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._max_bytes = state['_max_bytes']
        self._pictures: collections.OrderedDict[Hashable, Picture] = collections.OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()


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
