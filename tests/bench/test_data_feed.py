"""Generated photographs, turns that are taken, buffers that are emptied."""
import contextlib
import multiprocessing
import time

import numpy as np
import PIL.Image
import pytest

from vora_jax.bench import cpu_clock, data_turns
from vora_jax.bench.data_feed import bare, data_config, empty_buffers, fed, num_pictures
from vora_jax.bench.data_parts import cpu_parts
from vora_jax.bench.data_pictures import photograph, write_photographs
from vora_jax.bench.data_turns import Side, take_turns
from vora_jax.data import loader
from vora_jax.method import VisionTokenRule


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(cpu_clock, 'LOOK_SECONDS', 0.001)
    monkeypatch.setattr(cpu_clock, 'MAX_WAIT_SECONDS', 0.01)


@pytest.fixture(scope='module')
def photographs(tmp_path_factory):
    return write_photographs(tmp_path_factory.mktemp('photographs'), 9, 48, 64, seed=3)


def test_photographs_follow_from_the_seed(photographs, tmp_path):
    again = write_photographs(tmp_path, 2, 48, 64, seed=3)
    for first, second in zip(photographs.files, again.files):
        assert open(first, 'rb').read() == open(second, 'rb').read()
    one, two = (PIL.Image.open(name) for name in photographs.files[:2])
    assert one.size == (64, 48) and one.mode == 'RGB' and one.layer[0][1:3] == (2, 2) and one.layer[1][1:3] == (1, 1)
    assert np.abs(np.asarray(one, int) - np.asarray(two)).mean() > 10
    assert photographs.mean_bytes > 500


def test_photographs_are_smooth():
    pixels = np.asarray(photograph(120, 161, np.random.default_rng(0)).convert('L'), float)
    assert pixels.shape == (120, 161) and pixels.std() > 30
    assert np.abs(np.diff(pixels)).mean() < 0.4 * np.abs(pixels - pixels[:, ::-1]).mean()


@pytest.mark.parametrize('decoder', ['pillow', 'simplejpeg'])
def test_both_sides_do_as_many_pictures_as_they_say(photographs, decoder):
    if decoder == 'simplejpeg':
        pytest.importorskip('simplejpeg')
    assert bare(photographs.files, 5, 32, decoder).call() == bare(photographs.files, 5, 32, decoder, threads=2).call() == 5
    data = data_config(photographs, 32, 8, decoder)
    batches = loader.batches(data, VisionTokenRule(8), 1, 0, cache_bytes=0)
    with contextlib.closing(batches):
        batch = next(batches)
        assert 0 < num_pictures(batch) <= 4 and batch.patches.pixels.shape[1:] == (64, 192)
        assert np.count_nonzero(batch.patches.grid[0, :, 0]) == num_pictures(batch)
        side = fed(batches, 6)
        side.prepare()
        assert 6 <= side.call() <= 9
    parts = cpu_parts(photographs, data, VisionTokenRule(8), 3)
    assert {'decode', 'row and tokens', 'lay out a batch'} < set(parts) and parts['decode'] > 0


def test_buffers_are_emptied_until_batches_are_waited_for():
    taken, ready = [], 30

    def take():
        taken.append(0)
        if len(taken) > ready:
            time.sleep(0.02)
    empty_buffers(take, usual=0.02)
    assert ready < len(taken) < ready + 9
    taken.clear()
    empty_buffers(lambda: taken.append(0), usual=1.0)  # never waited for: it ends all the same
    assert len(taken) == 200


def test_sides_take_turns_and_medians_are_of_a_unit():
    seen = []

    def side(name, units):
        def call():
            seen.append(name)
            time.sleep(0.004 * units)
            return units
        return Side(call, lambda: seen.append(name.upper()))
    costs = take_turns({'a': side('a', 1), 'b': side('b', 3)}, 3, lambda: seen.append('.'))
    assert ''.join(seen) == 'Aa.Bb.Bb.Aa.Aa.Bb.'
    assert all(0.004 <= cost.seconds < 0.05 and cost.cpu_seconds < 0.004 for cost in costs.values())


def test_cpu_time_of_this_process():
    def busy():
        end = time.process_time() + 0.03
        while time.process_time() < end:
            pass
        return 2
    cost = data_turns.measure(busy)
    assert 0.0145 < cost.cpu_seconds < 0.04 and cost.cpu_seconds <= cost.seconds * 1.1 + 0.005


def spin(ready):
    end = time.process_time() + 0.05
    while time.process_time() < end:
        pass
    ready.set()
    time.sleep(60)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(time, 'pthread_getcpuclockid'), reason='Linux tells the CPU time of other processes')
def test_cpu_time_of_workers_counts():
    context = multiprocessing.get_context('spawn')
    ready = context.Event()
    worker = context.Process(target=spin, args=(ready,), daemon=True)
    own, before = time.process_time(), cpu_clock.cpu_seconds()
    worker.start()
    try:
        assert ready.wait(60)
        others = cpu_clock.cpu_seconds() - before - (time.process_time() - own)
        assert 0.05 <= others < 60
    finally:
        worker.terminate()
        worker.join()
