"""A picture of a mask and its tiles."""
import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from vora_jax.bench.tile_statistics import maps
from vora_jax.ops.tile_walk import Tile
from vora_jax.types import KeyRange

SIDE, MARGIN, LINE = 1024, 28, 22  # pixels
MIN_CELL = 6  # pixels: borders of smaller tiles would hide the mask
# Each kind of half tile: where the mask is not, and where it is.
EMPTY, LOADED, FULL = ((246, 246, 246),) * 2, ((216, 222, 216),) * 2, ((0, 92, 132),) * 2
PARTIAL = (255, 224, 178), (216, 96, 0)
KINDS = {'empty: not visited': EMPTY, 'loaded only': LOADED, 'partial: masked': PARTIAL, 'full: no mask needed': FULL}
BORDER, INK, PAPER = (200, 200, 200), (32, 32, 32), (255, 255, 255)


def draw_mask(key_range: KeyRange, num_keys: int, tile: Tile) -> PIL.Image.Image:
    """The first row's mask, queries downwards and keys to the right, on half tiles coloured by kind, with a legend.

    Long rows are averaged into at most SIDE pixels, short ones magnified.
    """
    row = KeyRange(*(np.asarray(x)[:1] for x in key_range))
    kind = _kinds(*(x[0] for x in maps(row, num_keys, tile)))
    num_queries = row.start.shape[1]
    step = max(1, -(-max(num_queries, num_keys) // SIDE))  # slots a pixel
    zoom = max(1, SIDE // max(num_queries, num_keys))  # pixels a slot
    share = _coverage(row, num_keys, step)[..., None]
    queries, keys = (np.arange(n) * step // side for n, side in zip(share.shape, (tile.queries, tile.keys // 2)))
    without, with_mask = np.moveaxis(np.array([*KINDS.values()])[kind[queries][:, keys]], 2, 0)
    pixels = (without + share * (with_mask - without)).round().astype(np.uint8)
    mask = PIL.Image.fromarray(pixels.repeat(zoom, 0).repeat(zoom, 1))
    _draw_borders(mask, tile, step / zoom)
    return _with_legend(mask, kind, tile)


def _kinds(halves: np.ndarray, full: np.ndarray) -> np.ndarray:
    """i[query tiles, 2 * key tiles]: the place in KINDS of each half, from `maps` of one row."""
    kind = np.where(halves, 2, halves.any(-1, keepdims=True))
    return np.where(full[..., None], 3, kind).reshape(len(full), -1)


def _coverage(row: KeyRange, num_keys: int, step: int) -> np.ndarray:
    """f64[pixels down, pixels right]: the share of each pixel's pairs that the mask lets through."""
    left = np.arange(0, num_keys, step)
    start, stop = (x[0, :, None] for x in row)
    seen = np.maximum(np.minimum(stop, left + step) - np.maximum(start, left), 0)
    seen = np.pad(seen, ((0, -len(seen) % step), (0, 0)))
    return seen.reshape(-1, step, len(left)).sum(1) / step**2


def _draw_borders(mask: PIL.Image.Image, tile: Tile, slots_per_pixel: float) -> None:
    draw = PIL.ImageDraw.Draw(mask)
    height, width = (side / slots_per_pixel for side in tile)
    if min(height, width) < MIN_CELL:
        return
    for y in np.arange(height, mask.height, height).astype(int).tolist():
        draw.line((0, y, mask.width, y), BORDER)
    for x in np.arange(width, mask.width, width).astype(int).tolist():
        draw.line((x, 0, x, mask.height), BORDER)


def _with_legend(mask: PIL.Image.Image, kind: np.ndarray, tile: Tile) -> PIL.Image.Image:
    page = PIL.Image.new('RGB', (max(mask.width, 780) + 2 * MARGIN, mask.height + 3 * MARGIN + LINE), PAPER)
    page.paste(mask, (MARGIN, 2 * MARGIN + LINE))
    draw, font = PIL.ImageDraw.Draw(page), PIL.ImageFont.load_default(15)
    title = f'keys to the right, queries downwards; tiles of {tile.queries} x {tile.keys}, computed by half'
    draw.text((MARGIN, MARGIN // 2), title, INK, font)
    x = MARGIN
    for number, (text, (_, colour)) in enumerate(KINDS.items()):
        draw.rectangle((x, MARGIN + LINE - 8, x + 14, MARGIN + LINE + 6), colour, BORDER)
        text = f'{text} ({(kind == number).mean():.0%})'
        draw.text((x + 20, MARGIN + LINE - 10), text, INK, font)
        x += 20 + int(draw.textlength(text, font)) + MARGIN
    return page
