"""Which samples each row holds, epoch after epoch.

The plan of an epoch is a pure function of the lengths, the budgets, the seed and the epoch's number. Plans are kept in
files, so that worker processes share them and a resumed run need not repeat the past ones.
"""
import bisect
import json
import logging
import pathlib
import threading
from typing import Any, BinaryIO, Callable, NamedTuple, Sequence

import numpy as np

from vora_jax.data.mixture import epoch_samples
from vora_jax.data.packing import Budgets, plan
from vora_jax.data.whole_file import write_whole
from vora_jax.types import Array

log = logging.getLogger(__name__)

_OFTEN = 64  # epochs whose ends are stored at once; of many tiny epochs some are planned again by a resumed run
_KEPT = 2  # plans held open: rows are read ahead over the border of an epoch


class Padding(NamedTuple):
    """Shares of an epoch's rows that hold nothing: of their slots, and of their places for patches."""

    slots: float
    patches: float


class Epochs:
    """The rows of all epochs by number, as arrays of sample numbers. Endless, picklable, safe between threads.

    The files of a folder belong to one set of arguments: its name is to tell them.
    """

    def __init__(self, folder: pathlib.Path, sizes: Sequence[int], weights: Sequence[float], budgets: Budgets, seed: int,
                 pack: bool):
        """Needs `folder / 'lengths.npy'`, the result of `lengths.fit`.

        Args:
            folder: keeps the plans.
            sizes, weights: samples and weight of each source.
            budgets: sizes of a row.
            seed: of mixture and packing.
            pack: False gives each sample a row of its own.
        """
        self._folder, self._sizes, self._weights = folder, tuple(sizes), tuple(weights)
        self._budgets, self._seed, self._pack = budgets, seed, pack
        self.__setstate__({})

    @property
    def lengths(self) -> Array:
        """i32[n, 5] see `lengths.fit`."""
        if self._lengths is None:
            self._lengths = np.asarray(np.load(self._folder / 'lengths.npy', mmap_mode='r'))
        return self._lengths

    def num_rows(self, epoch: int) -> int:
        """Rows of an epoch."""
        with self._lock:
            return self._count(epoch)

    def num_samples(self, epoch: int) -> int:
        """Samples of an epoch."""
        with self._lock:
            return len(self._plan(epoch)[1])

    def find(self, number: int) -> tuple[int, int]:
        """(epoch, row in it) of row `number` of the endless sequence."""
        with self._lock:
            while not self._ends or number >= self._ends[-1]:
                self._count(len(self._ends))
            epoch = bisect.bisect_right(self._ends, number)
            return epoch, number - self._start(epoch)

    def __getitem__(self, number: int) -> Array:
        """i64[k] the samples of row `number` of the endless sequence."""
        epoch, row = self.find(number)
        with self._lock:
            starts, samples = self._plan(epoch)
        return samples[starts[row]:starts[row + 1]].astype(np.int64)

    def padding(self, epoch: int = 0) -> Padding:
        """What the epoch's plan leaves empty."""
        with self._lock:
            starts, samples = self._plan(epoch)
        used = self.lengths[samples, :2].sum(0, dtype=np.int64)
        rows = len(starts) - 1
        places = rows * self._budgets.patches if self._budgets.patch_dim else 0
        rooms = rows * self._budgets.slots, places
        return Padding(*(float(1 - some / room) if room else 0.0 for some, room in zip(used, rooms)))

    def _count(self, epoch: int) -> int:
        if epoch >= len(self._ends):
            self._ends = max(self._ends, self._stored_ends(), key=len)
        while epoch >= len(self._ends):
            new = len(self._ends)
            self._ends.append(self._start(new) + len(self._plan(new)[0]) - 1)
            if new >= self._unstored:
                self._unstored = new + 1 + new // _OFTEN
                text = json.dumps(max(self._ends, self._stored_ends(), key=len))
                self._keep(self._folder / 'ends.json', lambda file: file.write(text.encode()))
        return self._ends[epoch] - self._start(epoch)

    def _start(self, epoch: int) -> int:
        return self._ends[epoch - 1] if epoch else 0

    def _stored_ends(self) -> list[int]:
        """Where the first epochs end in the sequence of rows, as far as any process has planned them."""
        path = self._folder / 'ends.json'
        return json.loads(path.read_bytes()) if path.exists() else []

    def _plan(self, epoch: int) -> tuple[Array, Array]:
        """(i64[rows + 1] where rows start, i32|i64[n] samples of all rows)."""
        if epoch not in self._plans:
            stored = self._load(epoch)
            rows = int(stored[0])
            while len(self._plans) >= _KEPT:
                self._plans.pop(min(self._plans))
            self._plans[epoch] = np.array(stored[1:rows + 2], np.int64), stored[rows + 2:]
        return self._plans[epoch]

    def _load(self, epoch: int) -> Array:
        while True:
            try:
                return np.asarray(np.load(self._path(epoch), mmap_mode='r'))
            except FileNotFoundError:  # not made yet, or removed by a process that is further on
                stored = self._make(epoch)
                if not self._keep(self._path(epoch), lambda file: np.save(file, stored)):
                    return stored
                self._remove_before(epoch - _KEPT)

    def _make(self, epoch: int) -> Array:
        samples = epoch_samples(self._sizes, self._weights, self._seed, epoch)
        rows = plan(self.lengths[samples, :3], self._budgets, (self._seed, epoch), pack=self._pack)
        small = max(sum(self._sizes), len(samples)) < 1 << 31
        stored = np.concatenate([[len(rows.starts) - 1], rows.starts, samples[rows.samples]])
        return stored.astype(np.int32 if small else np.int64)

    def _keep(self, path: pathlib.Path, write: Callable[[BinaryIO], Any]) -> bool:
        """Writes a file, and says whether that was possible: training goes on without it."""
        try:
            write_whole(path, write)
        except FileNotFoundError:  # the folder was removed, perhaps as the loader was closed while threads still read
            return False
        except OSError as error:
            if not self._warned:
                log.warning('%s cannot be written (%s); the rows are planned again next time.', path, error)
            self._warned = True
            return False
        return True

    def _remove_before(self, epoch: int) -> None:
        """Removes the plans of earlier epochs; where they end stays in ends.json."""
        for path in self._folder.glob('plan-*.npy'):
            if int(path.stem.removeprefix('plan-')) < epoch:
                path.unlink(missing_ok=True)

    def _path(self, epoch: int) -> pathlib.Path:
        return self._folder / f'plan-{epoch:05}.npy'

    def __getstate__(self) -> dict[str, Any]:
        own = '_lock', '_plans', '_lengths', '_unstored', '_warned'  # of this process
        state = {name: value for name, value in self.__dict__.items() if name not in own}
        return {**state, '_ends': list(self._ends)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({'_ends': []} | state, _lock=threading.Lock(), _plans={}, _lengths=None, _unstored=0,
                             _warned=False)
