"""Which samples make an epoch."""
from typing import Sequence

import numpy as np

from vora_jax.types import Array


def epoch_samples(sizes: Sequence[int], weights: Sequence[float], seed: int, epoch: int = 0) -> Array:
    """i64[n] sample numbers of an epoch, counted through all sources in order.

    A source of n samples and weight w gives about w * n of them an epoch. They are dealt out like cards: it is shuffled anew
    whenever all its samples were given, so at any time no sample was seen twice more often than another. With weight 0.5 the
    second epoch sees the half that the first left out. A pure function of its arguments.
    """
    chosen, offset = [], 0
    for number, (size, weight) in enumerate(zip(sizes, weights)):
        start, stop = round(weight * size * epoch), round(weight * size * (epoch + 1))
        while start < stop:
            deck, begin = divmod(start, size)
            end = min(size, begin + stop - start)
            cards = np.arange(size)
            if end - begin < size:  # a whole deck needs no shuffling: the plan shuffles
                cards = np.random.default_rng([seed, number, deck]).permutation(size)
            chosen.append(np.sort(cards[begin:end]) + offset)
            start += end - begin
        offset += size
    return np.concatenate([np.zeros(0, np.int64), *chosen]).astype(np.int64)
