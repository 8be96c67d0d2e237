"""The length index: what fits, and a build that any number of processes start, interrupt and finish."""
import collections
import concurrent.futures
import multiprocessing
import os
import shutil
import threading

import numpy as np
import pytest

from vora_jax.data import lengths
from vora_jax.data.lengths import Lengths, build, fit, forget
from vora_jax.data.packing import Budgets
from vora_jax.types import UserError

COUNT = 37


def made_up_turns(rng):
    """Sizes after each turn of a sample, which grow."""
    grown = np.stack([rng.integers(1, 20, 5), rng.integers(0, 9, 5) * rng.integers(0, 2, 5), rng.integers(0, 2, 5)], 1)
    return np.cumsum(grown[:rng.integers(0, 6)], 0).tolist()


@pytest.mark.parametrize('seed', range(20))
def test_what_fits_equals_a_plain_loop(seed):
    rng = np.random.default_rng(seed)
    turns = [made_up_turns(rng) for _ in range(rng.integers(1, 60))]
    slots, patches, images = (int(rng.integers(low, high)) for low, high in ((5, 70), (1, 40), (1, 5)))
    for limits in ((slots, patches, images, 12), (slots,), (1000, 1000, 1000, 12), (1, 1, 1, 12)):
        budgets = Budgets(*limits)
        room = budgets[:3] if budgets.patch_dim else (slots, 0, 0)
        expected = []
        for sample in turns:
            kept, last = 0, (0, 0, 0)
            for size in sample:
                if any(need > most for need, most in zip(size, room)):
                    break
                kept, last = kept + 1, tuple(size)
            expected.append((*last, kept, len(sample) - kept))
        first = np.cumsum([0, *map(len, turns)])
        sizes = np.array([size for sample in turns for size in sample], np.int32).reshape(-1, 3)
        np.testing.assert_array_equal(fit(Lengths(first, sizes, {}), budgets), expected)


class MadeUp:
    """Samples whose sizes follow from their numbers; every seventh cannot be read. `stop` is called before each."""

    def __init__(self, count=COUNT, stop=None):
        self.count, self.stop, self.measured = count, stop or str, collections.Counter()

    def __len__(self):
        return self.count

    def measure(self, number):
        self.stop(number)
        self.measured[number] += 1
        if number % 7 == 3:
            raise UserError(f'sample {number} is "bad", 東京.')
        return [(number + turn, turn, 1) for turn in range(number % 4 + 1)]


def assert_whole(found, count=COUNT):
    counts = [0 if number % 7 == 3 else number % 4 + 1 for number in range(count)]
    turns = [[(number + turn, turn, 1) for turn in range(turns)] for number, turns in enumerate(counts)]
    np.testing.assert_array_equal(found.first, np.cumsum([0, *map(len, turns)]))
    np.testing.assert_array_equal(found.sizes, [size for sample in turns for size in sample])
    assert found.sizes.dtype == np.int32
    assert found.reasons == {number: f'sample {number} is "bad", 東京.' for number in range(3, count, 7)}


def plainly(steps, **_):
    return steps


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(lengths, 'CHUNK', 5)


@pytest.mark.parametrize('count', [1, 4, 5, 6, COUNT])
def test_a_build_measures_once_and_is_kept(tmp_path, count):
    samples, told = MadeUp(count), []

    def progress(steps, desc, total):
        told.append((desc, total))
        return steps

    assert_whole(build(samples, tmp_path, progress), count)
    assert samples.measured == {number: 1 for number in range(count) if number % 7 != 3} | {n: 1 for n in range(3, count, 7)}
    assert told == [('measuring samples', -(-count // 5))]
    assert_whole(build(None, tmp_path, progress), count)  # nothing is measured again
    assert sorted(path.name for path in tmp_path.iterdir()) == ['first.npy', 'reasons.json', 'sizes.npy']


def test_an_interrupted_build_goes_on(tmp_path):
    def interrupt(number):
        if number == 23:
            raise KeyboardInterrupt

    first = MadeUp(stop=interrupt)
    with pytest.raises(KeyboardInterrupt):
        build(first, tmp_path, plainly)
    samples = MadeUp()
    assert_whole(build(samples, tmp_path, plainly))
    assert sorted(samples.measured) == list(range(20, COUNT)), 'the first four chunks were there'


@pytest.mark.parametrize('lost', ['000002.npz', '000007.npz', 'first.npy', 'sizes.npy'])
def test_a_build_lacks_a_file(tmp_path, lost):
    build(MadeUp(), tmp_path, plainly, turn=(0, 2))  # keeps its parts, for others
    (tmp_path / 'reasons.json').unlink()  # written last
    (tmp_path / lost if 'npy' in lost else tmp_path / 'parts' / lost).unlink()
    samples = MadeUp()
    assert_whole(build(samples, tmp_path, plainly))
    assert sum(samples.measured.values()) == {'000002.npz': 5, '000007.npz': 2}.get(lost, 0)


def die(number):
    if number == 9000:
        os._exit(9)


def build_and_die(folder):
    build(MadeUp(12000, die), folder, plainly)


@pytest.mark.slow
def test_a_killed_process_loses_a_chunk_at_most(tmp_path, monkeypatch):
    process = multiprocessing.get_context('spawn').Process(target=build_and_die, args=(tmp_path,))
    process.start()
    process.join(60)
    assert process.exitcode == 9
    monkeypatch.undo()  # the process had chunks of the usual size
    samples = MadeUp(12000)
    assert_whole(build(samples, tmp_path, plainly), 12000)
    assert min(samples.measured) == 8192


def test_measuring_processes(tmp_path, monkeypatch):
    monkeypatch.undo()
    assert_whole(build(MadeUp(12000), tmp_path, plainly, workers=2), 12000)


def fail(number):
    if number == 9000:
        raise RuntimeError('a bug')


@pytest.mark.slow
def test_a_bug_in_a_measuring_process_is_not_kept_quiet(tmp_path, monkeypatch):
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match='a bug'):
        build(MadeUp(12000, fail), tmp_path, plainly, workers=2)
    assert not (tmp_path / 'reasons.json').exists()


@pytest.mark.parametrize('turn', [(0, 3), (1, 3), (2, 3)])
def test_each_process_begins_elsewhere(tmp_path, turn):
    samples = MadeUp()
    assert_whole(build(samples, tmp_path, plainly, turn=turn))
    assert next(iter(samples.measured)) == turn[0] * 8 // 3 * 5


@pytest.mark.parametrize('processes', [2, 4])
def test_processes_that_share_a_folder_share_the_work(tmp_path, processes):
    barrier, all_samples = threading.Barrier(processes), [MadeUp(200) for _ in range(processes)]

    def run(index):
        barrier.wait()
        return build(all_samples[index], tmp_path, plainly, turn=(index, processes))

    with concurrent.futures.ThreadPoolExecutor(processes) as pool:
        for found in pool.map(run, range(processes)):
            assert_whole(found, 200)
    assert set().union(*(samples.measured for samples in all_samples)) == set(range(200))


def test_another_run_is_faster(tmp_path):
    """It finishes the index and removes the parts while this one measures."""
    def overtake(number):
        if number == 23:
            assert_whole(build(MadeUp(), tmp_path, plainly))

    assert_whole(build(MadeUp(stop=overtake), tmp_path, plainly))


def test_parts_removed_for_no_reason_are_no_secret(tmp_path):
    def remove(number):
        if number == 23:
            shutil.rmtree(tmp_path / 'parts')

    with pytest.raises(UserError, match='was removed while samples were measured'):
        build(MadeUp(stop=remove), tmp_path, plainly)


@pytest.mark.parametrize('turn', [(0, 1), (0, 2)])
def test_a_forgotten_index_is_measured_anew(tmp_path, turn):
    build(MadeUp(), tmp_path, plainly, turn=turn)
    forget(tmp_path)
    samples = MadeUp()
    assert_whole(build(samples, tmp_path, plainly, turn=turn))
    assert len(samples.measured) == COUNT
    forget(tmp_path / 'nothing')
