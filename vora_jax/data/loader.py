"""Batches for training: packed, shuffled, endless, resumable.

The position in the data is one integer that means the same on every host and for any number of hosts and workers.
"""
import dataclasses
import hashlib
import json
import os
import pathlib
import sys
import tempfile
import weakref
from typing import Any, Callable, Iterable, Iterator

import grain
import numpy as np
from grain.experimental import ElasticIterator

from vora_jax.batch import Batch, Patches
from vora_jax.data import lengths
from vora_jax.data.child_process import serve_parent
from vora_jax.data.config import Data
from vora_jax.data.epochs import Epochs
from vora_jax.data.quarantine import Quarantine
from vora_jax.data.rows import Rows
from vora_jax.data.samples import CACHE_BYTES, Samples
from vora_jax.data.whole_file import write_whole
from vora_jax.method import VisionTokenRule
from vora_jax.types import UserError

POSITION = 'global_next_index'  # grain's name for it
MAX_THREADS = 8  # that read where no worker processes do: decoding lets others run, the rest does not
ORDER_VERSION = 2  # of how samples, rows and batches follow from Data and a seed


class Blocks:
    """The global batches cut into one block of rows for each shard, in the order grain deals them out in.

    Devices hold contiguous blocks, so that a global batch has the same rows in the same places for any number of
    processes. For grain a block is one element: it need not copy rows into batches.
    """

    def __init__(self, rows: Rows, batch_rows: int, count: int):
        self._rows, self._size, self._count = rows, batch_rows // count, count

    def __len__(self) -> int:
        return sys.maxsize // self._size // self._count * self._count  # endless

    def __getitem__(self, number: int) -> Batch:
        return self._rows.batch(number * self._size, self._size)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        serve_parent(through_sigterm=True)  # what grain sends to its worker processes before they read


class Loader:
    """An endless iterator of this shard's `Batch`es, see `batches`.

    Attributes:
        manifest: sha256 of the sources' rows, the sizes of their pictures, the tokenizer and the version of the order:
            equal ones and equal `Data` give equal batches, unless pictures were replaced by others of their size.
        num_samples, epoch_samples: samples of all sources; those of the first epoch.
        source_names: a name for each source, in the order of `Batch.tally`.
        vocab_size: ids the tokenizer can give.
        num_rows: rows of the first epoch.
        padding: what the plan of the first epoch leaves empty.
        max_patches_hint: a patch budget that fits the slots, see `Rows.fitting_patches`.
    """

    def __init__(self, rows: Rows, iterator: ElasticIterator, manifest: str, samples: Samples, block_rows: int,
                 copies: bool, folder: tempfile.TemporaryDirectory | None):
        self._rows, self._opened, self._block_rows, self._copies = rows, [iterator], block_rows, copies
        # grain's iterators complain when they are still alive while Python takes its modules down.
        self._finalizer = weakref.finalize(self, _release, self._opened, folder)
        self.manifest, self.num_samples, self.num_rows = manifest, len(samples), rows.num_rows(0)
        self.epoch_samples = rows.num_samples(0)
        self.source_names, self.vocab_size = samples.names, samples.vocab_size
        self.padding, self.max_patches_hint = rows.padding(), rows.fitting_patches()

    @property
    def warnings(self) -> list[str]:
        """One sentence for each bad sample met so far on this host."""
        return self._rows.warnings

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if not self._opened:
            raise StopIteration
        try:
            batch = next(self._opened[0])
        except RuntimeError as error:
            if 'terminated unexpectedly' not in str(error):  # grain's words about a killed process
                raise
            raise UserError('a process that reads data was killed, perhaps as the memory was full; give the run fewer '
                            'Train.workers.') from error
        # Each leaf has one more dimension: grain's batch of one block. Workers hand over views of shared memory, which must
        # not outlive them.
        take = (lambda leaf: np.array(leaf[0])) if self._copies else (lambda leaf: leaf[0])
        patches = batch.patches and Patches(*map(take, batch.patches))
        return Batch(*map(take, batch._replace(patches=[0])))._replace(patches=patches)

    def where(self, row: int) -> list[str]:
        """File and row of each sample of a row, counted through all epochs."""
        return self._rows.where(row)

    def epoch(self, state: dict[str, int]) -> float:
        """Epochs that end at a position from `get_state`: 1.5 is the middle of the second."""
        epoch, row = self._rows.find(state[POSITION])
        return epoch + row / self._rows.num_rows(epoch)

    def get_state(self) -> dict[str, int]:
        """The position after the last batch: rows of the global sequence, the same on every shard."""
        (blocks,) = self._opened[0].get_state().values()
        return {POSITION: int(blocks) * self._block_rows}

    def set_state(self, state: dict[str, int]) -> None:
        """Continues at a position from `get_state`, also of another number of shards or workers."""
        self._opened[0].set_state({POSITION: state[POSITION] // self._block_rows})

    def close(self) -> None:
        """Stops the reading threads and workers; there are no more batches."""
        self._finalizer()


def _release(opened: list[ElasticIterator], folder: tempfile.TemporaryDirectory | None) -> None:
    while opened:
        opened.pop().close()
    if folder is not None:
        folder.cleanup()


def batches(data: Data, rule: VisionTokenRule | None, batch_rows: int, seed: int,
            shard: tuple[int, int] = (0, 1), workers: int = 0, *, process: tuple[int, int] | None = None,
            quarantine: str = '', cache: str = '', cache_bytes: int = CACHE_BYTES,
            progress: Callable[..., Iterable] = lambda steps, **_: steps) -> Loader:
    """Endless batches of `batch_rows / count` rows, this shard's block of each global batch.

    Each epoch is packed anew.

    Args:
        data: sources, tokenizer, budgets.
        rule: how many slots a picture takes; None for a run without pictures (`Batch.patches` is None).
        batch_rows: rows of the global batch.
        seed: of mixture, packing and order; equal arguments give equal bytes.
        shard: (index, count) of the share to read; the shares' batches together are the global batch.
        workers: reading processes; 0 reads in threads of this process.
        process: (index, count) of this process, where several read one share; default: `shard`.
        quarantine: file for the samples that cannot be used; '' writes none.
        cache: folder for indices and plans where `data.cache` names none; '' keeps them as long as the loader.
        cache_bytes: most bytes of patches that each process keeps for their next use.
        progress: wraps an iterable to show the progress of measuring; takes `desc` and `total`.
    Raises:
        UserError: a source or the tokenizer is missing or empty, or more samples are bad than allowed.
    """
    index, count = shard
    if batch_rows % count:
        raise UserError(f'Train.batch_rows = {batch_rows} cannot be divided among {count} processes; '
                        'choose a multiple.')
    kept = data.cache or cache
    temporary = None if kept else tempfile.TemporaryDirectory(prefix='vora-data-', ignore_cleanup_errors=True)
    folder = pathlib.Path(kept or temporary.name)
    samples = Samples(data, rule, kept, cache_bytes // max(workers, 1))
    rows, sizes_hash = _rows(samples, data, seed, folder, Quarantine(quarantine), progress, workers,
                             process or shard)
    dataset = grain.MapDataset.source(Blocks(rows, batch_rows, count))
    options = None
    if workers:
        _mark_flags_parsed()
        options = grain.MultiprocessingOptions(num_workers=workers)
    threads = 2 if workers else min(MAX_THREADS, max(2, os.cpu_count() or 2))
    iterator = ElasticIterator(
        dataset, count, grain.sharding.ShardOptions(index, count),
        read_options=grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads),
        multiprocessing_options=options)
    return Loader(rows, iterator, _manifest(samples, sizes_hash), samples, batch_rows // count, bool(workers), temporary)


def _rows(samples: Samples, data: Data, seed: int, folder: pathlib.Path, quarantine: Quarantine,
          progress: Callable[..., Iterable], workers: int, process: tuple[int, int]) -> tuple[Rows, str]:
    """The rows and a hash of all sizes, after measuring what the folder does not know."""
    weights = [source.weight for source in data.sources]
    if sum(size * weight for size, weight in zip(samples.sizes, weights)) < 1:  # an epoch of nothing would never end
        raise UserError('the sources of Data give no sample with these weights; raise Source.weight.')
    rule = samples.rule and dataclasses.asdict(samples.rule)
    sizes = [data.template, dataclasses.asdict(data.image_policy), rule, data.video_frames,
             data.cut_first_turn and data.max_slots]
    key = lengths.index_key(samples, sizes)
    _make(folder)
    measured = folder / f'lengths-{key}'
    index = lengths.build(samples, measured, progress, workers, process)
    fitted = lengths.fit(index, samples.budgets)
    sizes_hash = hashlib.sha256(fitted).hexdigest()
    # Of what was measured, not of what the data are said to be: plans do not outlive an index that is made anew.
    plans = hashlib.sha256(json.dumps(
        [ORDER_VERSION, sizes_hash, samples.sizes, weights, samples.budgets, seed, data.pack]).encode()).hexdigest()[:20]
    plans = folder / f'plans-{plans}'
    _make(plans)
    if not (plans / 'lengths.npy').exists():
        try:
            write_whole(plans / 'lengths.npy', lambda file: np.save(file, fitted))
        except OSError as error:
            raise UserError(f'{plans} cannot be written ({error}); make room there, or set Data.cache to another '
                            'folder.') from error
    epochs = Epochs(plans, samples.sizes, weights, samples.budgets, seed, data.pack)
    rows = Rows(samples, epochs, quarantine, data.max_bad_fraction, judges=process[1] == 1)
    try:
        rows.note_measured(index)
    except UserError:  # the user may repair pictures, of which the name of this folder knows nothing
        lengths.forget(measured)
        raise
    return rows, sizes_hash


def _make(folder: pathlib.Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f'{folder} cannot be made for the index of the data ({error.strerror}); set Data.cache to a folder '
                        'that can be written.') from error


def _manifest(samples: Samples, sizes_hash: str) -> str:
    parts = [ORDER_VERSION, samples.content, sizes_hash]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _mark_flags_parsed() -> None:
    """grain's worker processes refuse to start in a program that has not parsed absl's flags."""
    from absl import flags
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
