"""Pictures to patches of bytes, by policy."""
import math
from typing import Any

import numpy as np
import PIL.Image

from vora_jax.data.config import ImagePolicy
from vora_jax.data.images.decode import decode
from vora_jax.data.packing import Picture
from vora_jax.types import Array, UserError


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
