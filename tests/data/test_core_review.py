"""What goes wrong around the loader: killed processes, folders that are gone or full, several hosts."""
import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from generated_set import RULE, close, global_batches, mixed, open_hosts

from vora_jax.data import epochs as epochs_file
from vora_jax.data import whole_file
from vora_jax.data.config import Data, Source
from vora_jax.data.epochs import Epochs
from vora_jax.data.packing import Budgets
from vora_jax.data.quarantine import Quarantine
from vora_jax.data.samples import Samples
from vora_jax.types import UserError


def damage(data, count):
    """Cuts off the ends of some pictures: their sizes can still be read."""
    paths = sorted(pathlib.Path(data.sources[0].image_root).iterdir())[::len(paths_of(data)) // count][:count]
    whole = {path: path.read_bytes() for path in paths}
    for path, content in whole.items():
        path.write_bytes(content[:-len(content) // 2])
    return whole


def paths_of(data):
    return list(pathlib.Path(data.sources[0].image_root).iterdir())


def read_until_it_stops(loader, count=60):
    with pytest.raises(UserError) as caught:
        for _ in range(count):
            next(loader)
    return str(caught.value)


def test_no_host_leaves_the_others_over_bad_samples(tmp_path):
    """The loop of training judges what all hosts met together; a host alone may say so itself."""
    data = dataclasses.replace(mixed(tmp_path, 12), cache=str(tmp_path / 'cache'))
    close(open_hosts(data, 1))
    damage(data, 20)
    loaders = open_hosts(data, 2)
    tally = sum(next(loader).tally.sum((0, 1)) for _ in range(20) for loader in loaders)
    assert tally[1] > 0.01 * 36
    close(loaders)
    loaders = open_hosts(data, 1)
    assert 'more than Data.max_bad_fraction = 0.01 allows' in read_until_it_stops(loaders[0])
    close(loaders)


def test_plans_do_not_outlive_the_index_they_were_made_of(tmp_path):
    """A run tolerates missing pictures; another that does not forgets the index; the pictures come back."""
    data = dataclasses.replace(mixed(tmp_path, 12), cache=str(tmp_path / 'cache'), max_bad_fraction=1.0)
    gone = {path: path.read_bytes() for path in paths_of(data)[:20]}
    for path in gone:
        path.unlink()
    loaders = open_hosts(data, 1)
    global_batches(loaders, 5)
    close(loaders)
    strict = dataclasses.replace(data, max_bad_fraction=0.01)
    with pytest.raises(UserError, match='repair the data'):
        open_hosts(strict, 1)
    for path, content in gone.items():
        path.write_bytes(content)
    found = [global_batches(open_hosts(dataclasses.replace(strict, cache=cache), 1), 12)
             for cache in (strict.cache, str(tmp_path / 'new'))]
    assert found[0] == found[1]


@pytest.mark.parametrize('kind', ['gone', 'full'])
def test_training_goes_on_without_the_folder_of_plans(tmp_path, kind, monkeypatch, caplog):
    data = mixed(tmp_path, 8)
    expected = global_batches(open_hosts(data, 1), 30)
    loaders = open_hosts(data, 1, cache=str(tmp_path / 'cache'))
    found = global_batches(loaders, 2)
    if kind == 'gone':
        (tmp_path / 'cache').rename(tmp_path / 'elsewhere')  # at once, while threads read ahead
    else:
        def full(*_):
            raise OSError(28, 'No space left on device')
        monkeypatch.setattr(epochs_file, 'write_whole', full)
    assert found + global_batches(loaders, 28) == expected
    close(loaders)
    told = [record.getMessage() for record in caplog.records if 'cannot be written' in record.getMessage()]
    assert len(told) == (kind == 'full'), told


@pytest.mark.parametrize('file', ['000000.npz', 'sizes.npy', 'lengths.npy'])
def test_a_full_disk_is_told(tmp_path, monkeypatch, file):
    data, write = mixed(tmp_path, 4), whole_file.write_whole

    def full(path, content):
        if path.name == file:
            raise OSError('4096 requested and 12 written')  # NumPy's words
        write(path, content)

    for module in ('lengths', 'loader'):
        monkeypatch.setattr(f'vora_jax.data.{module}.write_whole', full)
    with pytest.raises(UserError, match=r'cannot be written \(4096 requested.*make room there, or set Data.cache'):
        open_hosts(data, 1, cache=str(tmp_path / 'cache'))


def test_a_file_whose_folder_went_meanwhile(tmp_path):
    def write(file):
        shutil.rmtree(tmp_path)
        raise OSError(5, 'Input/output error')
    with pytest.raises(OSError, match='Input/output error'):
        whole_file.write_whole(tmp_path / 'a', write)


def test_few_plans_of_many_tiny_epochs_stay(tmp_path):
    """Threads and processes that lag behind make plans again that others have removed."""
    np.save(tmp_path / 'lengths.npy', np.array([[5, 2, 1, 1, 0]], np.int32))
    first, second = (Epochs(tmp_path, [1], [1.0], Budgets(8, 4, 2, 12), 0, True) for _ in range(2))
    for row in range(60):
        first[row], second[max(row - 20, 0)]
    first[60], first[61]
    assert len(list(tmp_path.glob('plan-*.npy'))) <= 3


def test_known_sizes_may_be_forgotten_by_another_thread(tmp_path):
    class Forgetful(dict):
        def __setitem__(self, *_):
            pass

    samples, expected = (Samples(data, RULE) for data in [mixed(tmp_path, 4)] * 2)
    samples._grids = Forgetful()
    assert [samples.measure(number) for number in range(12)] == [expected.measure(number) for number in range(12)]


def test_a_quarantine_that_somebody_edits(tmp_path):
    path = tmp_path / 'quarantine.jsonl'
    first, second = Quarantine(str(path)), Quarantine(str(path))
    assert first.add('a', 0, 'w', 'long reason' * 9) and not second.add('a', 0, 'w', 'r')
    path.write_text('# repaired these\n[1]\n{}\n')
    assert first.add('a', 1, 'w', 'r') and not second.add('a', 1, 'w', 'r')
    path.unlink()
    assert second.add('a', 2, 'w', 'r') and json.loads(path.read_text())['row'] == 2
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match='cannot be written.*left out: why'):
        first.add('a', 3, 'w', 'why')


@pytest.mark.parametrize('weight', [-1.0, float('nan'), float('inf')])
def test_weights_are_numbers(weight):
    with pytest.raises(UserError, match='Source.weight of rows.jsonl is'):
        Source('rows.jsonl', weight=weight)


@pytest.mark.parametrize('values', [{'max_bad_fraction': -0.1}, {'max_bad_fraction': 5}, {'max_bad_fraction': float('nan')},
                                    {'video_frames': -1}])
def test_limits_that_make_no_sense(values):
    with pytest.raises(UserError, match=f'Data.{next(iter(values))} is'):
        Data((), '', **values)


PROGRAM = """
import os, signal, sys, time
sys.path[:0] = [sys.argv[1]]
from generated_set import open_hosts
from vora_jax.data.config import Data, ImagePolicy, Source
from vora_jax.types import UserError

def workers():
    return [int(name) for name in os.listdir('/proc') if name.isdigit() and parent(name) == os.getpid()
            and b'spawn_main' in open(f'/proc/{name}/cmdline', 'rb').read()]

def parent(name):
    try:
        return int(open(f'/proc/{name}/stat').read().rpartition(')')[2].split()[1])
    except OSError:
        return 0

if __name__ == '__main__':
    (loader,) = open_hosts(eval(sys.argv[2]), 1, workers=1)
    next(loader)
    (worker,) = workers()
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(worker, number)
    for _ in range(5):
        next(loader)
    print(worker, flush=True)
    if sys.argv[3] == 'parent':
        os.kill(os.getpid(), signal.SIGKILL)
    os.kill(worker, signal.SIGKILL)
    try:
        for _ in range(5):
            next(loader)
    except UserError as error:
        print(error, flush=True)
    loader.close()
"""


@pytest.mark.parametrize('killed', ['parent', pytest.param('worker', marks=pytest.mark.slow)])
def test_worker_processes_live_as_long_as_the_program(tmp_path, killed):
    """Ctrl-C and SIGTERM, which all processes get, are the parent's; its end is theirs; the end of one of them is told."""
    program = tmp_path / 'read.py'  # workers are spawned: they need a file to import
    program.write_text(PROGRAM)
    arguments = [str(pathlib.Path(__file__).parent), repr(mixed(tmp_path, 8)), killed]
    with open(tmp_path / 'told', 'w') as file:
        done = subprocess.run([sys.executable, str(program), *arguments], stdout=subprocess.PIPE, stderr=file, timeout=100)
    told = done.stdout.decode().splitlines()
    if killed == 'parent':
        assert done.returncode == -signal.SIGKILL, (tmp_path / 'told').read_text()
    else:
        assert 'a process that reads data was killed' in told[1] and done.returncode == 0
    deadline = time.monotonic() + 10
    while os.path.exists(f'/proc/{told[0]}'):
        assert time.monotonic() < deadline, 'the worker is still there'
        time.sleep(0.05)
    assert 'Traceback' not in (tmp_path / 'told').read_text()
