"""Checkpoints of two processes: shares of the hashing, damage, failure, another count of processes."""
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vora_jax.training.checkpoints import checkpoint, checksum, workdir
from vora_jax.training.checkpoints.record import Record
from vora_jax.training.checkpoints.writer import Writer
from vora_jax.types import UserError

ROWS = 64


def weights(step: int) -> dict:
    """Arrays cut over all devices, and one that each has; random, the same for every count of processes."""
    rng = np.random.default_rng(step)
    mesh = jax.make_mesh((jax.device_count(),), ('x',), axis_types=(jax.sharding.AxisType.Auto,))
    cut, whole = (jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)) for axes in (('x',), ()))

    def put(values, sharding):
        return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])

    return {'kernel': put(rng.normal(size=(ROWS, 500)).astype(np.float32), cut),
            'scale': put(rng.normal(size=(3,)).astype(np.float32), whole)}


def save(folder: pathlib.Path, step: int) -> None:
    writer = Writer(folder, 10)
    record = Record(step, '', writer.save_frozen({'base': weights(100)['kernel'].astype(jnp.bfloat16)}))
    writer.save(record, weights(step), {'mu': weights(step + 50)})
    writer.wait()


def together(action: str, folder: pathlib.Path, count: int = 2) -> list[tuple[int, dict | str]]:
    """Runs an action in processes of a run: (exit code, what it told) of each."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    flags = f'--xla_force_host_platform_device_count={4 // count}'
    processes = [subprocess.Popen([sys.executable, __file__, action, str(folder), str(index), str(count), str(port)],
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                  env=os.environ | {'XLA_FLAGS': flags}) for index in range(count)]
    told = [process.communicate(timeout=200) for process in processes]
    rows = [[line for line in out.splitlines() if line.startswith('{')] for out, _ in told]  # among the lines of gloo
    return [(process.returncode, json.loads(row[-1]) if row else error[-2000:])
            for process, row, (_, error) in zip(processes, rows, told, strict=True)]


def act(action: str, folder: pathlib.Path) -> dict:
    """What one of the processes does."""
    hashed, read = [], checksum._sha256
    checksum._sha256 = lambda path: hashed.append(path.relative_to(folder).as_posix()) or read(path)
    if action == 'save':
        for step in (1, 2):
            save(folder, step)
        return {'hashed': hashed}
    if action == 'look':
        try:
            step = workdir.latest_step(folder)
            parts = {'trainable': weights(0), 'optimizer': {'mu': weights(0)}}
            shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), parts)
            loaded = checkpoint.restore(workdir.step_folder(folder, step), shapes)
            expected = {'trainable': weights(step), 'optimizer': {'mu': weights(step + 50)}}
            equal = jax.tree.map(lambda a, b: bool((np.asarray(a.addressable_data(0)) == b.addressable_data(0)).all()),
                                 loaded, expected)
            return {'step': step, 'equal': all(jax.tree.leaves(equal)), 'hashed': hashed}
        except UserError as error:
            return {'error': str(error)}
    if jax.process_index() == 1:  # it writes its arrays, and then its disk is full
        def full(*_):
            raise OSError('no space left on device')
        checksum.digest = full
    try:
        save(folder, 3)
    except UserError as error:
        print(json.dumps({'error': str(error)}), flush=True)
        os._exit(2)  # as a process that ends by the error: it leaves the others alone
    return {}


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    """A workdir that two processes wrote, with what each hashed."""
    folder = tmp_path_factory.mktemp('two')
    return folder, together('save', folder)


def copied(saved, to: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(saved[0], to / 'w'))


def test_each_process_hashes_what_it_wrote_and_restores_its_share(saved):
    folder, told = saved
    assert [code for code, _ in told] == [0, 0], told
    hashed = [set(one['hashed']) for _, one in told]
    names = {f'steps/2/{name}' for name in json.loads((folder / 'steps/2' / checksum.SIDECAR).read_text())}
    assert not hashed[0] & hashed[1] and names < hashed[0] | hashed[1]
    arrays = [{name for name in each if '/ocdbt.process_' in name} for each in hashed]
    assert all('process_0' in name for name in arrays[0]) and all('process_1' in name for name in arrays[1])
    assert len(arrays[0]) and len(arrays[1])
    told = together('look', folder)
    assert [(one['step'], one['equal']) for _, one in told] == [(2, True)] * 2, told
    shares = [{name for name in one['hashed'] if name.startswith('steps/2')} for _, one in told]
    assert not shares[0] & shares[1] and shares[0] | shares[1] == names


@pytest.mark.slow
@pytest.mark.parametrize('process', [0, 1])
def test_damage_in_either_share_is_seen_by_all(saved, tmp_path, process):
    folder = copied(saved, tmp_path)
    path = max((folder / 'steps/2/trainable').glob(f'ocdbt.process_{process}/d/*'), key=lambda p: p.stat().st_size)
    path.write_bytes(path.read_bytes()[:-1])
    told = together('look', folder)
    assert [(one['step'], one['equal']) for _, one in told] == [(1, True)] * 2, told


@pytest.mark.slow
def test_one_process_reads_what_two_wrote_and_the_other_way_round(saved, tmp_path):
    flat = checkpoint.load_as_numpy(workdir.step_folder(saved[0], workdir.latest_step(saved[0])), 'optimizer')
    assert (flat['mu']['kernel'] == np.asarray(weights(52)['kernel'])).all()
    save(tmp_path, 7)
    assert [(one['step'], one['equal']) for _, one in together('look', tmp_path)] == [(7, True)] * 2


@pytest.mark.slow
def test_a_failed_save_of_one_process_ends_it_with_a_sentence(saved, tmp_path):
    (code, _), (other, told) = together('fail', copied(saved, tmp_path))
    assert other == 2 and 'steps/3 could not be written: the disk is full' in told['error']
    assert code != 0  # it does not hang: the heartbeats of the other are missing
    assert workdir.step_numbers(tmp_path / 'w') == [1, 2]


if __name__ == '__main__':
    _, ACTION, FOLDER, INDEX, COUNT, PORT = sys.argv
    jax.distributed.initialize(f'127.0.0.1:{PORT}', int(COUNT), int(INDEX), heartbeat_timeout_seconds=10)
    print('\n' + json.dumps(act(ACTION, pathlib.Path(FOLDER))), flush=True)
    jax.distributed.shutdown()
