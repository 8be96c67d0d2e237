"""One row of a run, or one sample, to look at."""
from collections.abc import Callable, Iterable

import numpy as np

from vora_jax.batch import Batch, Patches
from vora_jax.data.config import Data
from vora_jax.data.lengths import Lengths, fit, too_long
from vora_jax.data.loader import batches
from vora_jax.data.packing import layout
from vora_jax.data.samples import Samples
from vora_jax.method import VisionTokenRule
from vora_jax.types import UserError


def read_sample(data: Data, rule: VisionTokenRule | None, number: int) -> tuple[str, Batch]:
    """(what it is, row without its leading dimension) of one sample alone, cut to the turns that fit; no other is read.

    Args:
        data: the sources and budgets.
        rule: how pictures become slots.
        number: of the sample, counted through all sources.
    Raises:
        UserError: there is no such sample, it cannot be used, or its first turn does not fit a row.
    """
    samples = Samples(data, rule)
    if not 0 <= number < len(samples):
        raise UserError(f'there is no sample {number}: the sources of Data have samples 0 to {len(samples) - 1}.')
    sizes, where = samples.measure(number), samples.find(number).where
    kept, dropped = fit(Lengths(np.array([0, len(sizes)]), np.array(sizes), {}), samples.budgets)[0, 3:].tolist()
    if not kept:
        raise UserError(too_long(where, sizes[0], samples.budgets))
    segment, _ = samples.segment(number, kept)
    left_out = f'; the last {dropped} of its {len(sizes)} turns are left out' * bool(dropped)
    return f'sample {number}: {where}{left_out}', layout([segment], samples.budgets, rule=rule)


def read_row(data: Data, rule: VisionTokenRule | None, seed: int, number: int,
             progress: Callable[..., Iterable]) -> tuple[str, Batch]:
    """(what it is, row without its leading dimension) of a row of a run; measures all samples, unless `data.cache` has it.

    Args:
        data: the sources and budgets.
        rule: how pictures become slots.
        seed: of the run.
        number: of the row, counted through all epochs.
        progress: see `loader.batches`.
    Raises:
        UserError: the number is negative, or the data cannot be used.
    """
    if number < 0:
        raise UserError(f'there is no row {number}; rows are counted from 0.')
    loader = batches(data, rule, 1, seed, progress=progress)
    try:
        loader.set_state({'global_next_index': number})
        batch, names = next(loader), loader.where(number)
    finally:
        loader.close()
    patches = batch.patches and Patches(*(leaf[0] for leaf in batch.patches))
    row = Batch(*(leaf[0] for leaf in batch._replace(patches=[0])))._replace(patches=patches)
    placed, lost, dropped = row.tally.sum(0).tolist()
    left_out = f'; {lost} more cannot be used' * bool(lost) + f'; {dropped} turns are left out' * bool(dropped)
    plural = 's' * (placed != 1)
    title = f'row {number}: {placed} sample{plural}{left_out}'
    return '\n'.join([title, *(f'  {name}' for name in names)]), row
