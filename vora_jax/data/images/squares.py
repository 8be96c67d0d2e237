"""Pictures to squares: padded, cropped, tiled."""
import math
from typing import Sequence

import PIL.Image

from vora_jax.data.images.open_picture import MAX_PIXELS

_BICUBIC = PIL.Image.Resampling.BICUBIC
_STRIP = 64  # times as long as it is wide


def pad_to_square(image: PIL.Image.Image, color: tuple[int, int, int], side: int) -> PIL.Image.Image:
    """The picture in the middle of a square as large as its longer side.

    A long strip whose square would be larger than any picture may be is brought to four times `side` pixels first: nothing
    more can be seen of it once the square is `side` pixels wide.
    """
    if image.width == image.height:
        return image
    if max(image.size) ** 2 > max(MAX_PIXELS, 2 * image.width * image.height):
        shrink = 4 * side / max(image.size)
        image = image.resize(tuple(max(1, round(edge * shrink)) for edge in image.size), _BICUBIC)
    longer = max(image.size)
    square = PIL.Image.new('RGB', (longer, longer), tuple(color))
    square.paste(image, ((longer - image.width) // 2, (longer - image.height) // 2))
    return square


def crop_to_square(image: PIL.Image.Image, side: int) -> PIL.Image.Image:
    """The middle of the picture, its shorter side resized to `side` first; as CLIP's processor does it."""
    short = min(image.size)
    if max(image.size) > _STRIP * short:  # resizing all of it would take more memory than any picture
        image = _center(image, *(min(edge, 8 * short) for edge in image.size))
    size = tuple(side if edge == short else int(side * edge / short) for edge in image.size)
    if size != image.size:
        image = image.resize(size, _BICUBIC)
    return _center(image, side, side)


def fit_tiles(height: int, width: int, side: int, tiles: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The (rows, cols) of squares that show a picture best: most of its own pixels survive, then least room is empty.

    LLaVA-NeXT's rule; the first of equals.
    """
    def merit(tile: tuple[int, int]) -> tuple[int, int]:
        rows, cols = tile
        scale = min(cols * side / width, rows * side / height)
        shown = min(int(width * scale) * int(height * scale), width * height)
        return shown, shown - rows * cols * side * side
    return max(tiles, key=merit)


def cut_tiles(image: PIL.Image.Image, side: int, tiles: Sequence[tuple[int, int]],
              color: tuple[int, int, int]) -> list[PIL.Image.Image]:
    """The whole picture stretched to a square, and the picture at its own aspect ratio in squares, in reading order."""
    rows, cols = fit_tiles(image.height, image.width, side, tiles)
    room = cols * side, rows * side
    wide, high = room[0] / image.width, room[1] / image.height
    if wide < high:
        size = room[0], min(math.ceil(image.height * wide), room[1])
    else:
        size = min(math.ceil(image.width * high), room[0]), room[1]
    canvas = PIL.Image.new('RGB', room, tuple(color))
    canvas.paste(image.resize(size, _BICUBIC), ((room[0] - size[0]) // 2, (room[1] - size[1]) // 2))
    corners = [(col * side, row * side) for row in range(rows) for col in range(cols)]
    return [image.resize((side, side), _BICUBIC),
            *(canvas.crop((left, top, left + side, top + side)) for left, top in corners)]


def _center(image: PIL.Image.Image, width: int, height: int) -> PIL.Image.Image:
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
