"""A row of slots as readable text."""
from typing import NamedTuple

import numpy as np

from vora_jax.batch import Batch
from vora_jax.data.text.tokenizer import Tokenizer
from vora_jax.method import VisionTokenRule
from vora_jax.types import PAD, ROUTE, TEXT, VISION, Array

KINDS = {PAD: 'pad', TEXT: 'text', VISION: 'vision', ROUTE: 'route'}
WIDTH = 90  # characters of text in a line


class Run(NamedTuple):
    """Slots next to each other that hold the same kind of thing.

    segment: number of the sample in its row, from 1; 0 is padding.    kind: `types.PAD`, `TEXT`, `VISION` or `ROUTE`.
    first, size: slots.    learned: their tokens are targets.    picture: number in the row of the picture they show, or -1.
    """

    segment: int
    kind: int
    first: int
    size: int
    learned: bool
    picture: int


def find_runs(row: Batch, rule: VisionTokenRule | None) -> list[Run]:
    """The runs of a row (a `Batch` without its leading dimension), in order; together they are all its slots."""
    learned = np.concatenate([[False], row.loss_mask[:-1] > 0])
    columns = row.segment_id, row.modality, learned, _picture_of_slots(row, rule)
    starts = np.flatnonzero(np.concatenate([[True], np.any([np.diff(column) != 0 for column in columns], 0)]))
    stops = [*starts[1:].tolist(), len(learned)]
    return [Run(int(row.segment_id[first]), int(row.modality[first]), first, stop - first, bool(learned[first]),
                int(columns[3][first])) for first, stop in zip(starts.tolist(), stops)]


def tell_row(row: Batch, rule: VisionTokenRule | None, tokenizer: Tokenizer) -> str:
    """What the model sees of a row: how full it is, and a table of its runs; what is learned stands in [[ ]]."""
    lines = [*_tell_budgets(row), '', 'sample  kind     slot  slots  content (learned text in [[ ]])']
    for run in find_runs(row, rule):
        slots = slice(run.first, run.first + run.size)
        content = ''
        if run.kind == TEXT:
            content = escaped(tokenizer.decode(row.tokens[slots].tolist()))
            content = f'[[{content}]]' if run.learned else content
        elif run.kind == VISION:
            rows, cols = row.patches.grid[run.picture].tolist()
            content = f'picture {run.picture}: {rows} x {cols} patches'
        elif run.kind == ROUTE:
            content = 'with pictures' if row.tokens[run.first] else 'text alone'
        start = f'{run.segment or "":>6}  {KINDS[run.kind]:<7}{run.first:>6}{run.size:>7}  '
        parts = [content[place:place + WIDTH] for place in range(0, len(content), WIDTH)] or ['']
        lines += [f'{lead}{part}'.rstrip() for lead, part in zip([start] + [' ' * len(start)] * len(parts), parts)]
    return '\n'.join(lines)


def escaped(text: str) -> str:
    """The text on one line: line breaks and what cannot be printed as escapes."""
    return ''.join(letter if letter.isprintable() else letter.encode('unicode_escape').decode() for letter in text)


def _tell_budgets(row: Batch) -> list[str]:
    counts = [('slots', int((row.segment_id > 0).sum()), row.segment_id.size)]
    if row.patches is not None:
        counts += [('patches', int((row.patches.image_id >= 0).sum()), row.patches.image_id.size),
                   ('pictures', int((row.patches.grid[:, 0] > 0).sum()), len(row.patches.grid))]
    lines = [f'{name:<9}{used:>6} of {size:>6}, {1 - used / max(size, 1):.1%} padding' for name, used, size in counts]
    samples, learned = int(row.segment_id.max()), int((row.loss_mask > 0).sum())
    return [f'{"samples":<9}{samples:>6}', *lines, f'{"learned":<9}{learned:>6} slots']


def _picture_of_slots(row: Batch, rule: VisionTokenRule | None) -> Array:
    """i64[S] number of the picture that each slot shows; -1 where it shows none."""
    pictures = np.full(row.segment_id.size, -1)
    if row.patches is not None and rule is not None:
        used = row.vision_slot >= 0
        source = row.vision_source[used] // rule.tokens_per_place
        pictures[row.vision_slot[used]] = source if rule.select == 'cls' else row.patches.image_id[source]
    return pictures
