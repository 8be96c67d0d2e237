"""The sequence of global batches is one thing, whoever reads it and however often it is interrupted."""
import json
import subprocess
import sys

import numpy as np
import pytest
from generated_set import close, global_batches, mixed, open_hosts

STEPS = 50


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return mixed(tmp_path_factory.mktemp('mixed'), 32)


@pytest.fixture(scope='module')
def whole(data):
    """Hashes of 50 global batches of 4 rows, more than two epochs, read by one host."""
    loaders = open_hosts(data, 1)
    digests = global_batches(loaders, STEPS)
    assert loaders[0].epoch(loaders[0].get_state()) > 2.5 and len(set(digests)) == STEPS
    close(loaders)
    return digests


@pytest.mark.parametrize('hosts', [2, 4])
def test_any_number_of_hosts_reads_the_same_batches(data, whole, hosts):
    loaders = open_hosts(data, hosts)  # each with a folder of its own
    assert global_batches(loaders, STEPS) == whole
    close(loaders)


def test_hosts_may_share_their_folder(data, whole, tmp_path):
    for _ in range(2):  # the second time all of it is there
        loaders = open_hosts(data, 2, cache=str(tmp_path))
        assert global_batches(loaders, 20) == whole[:20]
        close(loaders)


def test_another_seed_gives_other_batches(data, whole):
    loaders = open_hosts(data, 1, seed=6)
    assert not set(global_batches(loaders, 5)) & set(whole)
    close(loaders)


@pytest.mark.parametrize('seed', range(2))
def test_a_run_stopped_at_any_step_goes_on_with_any_number_of_hosts(data, whole, tmp_path, seed):
    rng, done, state, hosts_seen = np.random.default_rng(seed), 0, None, set()
    stops = sorted(rng.choice(np.arange(1, STEPS), 4, replace=False).tolist())
    for stop in [*stops, STEPS]:
        hosts = int(rng.choice([1, 2, 4]))
        hosts_seen.add(hosts)
        loaders = open_hosts(data, hosts, cache=str(tmp_path) if rng.random() < 0.5 else '')
        for loader in loaders:
            if state:
                loader.set_state(json.loads(state))
        assert global_batches(loaders, stop - done) == whole[done:stop], (hosts, done, stop)
        state, done = json.dumps(loaders[-1].get_state()), stop
        close(loaders)
    assert len(hosts_seen) > 1


def test_a_loader_goes_back_and_forth(data, whole):
    loaders, states = open_hosts(data, 2), []
    for _ in range(STEPS):
        states.append(loaders[0].get_state())
        for loader in loaders:
            next(loader)
    for step in np.random.default_rng(0).integers(0, STEPS, 8).tolist():
        for loader in loaders:
            loader.set_state(states[step])
        assert global_batches(loaders, 1) == whole[step:step + 1]
    close(loaders)


PROGRAM = """
import json, sys
sys.path[:0] = [sys.argv[1]]
from generated_set import close, global_batches, open_hosts
from vora_jax.data.config import Data, ImagePolicy, Source

if __name__ == '__main__':
    data = eval(sys.argv[2])
    whole, sequences = json.loads(sys.argv[3]), json.loads(sys.argv[4])
    for sequence in sequences:
        done, state = 0, None
        for hosts, workers, stop in sequence:
            loaders = open_hosts(data, hosts, workers=workers, cache=sys.argv[5])
            for loader in loaders:
                if state:
                    loader.set_state(state)
            assert global_batches(loaders, stop - done) == whole[done:stop], (hosts, workers, done, stop)
            state, done = loaders[0].get_state(), stop
            close(loaders)
    print('equal')
"""


@pytest.mark.slow
def test_any_number_of_workers_reads_the_same_batches(data, whole, tmp_path):
    """(hosts, workers, read up to this step) one after the other, each going on where the one before stopped."""
    sequences = [[(1, 3, 50)], [(2, 1, 50)], [(4, 1, 9), (1, 0, 17), (2, 3, 38), (1, 1, 50)]]
    program = tmp_path / 'read.py'  # workers are spawned: they need a file to import
    program.write_text(PROGRAM)
    folder = __file__.rpartition('/')[0]
    arguments = [folder, repr(data), json.dumps(whole), json.dumps(sequences), str(tmp_path / 'cache')]
    result = subprocess.run([sys.executable, str(program), *arguments], capture_output=True, text=True, timeout=500)
    assert (result.stdout.strip(), result.stderr) == ('equal', ''), result.stderr
