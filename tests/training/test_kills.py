"""Kill -9 at random moments of training and saving."""
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import tiny_run

from vora_jax.training.checkpoints import checkpoint, checksum, workdir

EVERY = 2  # steps between checkpoints: nearly always one is under way


@pytest.fixture(scope='module')
def gin_file(tmp_path_factory):
    return tiny_run.write_text_run(tmp_path_factory.mktemp('run'), **{'Checkpoint.every_steps': EVERY})


def start(gin_file: pathlib.Path, folder: pathlib.Path, steps: int) -> subprocess.Popen:
    words = ['train', str(gin_file), '--workdir', str(folder), f'--gin.Train.steps={steps}']
    environment = os.environ | {'XLA_FLAGS': '', 'JAX_PLATFORMS': 'cpu'}  # one device
    return subprocess.Popen([sys.executable, '-m', 'vora_jax.cli.main', *words], stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, env=environment)


def progress(folder: pathlib.Path) -> int:
    """The highest step that is on disk in any form, 0 without one."""
    return max(workdir.step_numbers(folder, committed=False), default=0)


def kill_at_random(process: subprocess.Popen, folder: pathlib.Path, pick: random.Random) -> None:
    """Lets a run begin at least one more save, and kills it at a moment within some of the steps that follow."""
    before, deadline = progress(folder), time.monotonic() + 120
    while progress(folder) <= before and process.poll() is None:
        assert time.monotonic() < deadline, 'no step was ever saved'
        time.sleep(0.002)
    time.sleep(pick.random() * 0.3)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def arrays(folder: pathlib.Path) -> dict[str, bytes]:
    """Every array of the last step, trainable and optimizer, as bytes."""
    step = workdir.step_folder(folder, workdir.latest_step(folder))
    parts = {part: checkpoint.load_as_numpy(step, part) for part in ('trainable', 'optimizer')}
    return {jax.tree_util.keystr(path): np.asarray(x).tobytes() for path, x in jax.tree_util.tree_leaves_with_path(parts)}


@pytest.mark.slow  # tests/cli/test_train.py kills a run by default
@pytest.mark.parametrize('kills, steps', [(3, 60), (20, 700)])
def test_killed_runs_lose_no_committed_step_and_end_like_a_whole_one(gin_file, tmp_path, kills, steps):
    broken, whole, pick, took = tmp_path / 'broken', tmp_path / 'whole', random.Random(kills), 0
    for _ in range(kills):
        process = start(gin_file, broken, steps)
        kill_at_random(process, broken, pick)
        took += process.returncode == -signal.SIGKILL
        committed, good = workdir.step_numbers(broken), workdir.latest_step(broken)
        assert good == max(committed, default=None), 'a committed step is damaged'
        rows = (broken / 'metrics.jsonl').read_text().splitlines()[:-1]  # the last may be half a line
        done = max((json.loads(row)['step'] for row in rows), default=0)
        # A save waits for the one before: at most one is under way when the steps of the next are done.
        assert done - (good or 0) <= 2 * EVERY, (done, good)
    assert took == kills
    for folder in (broken, whole):
        process = start(gin_file, folder, steps)
        told = process.communicate()[0]
        assert process.returncode == 0, told
    assert workdir.latest_step(broken) == workdir.latest_step(whole) == steps
    assert arrays(broken) == arrays(whole) and len(arrays(whole)) > 20
    left = workdir.step_numbers(broken, committed=False)
    assert len(left) == 2 and all(checksum.is_committed(workdir.step_folder(broken, step)) for step in left)
