"""Packed rows drawn from a description, as far as attention sees them: which keys each query sees."""
import dataclasses
import re
from typing import NamedTuple

import numpy as np

from vora_jax.data.packing import Budgets, Picture, Text, layout, stack
from vora_jax.method import VisionTokenRule
from vora_jax.types import Array, KeyRange, UserError

# As many samples may fit nowhere, one after the other, before the rows count as full.
MAX_MISSES = 8

# The default description in the words of `parse`.
SAMPLES, CAPTION = '1x1024@.6, 2x256-1024@.2, text@.2', '16-512'


class Kind(NamedTuple):
    """A kind of sample: its images, each of `min_tokens` to `max_tokens` slots, and how often it is drawn."""

    weight: float
    images: int = 0
    min_tokens: int = 0
    max_tokens: int = 0


@dataclasses.dataclass(frozen=True)
class Description:
    """What the rows are made of. A sample is its images and then its caption, lengths uniform; rows take it first-fit.

    own_image_only: an image sees itself alone, not the text and images before it (then columns have gaps).
    """

    kinds: tuple[Kind, ...] = (Kind(0.6, 1, 1024, 1024), Kind(0.2, 2, 256, 1024), Kind(0.2))
    caption: tuple[int, int] = (16, 512)
    own_image_only: bool = False


class Drawn(NamedTuple):
    """key_range: i32[B, S] twice. segment_id: i32[B, S], 0 where a row is empty. samples: how many fit in."""

    key_range: KeyRange
    segment_id: Array
    samples: int


def draw(description: Description, rows: int, slots: int, seed: int) -> Drawn:
    """The rows; a pure function of the arguments.

    A stream of samples is packed first-fit: each goes to the first row with room, and is left out where none has.

    Example, one row "[img img] a b" and "[img] c": query ranges [0, 2) [0, 2) [0, 3) [0, 4), then [4, 5) [4, 6).

    Raises:
        UserError: no sample fits into a row.
    """
    rng = np.random.default_rng(seed)
    packed: list[list[list[Text | Picture]]] = [[] for _ in range(rows)]
    room, misses = np.full(rows, slots), 0
    while misses < MAX_MISSES:
        sample, length = _sample(description, rng)
        if (room < length).all():
            misses += 1
            continue
        row, misses = int((room >= length).argmax()), 0
        packed[row].append(sample)
        room[row] -= length
    if not any(packed):
        raise UserError(f'none of {MAX_MISSES} drawn samples fits into a row of {slots} slots; give more slots, or '
                        'samples with smaller images.')
    budgets = Budgets(slots, patches=slots, images=slots, patch_dim=1)
    batch = stack([layout(row, budgets, rule=VisionTokenRule(1)) for row in packed])
    start = batch.key_start.copy()
    if description.own_image_only:
        for of_row, slot, first_place in zip(start, batch.vision_slot, batch.patches.key_start):
            used = slot >= 0  # one place a token: places are numbered as vision tokens
            of_row[slot[used]] = slot[first_place[used]]
    return Drawn(KeyRange(start, batch.key_stop), batch.segment_id, sum(map(len, packed)))


def parse(kinds: str, caption: str, own_image_only: bool = False) -> Description:
    """The description in words: kinds `IMAGESxTOKENS@WEIGHT` or `text@WEIGHT` with commas between, caption `MIN-MAX`.

    Example: SAMPLES and CAPTION.

    Raises:
        UserError: what is not of that form, and where.
    """
    found = []
    for word in kinds.split(','):
        match = re.fullmatch(r'(?:text|(\d+)x(\d+)(?:-(\d+))?)@(\d*\.?\d+)', word.strip())
        if not match:
            raise UserError(f'--samples: {word.strip()!r} is not IMAGESxTOKENS@WEIGHT, such as 1x1024@.6 or 2x256-1024@.2, '
                            'and not text@WEIGHT.')
        images, low, high = (int(group or 0) for group in match.groups()[:3])
        high = high or low
        if match[1] and not (images and 0 < low <= high):
            raise UserError(f'--samples: {word.strip()!r} has no images or no tokens; give at least 1 of each, the smaller '
                            'number of tokens first.')
        found.append(Kind(float(match[4]), images, low, high))
    if not sum(kind.weight for kind in found):
        raise UserError(f'--samples: all weights of {kinds!r} are 0; give one above.')
    match = re.fullmatch(r'(\d+)(?:-(\d+))?', caption.strip())
    if not match or not 0 < int(match[1]) <= int(match[2] or match[1]):
        raise UserError(f'--caption: {caption!r} is not MIN-MAX tokens, such as 16-512.')
    return Description(tuple(found), (int(match[1]), int(match[2] or match[1])), own_image_only)


def _sample(description: Description, rng: np.random.Generator) -> tuple[list[Text | Picture], int]:
    weights = np.array([kind.weight for kind in description.kinds])
    kind = description.kinds[rng.choice(len(weights), p=weights / weights.sum())]
    images = [int(rng.integers(kind.min_tokens, kind.max_tokens + 1)) for _ in range(kind.images)]
    caption = int(rng.integers(description.caption[0], description.caption[1] + 1))
    pictures = [Picture(np.zeros((tokens, 1), np.uint8), 1, tokens) for tokens in images]
    return [*pictures, Text([1] * caption)], sum(images) + caption
