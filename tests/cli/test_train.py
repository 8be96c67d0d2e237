"""`vora train`: kill, Ctrl-C, resume, mistakes."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import tiny_run

from vora_jax.training import init_from
from vora_jax.training.checkpoints import checkpoint, record
from vora_jax.training.checkpoints import workdir as folders
from vora_jax.training.checkpoints.checksum import SIDECAR

STEPS, EVERY = 360, 40


def command(gin_file: pathlib.Path, workdir: pathlib.Path, *more: str) -> list[str]:
    return [
        sys.executable,
        '-m',
        'vora_jax.cli.main',
        'train',
        str(gin_file),
        '--workdir',
        str(workdir),
        *more,
    ]


def start(arguments: list[str]) -> subprocess.Popen:
    environment = os.environ | {'XLA_FLAGS': '', 'JAX_PLATFORMS': 'cpu'}  # one device
    return subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )


def wait_for(path: pathlib.Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f'{path} never came'
        time.sleep(0.002)


@pytest.fixture(scope='module')
def gin_file(tmp_path_factory):
    settings = {'Train.steps': STEPS, 'Checkpoint.every_steps': EVERY, 'Checkpoint.keep_last': 100}
    return tiny_run.write_text_run(tmp_path_factory.mktemp('run'), **settings)


def all_arrays(workdir: pathlib.Path) -> dict[str, bytes]:
    """Every array of the last step, trainable and optimizer, as bytes."""
    folder = folders.step_folder(workdir, folders.latest_step(workdir))
    arrays = {}
    for part in ('trainable', 'optimizer'):
        loaded = checkpoint.load_as_numpy(folder, part)
        for path, leaf in jax.tree_util.tree_leaves_with_path(loaded):
            arrays[part + jax.tree_util.keystr(path)] = np.asarray(leaf).tobytes()
    assert len(arrays) > 20
    return arrays


def unfinished(given: str) -> str:
    return init_from.unfinished(given, checkpoint.open_checkpoint(given))


def test_killed_and_interrupted_runs_end_bit_for_bit_like_a_whole_one(gin_file, tmp_path):
    whole, broken = tmp_path / 'whole', tmp_path / 'broken'

    process = start(command(gin_file, broken))
    wait_for(broken / 'steps' / str(EVERY) / SIDECAR, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    reached = folders.latest_step(broken)
    assert EVERY <= reached < STEPS

    process = start(command(gin_file, broken))
    wait_for(broken / 'steps' / str(reached + EVERY) / SIDECAR, process)
    process.send_signal(signal.SIGINT)
    told = process.communicate()[0]
    assert process.returncode == 130 and 'run the same command to resume' in told, told
    assert f'after step {reached} of {STEPS}' in told
    stopped = folders.latest_step(broken)
    assert reached + EVERY <= stopped < STEPS
    assert f'is at step {stopped} of {STEPS}: its training was stopped' in unfinished(str(broken))
    assert not unfinished(f'{broken}/steps/{stopped}')  # on purpose

    process = start(command(gin_file, broken))
    wait_for(broken / 'steps' / str(stopped // EVERY * EVERY + EVERY) / SIDECAR, process)
    process.send_signal(signal.SIGTERM)
    told = process.communicate()[0]
    assert process.returncode == 0 and f'of {STEPS} is saved; run the same command to resume' in told, told

    for workdir in (broken, whole):
        process = start(command(gin_file, workdir))
        told = process.communicate()[0]
        assert process.returncode == 0, told
    assert folders.latest_step(broken) == folders.latest_step(whole) == STEPS
    assert all_arrays(broken) == all_arrays(whole)
    assert not unfinished(str(whole))
    ends = [record.read_record(folders.step_folder(w, STEPS)) for w in (broken, whole)]
    assert ends[0].data == ends[1].data and ends[0].num_samples == ends[1].num_samples
    rows = [
        [json.loads(line) for line in (w / 'metrics.jsonl').read_text().splitlines()] for w in (broken, whole)
    ]
    losses = [{row['step']: row['loss'] for row in part} for part in rows]
    assert [row['step'] for row in rows[0]] == sorted({row['step'] for row in rows[0]})
    assert losses[0][STEPS] == losses[1][STEPS]


def test_mistakes_are_one_sentence(gin_file, tmp_path):
    process = start(command(gin_file, tmp_path / 'w', '--init-from', str(tmp_path / 'nowhere')))
    told = process.communicate()[0].strip().splitlines()
    assert (
        process.returncode == 2 and told[-1].startswith('vora: ') and 'nowhere does not exist' in told[-1]
    ), told
    assert not any('Traceback' in line for line in told)
