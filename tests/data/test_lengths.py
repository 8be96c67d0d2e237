"""The length index: what fits, and a build that any number of processes start, interrupt and finish."""
import collections
import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import pathlib
import shutil
import threading

import numpy as np
import pytest
from generated_set import RULE, made_up_rows, mixed, write_picture, write_pictures, write_rows, write_tokenizer

from vora_jax.data import lengths
from vora_jax.data.config import Data, ImagePolicy, Source
from vora_jax.data.lengths import Lengths, build, fit
from vora_jax.data.loader import batches
from vora_jax.data.packing import Budgets
from vora_jax.data.samples import Samples
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
    for budgets in (Budgets(slots, patches, images, 12), Budgets(slots), Budgets(1000, 1000, 1000, 12), Budgets(1, 1, 1, 12)):
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
    turns = [[] if number % 7 == 3 else [(number + turn, turn, 1) for turn in range(number % 4 + 1)] for number in range(count)]
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

    with pytest.raises(FileNotFoundError):
        build(MadeUp(stop=remove), tmp_path, plainly)


# What the index depends on.


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return mixed(tmp_path_factory.mktemp('mixed'), 12)


def key_of(data, cache, rule=RULE, seed=0):
    """Name of the index that a run with this data uses, of those in the folder `cache`."""
    before = {path: path.stat().st_mtime_ns for path in pathlib.Path(cache).glob('lengths-*')}
    batches(data, rule, 2, seed, cache=str(cache)).close()
    after = {path: path.stat().st_mtime_ns for path in pathlib.Path(cache).glob('lengths-*')}
    new = after.keys() - before.keys()
    assert len(new) <= 1
    return new.pop().name if new else None


def with_policy(data, **changes):
    return dataclasses.replace(data, image=dataclasses.replace(data.image, **changes))


def test_budgets_weights_packing_and_seed_use_the_same_index(data, tmp_path, monkeypatch):
    assert key_of(data, tmp_path)
    monkeypatch.setattr(Samples, 'measure', None)
    sources = tuple(dataclasses.replace(source, weight=0.7) for source in data.sources)
    for other in (dataclasses.replace(data, max_slots=300), dataclasses.replace(data, max_patches=100, max_images=9),
                  dataclasses.replace(data, pack=False), dataclasses.replace(data, sources=sources, max_bad_fraction=0.2)):
        assert key_of(other, tmp_path) is None
    assert key_of(data, tmp_path, seed=7) is None


def test_all_else_needs_another_index(data, tmp_path):
    folder = tmp_path / 'copy'
    shutil.copytree(pathlib.Path(data.tokenizer).parent, folder)
    copied = [dataclasses.replace(source, path=source.path.replace(str(pathlib.Path(source.path).parent), str(folder)))
              for source in data.sources]
    changed = dataclasses.replace(data, sources=tuple(copied))
    found = [
        key_of(data, tmp_path),
        key_of(dataclasses.replace(data, template='plain'), tmp_path),
        key_of(dataclasses.replace(data, video_frames=3), tmp_path),
        key_of(with_policy(data, max_patches=20), tmp_path),
        key_of(with_policy(data, kind='square_pad', side=24), tmp_path),
        key_of(data, tmp_path, rule=dataclasses.replace(RULE, pool=2)),
        key_of(data, tmp_path, rule=dataclasses.replace(RULE, patch_size=16)),
        key_of(data, tmp_path, rule=dataclasses.replace(RULE, route_token=True)),
        key_of(dataclasses.replace(data, sources=data.sources[::-1]), tmp_path),
        key_of(dataclasses.replace(data, sources=data.sources[:2]), tmp_path),
    ]
    assert key_of(changed, tmp_path) is None, 'content decides, not the name'
    rows = pathlib.Path(copied[1].path).read_text()
    pathlib.Path(copied[1].path).write_text(rows.replace('red', 'Red', 1))
    found.append(key_of(changed, tmp_path))
    other = write_tokenizer(tmp_path)
    (pathlib.Path(other) / 'tokenizer.model').write_bytes(b'')
    from vora_jax.data.text.tokenizer import train_sentencepiece
    train_sentencepiece(['other words, of course'] * 9, other, 280)
    found.append(key_of(dataclasses.replace(data, tokenizer=other), tmp_path))
    moved = tuple(dataclasses.replace(source, image_root=str(folder / 'images')) for source in data.sources)
    found.append(key_of(dataclasses.replace(data, sources=moved), tmp_path))
    assert None not in found and len(set(found)) == len(found), found


# Pictures change behind the index.


def small_set(folder, fraction=1.0):
    names = write_pictures(folder / 'images', 10, 60)
    rows = made_up_rows(10, names, (1,))
    for number, row in enumerate(rows):
        row['frames'] = [names[number]]
    source = Source(write_rows(folder / 'rows.jsonl', rows), str(folder / 'images'))
    options = {'image': ImagePolicy(max_patches=30), 'max_bad_fraction': fraction, 'cache': str(folder / 'cache')}
    return Data((source,), write_tokenizer(folder), max_slots=256, max_patches=90, max_images=9, **options), names


def one_epoch(data, quarantine=''):
    """Sum of the tallies, and segments laid out, of an epoch."""
    loader = batches(data, RULE, 1, 0, quarantine=quarantine)
    try:
        rows = [next(loader) for _ in range(loader.num_rows)]
        return sum(row.tally[0].sum(0) for row in rows).tolist(), sum(int(row.segment_id.max()) for row in rows)
    finally:
        loader.close()


def test_a_picture_that_changed_its_size_is_left_out(tmp_path):
    data, names = small_set(tmp_path)
    (good, bad, dropped), segments = one_epoch(data, str(tmp_path / 'quarantine.jsonl'))
    assert (good, bad, segments) == (10, 0, 10) and not (tmp_path / 'quarantine.jsonl').exists()
    write_picture(tmp_path / 'images' / names[2], 17, 90, np.random.default_rng(0))
    (good, bad, dropped), segments = one_epoch(data, str(tmp_path / 'quarantine.jsonl'))
    assert (good, bad, segments) == (9, 1, 9)
    (line,) = (tmp_path / 'quarantine.jsonl').read_text().splitlines()
    assert json.loads(line)['row'] == 2
    assert 'rows.jsonl row 3: its (slots, patches, images) are (' in line and 'when it was measured' in line
    shutil.rmtree(tmp_path / 'cache')  # what the sentence says
    assert one_epoch(data)[1] == 10


def test_a_repaired_set_is_measured_anew(tmp_path):
    """A run that could not start says what is missing, and starts when it is there."""
    data, names = small_set(tmp_path, fraction=0.1)
    for name in names[:4]:
        (tmp_path / 'images' / name).rename(tmp_path / name)
    for number in range(4):
        with pytest.raises(UserError, match=rf'^{4 - number} of 10 samples cannot .* row {number + 1}: image .* does not exist'):
            one_epoch(data, str(tmp_path / 'quarantine.jsonl'))
        (tmp_path / names[number]).rename(tmp_path / 'images' / names[number])
        if number == 2:
            break
    # The last one is within the limit. What the file holds of before does not count.
    assert one_epoch(data, str(tmp_path / 'quarantine.jsonl')) [0][:2] == [9, 1]
    assert len((tmp_path / 'quarantine.jsonl').read_text().splitlines()) == 4


def test_failures_of_an_earlier_run_do_not_stop_this_one(tmp_path):
    """Pictures that could not be decoded were repaired; another is damaged now."""
    data, names = small_set(tmp_path, fraction=0.1)
    quarantine = str(tmp_path / 'quarantine.jsonl')
    assert one_epoch(data, quarantine)[1] == 10
    whole = {name: (tmp_path / 'images' / name).read_bytes() for name in names}
    for name in (names[4], names[6]):
        (tmp_path / 'images' / name).write_bytes(whole[name][:-30])
    with pytest.raises(UserError, match=r'^2 of 10 samples cannot be used'):
        one_epoch(data, quarantine)
    for name in (names[4], names[6]):
        (tmp_path / 'images' / name).write_bytes(whole[name])
    (tmp_path / 'images' / names[8]).write_bytes(whole[names[8]][:-30])
    tally, segments = one_epoch(data, quarantine)
    assert tally[:2] == [9, 1] and segments == 9
