"""A row's attention mask drawn in characters."""
import numpy as np

from vora_jax.batch import Batch
from vora_jax.types import ROUTE, TEXT, VISION

LETTERS = {TEXT: 't', VISION: 'v', ROUTE: 'r'}
NONE, SOME, ALL = '.', '+', 'x'


def draw_mask(row: Batch, most: int = 64) -> str:
    """Which slots (downwards) see which (to the right), over all but the padding at the end.

    Long rows are drawn in blocks of slots, at most `most` a side: x sees all of the block, + some, . none. At the edges
    stand the blocks' first slots and what they hold (t text, v vision, r route, * several).

    Example: two slots of text, a picture of three, a word; then another sample of two words

          ttvvvttt
        0 x.......
        1 xx......
        2 xxxxx...
        3 xxxxx...
        4 xxxxx...
        5 xxxxxx..
        6 ......x.
        7 ......xx
    """
    used = int(np.flatnonzero(row.segment_id).max(initial=-1)) + 1
    if not used:
        return '(an empty row)'
    step = -(-used // most)
    left = np.arange(0, used, step)
    seen = np.minimum(row.key_stop[:used, None], left + step) - np.maximum(row.key_start[:used, None], left)
    seen = np.add.reduceat(np.maximum(seen, 0), left, 0)
    width = np.minimum(left + step, used) - left
    drawn = np.where(seen == 0, NONE, np.where(seen == width[:, None] * width, ALL, SOME))
    letters = [_letter(row.modality[first:first + step]) for first in left.tolist()]
    digits = len(str(used - 1))
    head = [' ' * (digits + 1) + ''.join(letters)]
    head = ([f'blocks of {step} slots; x sees all of a block, + some, . none'] if step > 1 else []) + head
    return '\n'.join([*head, *(f'{first:>{digits}} {"".join(line)}' for first, line in zip(left.tolist(), drawn))])


def _letter(modality: np.ndarray) -> str:
    found = set(modality.tolist())
    return LETTERS[found.pop()] if len(found) == 1 else '*'
