"""Batches for training: packed, shuffled, endless, resumable.

The position in the data is one integer that means the same on every host and for any number of hosts.
"""
import hashlib
import json
import logging
import threading
import weakref
from typing import Any, Iterator

import grain
import numpy as np
from grain.experimental import ElasticIterator

from vora_jax.batch import Batch, Patches
from vora_jax.data.config import Data
from vora_jax.data.mixture import epoch_samples
from vora_jax.data.packing import layout, plan
from vora_jax.data.samples import Samples
from vora_jax.data.text.tokenizer import fingerprint
from vora_jax.method import VisionTokenRule
from vora_jax.types import UserError

log = logging.getLogger(__name__)


class Rows:
    """The rows of one epoch by number: a random-access source for grain. A row is a pure function of its
    number.

    A sample that cannot be used is left out of its row and counted in `bad_samples`; it is logged once.

    Attributes:
        warnings: one sentence for each bad sample met so far.
    """

    def __init__(self, samples: Samples, data: Data, seed: int):
        self._samples, self._max_bad = samples, data.max_bad_fraction
        self._bad: dict[int, str] = {}
        self._lock = threading.Lock()
        epoch = epoch_samples(samples.sizes, [source.weight for source in data.sources], seed)
        lengths = np.zeros((len(samples), 3), np.int64)
        for number in np.unique(epoch):
            try:
                lengths[number] = samples.measure(int(number))
            except UserError as error:
                self._note(int(number), str(error), check=False)
        if not len(epoch):
            raise UserError('the sources of Data give no sample with these weights; raise Source.weight.')
        self._total = len(np.unique(epoch))
        self._check_limit()
        # The plan rests on the sizes of the pictures: another size moves every sample.
        self.sizes_hash = hashlib.sha256(lengths[epoch].tobytes()).hexdigest()
        self._plan = [epoch[row] for row in plan(lengths[epoch], samples.budgets, seed, pack=data.pack)]

    @property
    def warnings(self) -> list[str]:
        with self._lock:
            return list(self._bad.values())

    def __len__(self) -> int:
        return len(self._plan)

    def __getitem__(self, number: int) -> Batch:
        segments, bad = [], 0
        for sample in self._plan[number].tolist():
            if sample not in self._bad:
                try:
                    segments.append(self._samples.segment(sample))
                    continue
                except UserError as error:
                    self._note(sample, str(error), check=True)
            bad += 1
        return layout(segments, self._samples.budgets, bad, self._samples.rule)

    def _note(self, sample: int, reason: str, check: bool) -> None:
        with self._lock:
            if sample in self._bad:
                return
            self._bad[sample] = reason
        log.warning('left out a sample: %s', reason)
        if check:
            self._check_limit()

    def _check_limit(self) -> None:
        bad, total = len(self._bad), self._total
        if bad > self._max_bad * total or bad == total:
            raise UserError(f'{bad} of {total} samples cannot be used, more than Data.max_bad_fraction = '
                            f'{self._max_bad:g} allows; repair the data, the first is '
                            f'{next(iter(self._bad.values()))}')

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, '_lock': None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())


class ShardOrder:
    """The same rows in the order grain deals them out in, so that shard i gets the i-th block of each batch.

    grain gives shard i the rows i, i + count, ... of a batch. Devices hold contiguous blocks, so that with
    blocks a global batch has the same rows in the same places for any number of processes.
    """

    def __init__(self, rows: grain.MapDataset, batch_rows: int, count: int):
        self._rows, self._batch_rows, self._count = rows, batch_rows, count

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, position: int) -> Batch:
        batch, place = divmod(position, self._batch_rows)
        turn, shard = divmod(place, self._count)
        return self._rows[batch * self._batch_rows + shard * (self._batch_rows // self._count) + turn]


class Loader:
    """An endless iterator of this shard's `Batch`es, see `batches`.

    Attributes:
        manifest: sha256 of the sources' rows, the sizes of their pictures and the tokenizer: equal ones
            and equal `Data` give equal batches, unless pictures were replaced by others of their size.
        num_samples: samples of all sources.
        vocab_size: ids the tokenizer can give.
        num_rows: rows of one epoch.
        warnings: one sentence for each bad sample met so far (with workers: only those found
            while measuring).
    """

    def __init__(self, rows: Rows, iterator: ElasticIterator, manifest: str, samples: Samples):
        self._rows, self._opened = rows, [iterator]
        # grain's iterators complain when they are still alive while Python takes its modules down.
        self._finalizer = weakref.finalize(self, _release, self._opened)
        self.manifest, self.num_samples, self.num_rows = manifest, len(samples), len(rows)
        self.vocab_size = samples.vocab_size

    @property
    def warnings(self) -> list[str]:
        return self._rows.warnings

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if not self._opened:
            raise StopIteration
        batch = next(self._opened[0])
        # Workers hand over views of shared memory, which must not outlive them.
        patches = batch.patches and Patches(*map(np.array, batch.patches))
        return Batch(*map(np.array, batch._replace(patches=0)))._replace(patches=patches)

    def get_state(self) -> dict[str, int]:
        """The position after the last batch: plain integers, the same on every shard."""
        return {name: int(value) for name, value in self._opened[0].get_state().items()}

    def set_state(self, state: dict[str, int]) -> None:
        """Continues at a position from `get_state`, also of another number of shards or workers."""
        self._opened[0].set_state(dict(state))

    def close(self) -> None:
        """Stops the reading threads and workers; there are no more batches."""
        self._finalizer()


def _release(opened: list[ElasticIterator]) -> None:
    while opened:
        opened.pop().close()


def batches(data: Data, rule: VisionTokenRule | None, batch_rows: int, seed: int,
            shard: tuple[int, int] = (0, 1), workers: int = 0) -> Loader:
    """Endless batches of `batch_rows / count` rows, this shard's block of each global batch.

    The rows are packed once and reshuffled every epoch.

    Args:
        data: sources, tokenizer, budgets.
        rule: how many slots a picture takes; None for a run without pictures (`Batch.patches` is None).
        batch_rows: rows of the global batch.
        seed: of mixture, packing and order; equal arguments give equal bytes.
        shard: (index, count) of this process; the shards' batches together are the global batch.
        workers: reading processes; 0 reads in threads of this process.
    Raises:
        UserError: a source or the tokenizer is missing or empty, or more samples are bad than allowed.
    """
    index, count = shard
    if batch_rows % count:
        raise UserError(f'Train.batch_rows = {batch_rows} cannot be divided among {count} processes; '
                        'choose a multiple.')
    samples = Samples(data, rule)
    rows = Rows(samples, data, seed)
    endless = grain.MapDataset.source(rows).seed(seed).shuffle().repeat()
    dataset = grain.MapDataset.source(ShardOrder(endless, batch_rows, count))
    options = None
    if workers:
        _mark_flags_parsed()
        options = grain.MultiprocessingOptions(num_workers=workers)
    iterator = ElasticIterator(
        dataset, batch_rows, grain.sharding.ShardOptions(index, count),
        read_options=grain.ReadOptions(num_threads=2, prefetch_buffer_size=4),
        multiprocessing_options=options)
    return Loader(rows, iterator, _manifest(samples, rows, data), samples)


def _manifest(samples: Samples, rows: Rows, data: Data) -> str:
    parts = [samples.hashes, rows.sizes_hash, fingerprint(data.tokenizer)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _mark_flags_parsed() -> None:
    """grain's worker processes refuse to start in a program that has not parsed absl's flags."""
    from absl import flags
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
