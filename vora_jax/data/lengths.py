"""The length index: every sample, measured once.

Measuring a sample renders and tokenises its text and reads the headers of its pictures. The index keeps the size after each
turn, so that one index serves rows of any size: `fit` says how many turns a row of given budgets can take.
"""
import concurrent.futures
import contextlib
import hashlib
import json
import multiprocessing
import os
import pathlib
import shutil
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Callable, Iterable, Iterator, NamedTuple, Sequence

import numpy as np

from vora_jax.data.child_process import serve_parent
from vora_jax.data.packing import Budgets
from vora_jax.data.samples import Samples
from vora_jax.data.whole_file import write_whole
from vora_jax.types import Array, UserError

VERSION = 1
CHUNK = 4096  # samples a file while the index is being built: what an interruption can lose
LAST = 'reasons.json'  # written last: where it is, the index is complete


class Lengths(NamedTuple):
    """Sizes of all samples.

    first: i64[n + 1] row of `sizes` where each sample's turns begin.
    sizes: i32[T, 3] slots, patches and images of a sample up to and with a turn.
    reasons: why samples cannot be used, by number; they have no turns.
    """

    first: Array
    sizes: Array
    reasons: dict[int, str]


def fit(lengths: Lengths, budgets: Budgets) -> Array:
    """i32[n, 5] the part of each sample that fits a row: slots, patches, images, whole turns, and turns left out.

    A sample whose first turn does not fit has no turns, like one that cannot be read.
    """
    num_turns = np.diff(lengths.first)
    limits = np.array([budgets.slots, *((budgets.patches, budgets.images) if budgets.patch_dim else (0, 0))])
    # Sizes grow from turn to turn, so the turns that fit are the first ones.
    inside = np.concatenate([[0], np.cumsum((lengths.sizes <= limits).all(1))])
    kept = inside[lengths.first[1:]] - inside[lengths.first[:-1]]
    last = np.maximum(lengths.first[:-1] + kept - 1, 0)
    found = np.zeros((len(num_turns), 5), np.int32)
    if len(lengths.sizes):
        found[:, :3] = lengths.sizes[last] * (kept > 0)[:, None]
    found[:, 3], found[:, 4] = kept, num_turns - kept
    return found


def too_long(where: str, size: Sequence[int], budgets: Budgets) -> str:
    """The sentence about a sample whose first turn, of (slots, patches, images), does not fit a row."""
    return (f'{where}: the first turn needs (slots, patches, images) = {tuple(size)}, a row has {tuple(budgets[:3])}; raise '
            'the limits of Data or shorten the turn.')


def index_key(samples: Samples, settings: Any) -> str:
    """Hash of all that decides sizes: content of the sources, their pictures' folders, tokenizer, and `settings`."""
    parts = [VERSION, samples.content, [os.path.abspath(root) if '://' not in root else root for root in samples.roots],
             settings]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]


def build(samples: Samples, folder: pathlib.Path, progress: Callable[..., Iterable], workers: int = 0,
          turn: tuple[int, int] = (0, 1)) -> Lengths:
    """The index kept in `folder`; measures what is not there yet.

    It is written chunk by chunk. Processes that share the folder begin at different chunks and skip those they find, so they
    share the work without waiting for each other; an interrupted build goes on where it was.

    Args:
        samples: what to measure.
        folder: of this index, see `index_key`.
        progress: wraps an iterable to show progress; takes `desc`.
        workers: measuring processes; 0 measures in this one.
        turn: (index, count) of this process among those that share the folder.
    Raises:
        UserError: somebody removed the folder, it cannot be written, or a measuring process was killed.
    """
    ready = _read(folder)
    if ready is not None:
        return ready
    parts = folder / 'parts'
    parts.mkdir(parents=True, exist_ok=True)
    count = -(-len(samples) // CHUNK)
    start = turn[0] * count // turn[1]
    order = [(start + number) % count for number in range(count)]
    try:
        with _pool(samples, parts, workers) as measure:
            for _ in progress(measure(order), desc='measuring samples', total=count):
                pass
        found = _join(parts, folder, count)
    except FileNotFoundError:  # another run has removed the parts: it was faster, or has found the data unusable
        found = _read(folder)
    except BrokenProcessPool as error:
        raise UserError('a process that measures samples was killed, perhaps as the memory was full; give the same command '
                        'with fewer Train.workers: it goes on with what is missing.') from error
    except OSError as error:
        raise UserError(f'{folder} cannot be written ({error}); make room there, or set Data.cache to another '
                        'folder.') from error
    if found is None:
        raise UserError(f'{folder} was removed while samples were measured; start again.')
    if turn[1] == 1:  # others may still be at work
        shutil.rmtree(parts, ignore_errors=True)
    return found


def forget(folder: pathlib.Path) -> None:
    """The next `build` measures all samples anew."""
    (folder / LAST).unlink(missing_ok=True)
    shutil.rmtree(folder / 'parts', ignore_errors=True)


@contextlib.contextmanager
def _pool(samples: Samples, parts: pathlib.Path, workers: int) -> Iterator[Callable[[list[int]], Iterable[None]]]:
    """A function that measures chunks, in this process or in several."""
    if not workers:
        yield lambda order: (_measure(samples, parts, number) for number in order)
        return
    pool = concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context('spawn'), _start, (samples, parts))
    try:
        yield lambda order: pool.map(_measure_here, order)
    finally:
        pool.shutdown(cancel_futures=True)


_worker: list[Any] = []  # what a measuring process was started with


def _start(samples: Samples, parts: pathlib.Path) -> None:
    _worker[:] = samples, parts
    serve_parent()


def _measure_here(number: int) -> None:
    _measure(*_worker, number)


def _measure(samples: Samples, parts: pathlib.Path, number: int) -> None:
    """Writes one chunk, unless it is there."""
    path = parts / f'{number:06}.npz'
    if path.exists():
        return
    sizes, counts, reasons = [], [], {}
    for sample in range(number * CHUNK, min((number + 1) * CHUNK, len(samples))):
        try:
            found = samples.measure(sample)
        except UserError as error:
            found, reasons[sample] = [], str(error)
        sizes += found
        counts.append(len(found))
    stored = {'sizes': np.array(sizes, np.int32).reshape(-1, 3), 'counts': np.array(counts, np.int64),
              'reasons': np.frombuffer(json.dumps(reasons).encode(), np.uint8)}
    write_whole(path, lambda file: np.savez(file, **stored))


def _join(parts: pathlib.Path, folder: pathlib.Path, count: int) -> Lengths:
    sizes, counts, reasons = [], [np.zeros(1, np.int64)], {}
    for number in range(count):
        with np.load(parts / f'{number:06}.npz') as stored:
            sizes.append(stored['sizes'])
            counts.append(stored['counts'])
            reasons.update(json.loads(stored['reasons'].tobytes()))
    write_whole(folder / 'first.npy', lambda file: np.save(file, np.cumsum(np.concatenate(counts))))
    write_whole(folder / 'sizes.npy', lambda file: np.save(file, np.concatenate(sizes)))
    write_whole(folder / LAST, lambda file: file.write(json.dumps(reasons).encode()))
    return _read(folder)


def _read(folder: pathlib.Path) -> Lengths | None:
    if not (folder / LAST).exists():
        return None
    reasons = json.loads((folder / LAST).read_bytes())
    return Lengths(np.load(folder / 'first.npy', mmap_mode='r'), np.load(folder / 'sizes.npy', mmap_mode='r'),
                   {int(number): reason for number, reason in reasons.items()})
