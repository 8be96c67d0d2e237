"""Aliases, modality codes and the shape letters used everywhere.

Shape letters in docstrings and comments:

    B batch (rows)      S slots in a row     T query slots       V vocabulary    L layers
    D model width       F mlp width          N query heads       K key/value heads
    G = N // K          H head dim           P patches in a row  C vision width
    R adapter rank      M images in a row    Q vision tokens in a row
"""
from typing import Any, Literal, NamedTuple

Array = Any  # numpy.ndarray on the host, jax.Array on the device
Params = Any  # a nested dict of arrays

# What a slot of a row holds (Batch.modality). A ROUTE slot tells adapters what kind of segment it begins.
PAD, TEXT, VISION, ROUTE = 0, 1, 2, 3

Scope = Literal['all', 'vision', 'text']


class KeyRange(NamedTuple):
    """The contiguous keys each query sees: `start[q] <= k < stop[q]`.

    start: i32[B, T] first visible key slot.
    stop: i32[B, T] one past the last visible key slot; `stop <= start` (padding) sees nothing.

    Example, one row "a b [img img] c" followed by a pad slot:

        query   start stop   keys 0 1 2 3 4 5
        a         0    1          x . . . . .
        b         0    2          x x . . . .
        img       0    4          x x x x . .
        img       0    4          x x x x . .
        c         0    5          x x x x x .
        pad       0    0          . . . . . .
    """

    start: Array
    stop: Array


RETRY = 75  # exit code: nothing was wrong with what the user asked for; the same command may be tried again


class UserError(ValueError):
    """A user's mistake, told in one sentence: what, where, what to do. The command line prints it without traceback."""


class TryAgain(Exception):
    """Trouble of machines, networks or disks that nobody may have to mend, told in one sentence: the same command may be
    tried again. The command line prints it without traceback, and ends with the exit code `RETRY`."""
