"""Parts of an array that lies in a file.

Read into fresh memory with `preadv`; a mapped file's pages would count as resident.
"""
import math
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from vora_jax.types import UserError

Bounds = Sequence[tuple[int, int]]  # start, stop of each dimension

_PIECE_BYTES = 8 << 20  # of rows that are read whole and then cut: the memory beyond the result
_LONG_RUN_BYTES = 64 << 10  # runs of at least this are read straight to their place
_CALL_BYTES = 1 << 30  # one call reads at most 2 GiB


def part_bounds(name: str, shape: tuple[int, ...], index: tuple[slice, ...]) -> list[tuple[int, int]]:
    """(start, stop) of every dimension; those beyond `index` are whole.

    Raises:
        ValueError: a step other than 1, or more slices than dimensions.
    """
    if len(index) > len(shape):
        raise ValueError(f'{name}: {len(index)} slices for {len(shape)} dimensions')
    bounds = [part.indices(size) for part, size in zip(index, shape)]
    if any(step != 1 for *_, step in bounds):
        raise ValueError(f'{name}: slices must have step 1')
    return [(start, max(start, stop)) for start, stop, _ in bounds] + [(0, size) for size in shape[len(index):]]


def read_part(descriptor: int, file: pathlib.Path, start: int, shape: tuple[int, ...], dtype: np.dtype,
              bounds: Bounds) -> np.ndarray:
    """A new C-contiguous array.

    Args:
        descriptor: of the open file.    file: its name, for messages.
        start: the place of the array's first byte.    shape, dtype: of the whole array, in C order.
        bounds: the part.

    Raises:
        UserError: the file cannot be read, or is too short.
    """
    out = np.empty([stop - first for first, stop in bounds], dtype)
    if out.size:
        # As bytes, with one more dimension: NumPy copies those of any dtype alike.
        width = dtype.itemsize
        _fill(out.reshape(-1).view(np.uint8).reshape(*out.shape, width), descriptor, file, start, (*shape, width),
              (*bounds, (0, width)))
    return out


def _fill(out: np.ndarray, descriptor: int, file: pathlib.Path, start: int, shape: tuple[int, ...],
          bounds: Bounds) -> None:
    """Fills `out`, u8 and C-contiguous, with a part of an array of bytes."""
    row_bytes = math.prod(shape[1:])
    first, stop = bounds[0]
    partial = [dim for dim, (low, high) in enumerate(bounds) if dim and high - low != shape[dim]]
    if not partial:
        _read_run(out, descriptor, file, start + first * row_bytes)
        return
    low, high = bounds[partial[-1]]
    run_bytes = (high - low) * math.prod(shape[partial[-1] + 1:])
    if run_bytes >= _LONG_RUN_BYTES or row_bytes > _PIECE_BYTES:
        for row in range(first, stop):
            _fill(out[row - first], descriptor, file, start + row * row_bytes, shape[1:], bounds[1:])
        return
    num_rows = min(_PIECE_BYTES // row_bytes, stop - first)
    piece = np.empty((num_rows, *shape[1:]), np.uint8)
    cut = tuple(slice(*bound) for bound in bounds[1:])
    for row in range(first, stop, num_rows):
        rows = piece[:stop - row]
        _read_run(rows, descriptor, file, start + row * row_bytes)
        out[row - first:row - first + len(rows)] = rows[:, *cut]


def _read_run(out: np.ndarray, descriptor: int, file: pathlib.Path, start: int) -> None:
    view, done = memoryview(out.reshape(-1)), 0
    while done < len(view):
        try:
            count = os.preadv(descriptor, [view[done:done + _CALL_BYTES]], start + done)
        except OSError as error:
            raise UserError(f'{file} cannot be read ({error.strerror}); check the disk it is on.') from error
        if not count:
            raise UserError(f'{file} has become shorter since it was opened; write or download it again.')
        done += count
