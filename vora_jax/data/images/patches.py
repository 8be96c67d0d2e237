"""Pictures to patches of bytes, by policy."""
import math
from typing import Any

import numpy as np
import PIL.Image

from vora_jax.data.config import ImagePolicy
from vora_jax.data.images.decode import decode
from vora_jax.data.images.squares import crop_to_square, cut_tiles, fit_tiles, pad_to_square
from vora_jax.data.packing import Picture
from vora_jax.types import Array, UserError


def fit_grids(height: int, width: int, patch_size: int, policy: ImagePolicy) -> list[tuple[int, int]]:
    """(rows, cols) of patches of each of the pictures that `load_pictures` makes of a picture of this size.

    Raises:
        UserError: the policy's squares do not fit patches of this size.
    """
    if policy.kind == 'native':
        return [fit_grid(height, width, patch_size, policy)]
    squares = 1
    if policy.kind == 'tiles':
        rows, cols = fit_tiles(height, width, policy.side, policy.tiles)
        squares += rows * cols
    check_squares(patch_size, policy)
    return [(policy.side // patch_size,) * 2] * squares


def check_squares(patch_size: int, policy: ImagePolicy) -> None:
    """UserError if squares of the policy's side are no whole patches, or may be more patches than it allows."""
    most = 1 + max((rows * cols for rows, cols in policy.tiles), default=0)
    if policy.side % patch_size or most * (policy.side // patch_size) ** 2 > policy.max_patches:
        squares = f'{most} squares of {policy.side}' if policy.tiles else str(policy.side)
        raise UserError(f'ImagePolicy.side: {squares} pixels are no whole patches of {patch_size} pixels, or more '
                        f'than {policy.max_patches} of them; choose another side or raise the limit of patches.')


def fit_grid(height: int, width: int, patch_size: int, policy: ImagePolicy) -> tuple[int, int]:
    """(rows, cols) of patches that a native picture of this size is resized to: its own aspect ratio, within the
    policy's limits.

    Qwen2-VL's rule: each side to the nearest multiple of the patch size; if that is over (under) the limit,
    both sides are scaled by the same factor first and rounded down (up).
    """
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


def load_pictures(source: Any, patch_size: int, policy: ImagePolicy) -> list[Picture]:
    """The pictures that the policy makes of one: itself, or its tiles, resized (bicubic) where the size is not right.

    Args:
        source: see `decode`.
        patch_size: pixels of a side.
    Returns:
        pictures of u8[rows * cols, patch_size * patch_size * 3], with the grids of `fit_grids`.
    Raises:
        UserError: see `decode` and `fit_grids`.
    """
    image = decode(source, policy.background, policy.decoder)
    grids = fit_grids(image.height, image.width, patch_size, policy)
    if policy.kind == 'tiles':
        images = cut_tiles(image, policy.side, policy.tiles, policy.color)
    elif policy.kind == 'square_pad':
        images = [pad_to_square(image, policy.color, policy.side)]
    elif policy.kind == 'square_crop':
        images = [crop_to_square(image, policy.side)]
    else:
        images = [image]
    del image  # here and below: what Pillow allocates next is then memory that is warm, a tenth of the time in all
    pictures = []
    for rows, cols in grids:
        image = _resized(images.pop(0), (cols * patch_size, rows * patch_size))
        # NumPy would ask Pillow for the bytes several times.
        pixels = np.frombuffer(image.tobytes(), np.uint8).reshape(image.height, image.width, 3)
        del image
        pictures.append(Picture(patchify(pixels, patch_size), rows, cols))
    return pictures


def _resized(image: PIL.Image.Image, size: tuple[int, int]) -> PIL.Image.Image:
    return image if image.size == size else image.resize(size, PIL.Image.Resampling.BICUBIC)


def patchify(pixels: Array, patch_size: int) -> Array:
    """Patches in reading order, each in (row, column, channel) order.

    Args:
        pixels: u8|f32[rows * patch_size, cols * patch_size, 3].
    Returns:
        u8|f32[rows * cols, patch_size * patch_size * 3].
    """
    rows, cols = pixels.shape[0] // patch_size, pixels.shape[1] // patch_size
    # A line of a patch moves as one item: NumPy copies few large items faster than many bytes.
    line = f'V{patch_size * 3 * pixels.itemsize}'
    lines = np.ascontiguousarray(pixels).reshape(rows, patch_size, cols, -1).view(line)[..., 0]
    return np.ascontiguousarray(lines.transpose(0, 2, 1)).view(pixels.dtype).reshape(rows * cols, -1)
