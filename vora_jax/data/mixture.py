"""Which samples make an epoch."""
from typing import Sequence

import numpy as np

from vora_jax.types import Array


def epoch_samples(sizes: Sequence[int], weights: Sequence[float], seed: int) -> Array:
    """i64[n] sample numbers of one epoch, counted through all sources in order.

    A source of n samples and weight w gives round(w * n): whole repeats, and a subset drawn from the seed for
    the rest. A pure function of its arguments.
    """
    chosen, offset = [], 0
    for number, (size, weight) in enumerate(zip(sizes, weights)):
        repeats, rest = divmod(round(weight * size), size)
        subset = np.random.default_rng([seed, number]).choice(size, rest, replace=False)
        chosen += [np.tile(np.arange(size), repeats) + offset, np.sort(subset) + offset]
        offset += size
    return np.concatenate(chosen).astype(np.int64)
