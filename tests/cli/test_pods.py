"""What happens to processes: preemption, death, mistakes, standstill. Two processes share the devices of a mesh."""

import json
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny_run
from local_pod import LocalPod, last_arrays

from vora_jax.cli.processes import _verdict
from vora_jax.training.checkpoints import workdir
from vora_jax.training.checkpoints.checksum import SIDECAR
from vora_jax.types import TryAgain, UserError

EVERY, MORE = 2, 6  # steps between checkpoints; steps from the one where a run was stopped to its end


@pytest.fixture(scope='module')
def gin_file(tmp_path_factory):
    settings = {'Train.steps': 100_000, 'Train.batch_rows': 8, 'Train.log_every': EVERY, 'Checkpoint.every_steps': EVERY,
                'Train.workers': 0, 'Optimizer.learning_rate': 0.003}
    return tiny_run.write_text_run(tmp_path_factory.mktemp('run'), **settings)


def run(tmp_path, gin_file, folder, processes, devices, *more, own=(), before=''):
    """A pod that trains into `folder`; `own` is for the last process only, `before` as `LocalPod` has it."""
    words = [str(gin_file), '--workdir', str(folder), *more]
    return LocalPod(tmp_path, [words] * (processes - 1) + [[*words, *own]], devices, before)


def preempted(tmp_path, gin_file, devices, *more) -> tuple[pathlib.Path, int]:
    """(folder, step) of a run of two processes, one of which was told to stop."""
    folder = tmp_path / 'preempted'
    with run(tmp_path, gin_file, folder, 2, devices, *more) as pod:
        pod.wait_for(folder / 'steps' / str(EVERY) / SIDECAR)
        pod.processes[1].send_signal(signal.SIGTERM)
        assert pod.codes() == [0, 0], pod.told()
        first, second = pod.told()
    step = workdir.latest_step(folder)
    assert f'stopped by SIGTERM: step {step} of 100000 is saved; run the same command to resume.' in first
    # Only the first process talks, once they have met.
    assert second.count('vora: ') == second.count('vora: waiting for all 2 processes') and 'Gloo' not in first + second
    return folder, step


def ended_at(tmp_path, gin_file, folder, processes, devices, steps, *more):
    """The arrays of a run after `steps` steps."""
    with run(tmp_path, gin_file, folder, processes, devices, f'--gin.Train.steps={steps}', *more) as pod:
        assert pod.codes() == [0] * processes, pod.told()
    number, arrays = last_arrays(folder)
    assert number == steps
    return arrays


def assert_same_bits(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if ours[name].tobytes() != theirs[name].tobytes()]


def test_two_processes_stop_at_one_step_and_end_like_one_that_never_stopped(gin_file, tmp_path):
    folder, step = preempted(tmp_path, gin_file, 2)
    resumed = ended_at(tmp_path, gin_file, folder, 2, 2, step + MORE)
    assert_same_bits(resumed, ended_at(tmp_path, gin_file, tmp_path / 'whole', 1, 2, step + MORE))


def test_a_process_that_waits_in_vain_says_so_and_may_be_started_again():
    """Before JAX aborts it, with a C++ stack and the code 134."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))  # and does not listen
        address = f'127.0.0.1:{free.getsockname()[1]}'
        body = ('import logging; from vora_jax.cli import cluster, processes; logging.basicConfig(level="INFO")\n'
                'processes.JOIN_SECONDS = 1\n'
                f'with processes.join_processes(cluster.Place("given", {address!r}, 2, 1)): pass')
        done = subprocess.run([sys.executable, '-c', body], capture_output=True, text=True, timeout=60)
    assert done.returncode == 75, done.stderr
    assert f'waiting for all 2 processes at {address}, up to 1 s' in done.stderr
    assert f'vora: all 2 processes of the run did not meet at {address} within 1 s; see' in done.stderr
    assert 'stack trace' not in done.stderr


def test_what_ends_a_run_has_its_exit_code():
    assert _verdict(UserError('a.')) == (2, 'a.')
    assert _verdict(TryAgain('b.')) == (75, 'b.')
    assert _verdict(KeyboardInterrupt()) == (130, 'interrupted.')
    assert _verdict(OSError('c\nd')) == (1, 'OSError: c')


@pytest.mark.slow
def test_the_others_wait_for_what_the_first_has_to_do_at_the_end(gin_file, tmp_path):
    """For longer than JAX waits for its farewell: uploads, say."""
    before = ('import time\nfrom vora_jax.cli import processes\nfrom vora_jax.training import loop\n'
              'processes.SHUTDOWN_SECONDS, real = 3, loop.write_summary\n'
              'loop.write_summary = lambda *args: (time.sleep(12), real(*args))')
    folder = tmp_path / 'w'
    with run(tmp_path, gin_file, folder, 2, 2, '--gin.Train.steps=2', before=before) as pod:
        assert pod.codes() == [0, 0], pod.told()
    assert json.loads((folder / 'summary.json').read_text())['steps'] == 2


@pytest.mark.slow
@pytest.mark.parametrize('processes', [1, 2])
def test_a_reader_that_hangs_does_not_keep_a_complete_run(gin_file, tmp_path, processes):
    before = ('import threading\nfrom vora_jax.data.rows import Rows\nfrom vora_jax.training import prefetch\n'
              'prefetch.CLOSE_SECONDS, real, left = 1, Rows.batch, iter(range(2))\n'
              'def batch(*args):\n'
              '    if next(left, None) is None: threading.Event().wait()  # as a dead mount\n'
              '    return real(*args)\n'
              'Rows.batch = batch')
    with run(tmp_path, gin_file, tmp_path / 'w', processes, 2, '--gin.Train.steps=1', before=before) as pod:
        assert pod.codes(60) == [0] * processes, pod.told()
        assert 'left behind' in pod.told()[0]
    assert json.loads((tmp_path / 'w' / 'summary.json').read_text())['steps'] == 1


@pytest.mark.slow
def test_a_process_may_be_slow_to_open_its_data(gin_file, tmp_path):
    """For longer than CPU collectives wait for their peers: what is computed together comes after the processes have met."""
    settings = {'Train.frozen_dtype': "'bfloat16'", 'PatchEmbed.patch_size': 4, 'PatchEmbed.width': 8, 'Vit.num_layers': 1,
                'Vit.num_heads': 2, 'Vit.mlp_width': 8, 'vora.rank': 2, 'vora.targets': ('q_proj',),
                'vora.num_adapted_layers': 1, 'Data.max_patches': 4, 'Train.steps': 2}
    vora = tmp_path / 'vora.gin'
    vora.write_text(gin_file.read_text().replace('@language_model()', '@vora()').replace('Train.steps', '# ')
                    + ''.join(f'{name} = {value}\n' for name, value in settings.items()))
    before = ('import time\nfrom vora_jax.training import loop\nreal = loop.open_data\n'
              'loop.open_data = lambda *args: (time.sleep(40 * number), real(*args))[1]')
    with run(tmp_path, vora, tmp_path / 'w', 2, 2, before=before) as pod:
        assert pod.codes() == [0, 0], pod.told()


@pytest.mark.slow
def test_resuming_on_one_two_and_four_processes(gin_file, tmp_path):
    mesh = ('--gin.Mesh.data=8', '--gin.Mesh.fsdp=1')
    folder, step = preempted(tmp_path, gin_file, 8, *mesh)
    whole = ended_at(tmp_path, gin_file, tmp_path / 'whole', 1, 8, step + MORE, *mesh)
    for processes in (1, 2, 4):
        again = shutil.copytree(folder, tmp_path / f'on-{processes}')
        assert_same_bits(ended_at(tmp_path, gin_file, again, processes, 8, step + MORE, *mesh), whole)
    again = shutil.copytree(folder, tmp_path / 'other-mesh')
    other = ended_at(tmp_path, gin_file, again, 2, 8, step + MORE, '--gin.Mesh.data=2', '--gin.Mesh.fsdp=4')
    worst = max(np.abs(other[name] - whole[name]).max() / max(1, np.abs(whole[name]).max()) for name in whole
                if whole[name].dtype == np.float32)
    print(f'other mesh: {worst:.1e}')
    assert worst <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize('mesh', [('--gin.Mesh.fsdp=8',), ('--gin.Mesh.data=2', '--gin.Mesh.fsdp=4'),
                                  ('--gin.Mesh.data=2', '--gin.Mesh.fsdp=2', '--gin.Mesh.tensor=2',
                                   '--gin.LanguageModel.num_kv_heads=2')])
def test_meshes_are_the_same_however_they_are_split(gin_file, tmp_path, mesh):
    whole = ended_at(tmp_path, gin_file, tmp_path / 'whole', 1, 8, MORE, *mesh)
    for processes in (2, 4):
        folder = tmp_path / f'on-{processes}'
        assert_same_bits(ended_at(tmp_path, gin_file, folder, processes, 8, MORE, *mesh), whole)


@pytest.mark.slow
@pytest.mark.parametrize('dead', [1, 0])
def test_the_death_of_one_ends_the_other_with_the_reason(gin_file, tmp_path, dead):
    folder = tmp_path / 'w'
    with run(tmp_path, gin_file, folder, 2, 2) as pod:
        pod.wait_for(folder / 'steps' / str(EVERY) / SIDECAR)
        pod.processes[dead].kill()
        began = time.monotonic()
        codes = pod.codes(60)
        print(f'the other ended after {time.monotonic() - began:.2f} s')
        told = pod.told()[1 - dead]
    # The first process takes JAX's coordination service with it, whose own end of the others may be quicker.
    assert codes[dead] == -9 and codes[1 - dead] in ((75,) if dead else (75, -6)), told
    assert re.search(rf'vora: process {dead} of 2( \(\S+\))? is gone', told) or codes[1 - dead] == -6, told
    step = workdir.latest_step(folder)
    ended_at(tmp_path, gin_file, folder, 2, 2, step + EVERY)  # what was saved is good


@pytest.mark.slow
@pytest.mark.parametrize('own, code, told', [
    (('--gin.Train.bogus=1',), 2, 'Train.bogus'),  # told by the configuration, before the processes meet
    (('--gin.Train.log_every=0',), 2, 'Train.log_every is 0; it must be at least 1.'),  # when they have met
])
def test_a_mistake_of_one_is_told_by_all(gin_file, tmp_path, own, code, told):
    began = time.monotonic()
    with run(tmp_path, gin_file, tmp_path / 'w', 2, 2, own=own) as pod:
        assert pod.codes(120) == [code, code], pod.told()
        print(f'{time.monotonic() - began:.1f} s from the start')
        first, second = pod.told()
    assert told in second and 'process 1 of 2' in first and told in first
    assert 'Traceback' not in first + second


@pytest.mark.slow
def test_a_standstill_is_told_and_ends_all(gin_file, tmp_path):
    folder = tmp_path / 'w'
    with run(tmp_path, gin_file, folder, 2, 2, '--gin.Train.hang_seconds=12') as pod:
        pod.wait_for(folder / 'steps' / str(EVERY) / SIDECAR)
        pod.processes[1].send_signal(signal.SIGSTOP)  # as a machine that stands still
        # JAX's heartbeats, at 30 s, may come before process 0 has waited for the other one to leave.
        assert pod.processes[0].wait(90) in (75, -6), pod.told()
        pod.processes[1].send_signal(signal.SIGCONT)
        assert pod.codes(60)[1] in (75, -6)
        told = pod.told()[0]
    assert 'no step ended in 12 seconds: process 0 was at' in told
    assert 'loop.py' in (folder / 'hang-0.txt').read_text()


@pytest.mark.slow
def test_killed_in_its_grace_period_a_run_keeps_its_last_checkpoint(gin_file, tmp_path):
    folder = tmp_path / 'w'
    with run(tmp_path, gin_file, folder, 2, 2) as pod:
        pod.wait_for(folder / 'steps' / str(EVERY) / SIDECAR)
        for _ in range(2):  # a second one changes nothing
            pod.processes[0].send_signal(signal.SIGTERM)
            time.sleep(0.3)
        for process in pod.processes:
            process.kill()
    step = workdir.latest_step(folder)
    assert step >= EVERY
    ended_at(tmp_path, gin_file, folder, 2, 2, step + EVERY)
