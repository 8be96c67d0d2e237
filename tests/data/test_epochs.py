"""Plans by epoch: what they hold, and that nothing but their arguments decides it."""
import collections
import concurrent.futures
import json
import multiprocessing
import pickle
import time

import numpy as np
import pytest

from vora_jax.data import epochs as epochs_file
from vora_jax.data.epochs import Epochs
from vora_jax.data.mixture import epoch_samples
from vora_jax.data.packing import Budgets

BUDGETS = Budgets(100, 60, 6, 12)


def made_up_lengths(count, seed=0):
    """Like those of `lengths.fit`; one sample in ten cannot be used and takes no room."""
    rng = np.random.default_rng(seed)
    lengths = np.stack([rng.integers(5, 60, count), rng.integers(0, 30, count), rng.integers(0, 3, count),
                        rng.integers(1, 4, count), rng.integers(0, 2, count)], 1).astype(np.int32)
    lengths[rng.random(count) < 0.1, :4] = 0
    return lengths


def opened(folder, sizes=(40,), weights=(1.0,), seed=3, pack=True, budgets=BUDGETS):
    """Epochs in a folder, which is new or holds the files of another time."""
    folder.mkdir(exist_ok=True, parents=True)
    if not (folder / 'lengths.npy').exists():
        np.save(folder / 'lengths.npy', made_up_lengths(sum(sizes)))
    return Epochs(folder, sizes, weights, budgets, seed, pack)


def rows_of(epochs, epoch):
    first = sum(epochs.num_rows(before) for before in range(epoch))
    return [epochs[first + row].tolist() for row in range(epochs.num_rows(epoch))]


@pytest.mark.parametrize('pack', [True, False])
def test_an_epoch_has_every_sample_once_within_the_budgets(tmp_path, pack):
    epochs, orders = opened(tmp_path, (33, 27), (1.0, 1.0), pack=pack), []
    for epoch in range(4):
        rows = rows_of(epochs, epoch)
        orders.append([sample for row in rows for sample in row])
        assert sorted(orders[-1]) == list(range(60)) and epochs.num_samples(epoch) == 60
        for row in rows:
            assert (epochs.lengths[row, :3].sum(0) <= BUDGETS[:3]).all() and len(row) == 1 or pack
        assert (len(rows) == 60) != pack
    assert len({tuple(order) for order in orders}) == 4


@pytest.mark.parametrize('sizes, weights', [((40, 30, 50, 20), (0.5, 2.0, 0.3, 1.0)), ((7, 1, 3), (0.9, 0.26, 3.7)),
                                            ((11,), (0.05,))])
def test_weights_deal_samples_out_evenly(tmp_path, sizes, weights):
    epochs, seen = opened(tmp_path, sizes, weights), collections.Counter()
    starts, total = np.cumsum([0, *sizes]), 0
    for epoch in range(10):
        samples = [sample for row in rows_of(epochs, epoch) for sample in row]
        assert len(samples) == epochs.num_samples(epoch)
        seen.update(samples)
        total += len(samples)
        for first, size, weight in zip(starts.tolist(), sizes, weights):
            counts = [seen[sample] for sample in range(first, first + size)]
            assert max(counts) - min(counts) <= 1  # none is seen a second time more often than another
            assert abs(sum(counts) - weight * size * (epoch + 1)) <= 0.5
    assert total == sum(seen.values())


def test_half_a_source_is_followed_by_its_other_half():
    first, second, third = (set(epoch_samples([50], [0.5], 1, epoch).tolist()) for epoch in range(3))
    assert len(first) == len(second) == len(third) == 25 and not first & second and first not in (second, third)


def test_sources_are_shuffled_independently():
    samples = epoch_samples([50, 50], [0.5, 0.5], 1)
    assert samples[:25].tolist() != (samples[25:] - 50).tolist()


def test_the_seed_and_the_epoch_decide_all(tmp_path):
    first = [rows_of(opened(tmp_path / 'a'), epoch) for epoch in range(3)]
    assert [rows_of(opened(tmp_path / 'b'), epoch) for epoch in (2, 0, 1)] == [first[2], first[0], first[1]]
    assert rows_of(opened(tmp_path / 'c', seed=4), 0) != first[0]
    assert first[0] != first[1] != first[2]


def test_random_access_equals_reading_in_order(tmp_path):
    epochs = opened(tmp_path / 'a')
    count = sum(epochs.num_rows(epoch) for epoch in range(6))
    in_order = [epochs[row].tolist() for row in range(count)]
    assert len({epochs.num_rows(epoch) for epoch in range(6)}) > 1, 'epochs of different sizes are to be tested'
    fresh, found = opened(tmp_path / 'b'), {}
    for row in np.random.default_rng(0).permutation(count).tolist():
        found[row] = fresh[row].tolist()
    assert [found[row] for row in range(count)] == in_order
    places = [fresh.find(row) for row in range(count)]
    assert places == [(epoch, row) for epoch in range(6) for row in range(epochs.num_rows(epoch))]


def damage(folder, kind):
    ends = json.loads((folder / 'ends.json').read_text())
    if kind == 'no ends':
        (folder / 'ends.json').unlink()
    elif kind == 'fewer ends':
        (folder / 'ends.json').write_text(json.dumps(ends[:1]))
    elif kind == 'no plans':
        assert list(folder.glob('plan-*.npy'))
    if kind in ('no plans', 'nothing'):
        for path in folder.glob('plan-*.npy'):
            path.unlink()
    if kind == 'nothing':
        (folder / 'ends.json').unlink()


@pytest.mark.parametrize('kind', ['whole', 'no ends', 'fewer ends', 'no plans', 'nothing'])
def test_files_may_be_lost_between_runs(tmp_path, kind):
    before = opened(tmp_path)
    count = sum(before.num_rows(epoch) for epoch in range(5))
    expected = [before[row].tolist() for row in range(count)]
    damage(tmp_path, kind)
    assert opened(tmp_path)[count - 1].tolist() == expected[-1]  # a resumed run begins late
    assert [opened(tmp_path)[row].tolist() for row in (0, count // 2)] == [expected[0], expected[count // 2]]
    assert [before[row].tolist() for row in range(count)] == expected  # one that was there meanwhile


def test_old_plans_are_removed_and_where_they_end_stays(tmp_path):
    epochs = opened(tmp_path)
    counts = [epochs.num_rows(epoch) for epoch in range(9)]
    assert json.loads((tmp_path / 'ends.json').read_text()) == np.cumsum(counts).tolist()
    assert 1 <= len(list(tmp_path.glob('plan-*.npy'))) <= 3
    assert not [path for path in tmp_path.iterdir() if path.name.startswith('.')], 'temporary files are left'


def test_many_tiny_epochs_take_no_longer(tmp_path):
    def tiny():
        return opened(tmp_path, (2,), budgets=Budgets(1000, 1000, 1000, 12))

    epochs = tiny()
    assert epochs.find(1000) == (1000, 0)
    stored = json.loads((tmp_path / 'ends.json').read_text())  # not written anew for each of them
    assert stored == list(range(1, len(stored) + 1)) and 970 < len(stored) <= 1001
    start, again = time.perf_counter(), tiny()
    assert again[1000].tolist() == epochs[1000].tolist() and again.num_rows(0) == 1
    assert all(again.find(970) == (970, 0) for _ in range(1000))
    assert time.perf_counter() - start < 1


def test_padding_is_what_the_rows_leave_empty(tmp_path):
    epochs = opened(tmp_path)
    for epoch in range(2):
        rows = rows_of(epochs, epoch)
        used = sum(epochs.lengths[row, :2].sum(0) for row in rows)
        expected = 1 - used / (len(rows) * np.array([BUDGETS.slots, BUDGETS.patches]))
        np.testing.assert_allclose(epochs.padding(epoch), expected)
    text = opened(tmp_path / 'text', budgets=BUDGETS._replace(patch_dim=0))
    assert text.padding().patches == 0


@pytest.mark.filterwarnings('error')
def test_epochs_without_a_sample_are_passed_over(tmp_path):
    epochs = opened(tmp_path, (1, 2), (0.3, 0.2))
    counts = [epochs.num_rows(epoch) for epoch in range(12)]
    assert min(counts) == 0 and epochs.padding(counts.index(0)) == (0.0, 0.0)
    expected = [(epoch, row) for epoch in range(12) for row in range(counts[epoch])]
    assert [epochs.find(row) for row in range(sum(counts))] == expected
    assert all(len(epochs[row]) for row in range(sum(counts)))


def test_copies_share_a_folder_among_threads(tmp_path):
    expected = opened(tmp_path / 'a')
    count = sum(expected.num_rows(epoch) for epoch in range(8))
    expected = [expected[row].tolist() for row in range(count)]
    epochs = opened(tmp_path / 'b')
    copies = [epochs, pickle.loads(pickle.dumps(epochs)), opened(tmp_path / 'b')]

    def read(number):
        order = np.random.default_rng(number).permutation(count).tolist()
        return all(copies[number % 3][row].tolist() == expected[row] for row in order)

    with concurrent.futures.ThreadPoolExecutor(9) as pool:
        assert all(pool.map(read, range(9)))


def read_all(epochs, count):
    return [epochs[row].tolist() for row in range(count)]


def test_processes_share_a_folder(tmp_path, size=3):
    """Tiny epochs: a process removes plans that another is about to read."""
    expected = opened(tmp_path / 'a', (size,))
    count = sum(expected.num_rows(epoch) for epoch in range(40))
    expected = read_all(expected, count)
    epochs, context = opened(tmp_path / 'b', (size,)), multiprocessing.get_context('spawn')
    with context.Pool(3) as pool:
        assert pool.starmap(read_all, [(epochs, count)] * 12, 1) == [expected] * 12


def test_a_plan_removed_while_it_is_opened_is_made_again(tmp_path, monkeypatch):
    epochs = opened(tmp_path)
    expected = rows_of(epochs, 0)
    load, left = np.load, [2]

    def removed(path, **options):
        if 'plan-' in str(path) and left[0]:
            left[0] -= 1
            path.unlink(missing_ok=True)
        return load(path, **options)

    monkeypatch.setattr(epochs_file.np, 'load', removed)
    assert rows_of(opened(tmp_path), 0) == expected and left == [0]
