"""Processes on this machine: one that fails ends all, SIGTERM reaches all, logs are files."""

import os
import signal
import subprocess
import sys
import time

import pytest
from fake_hosts import KINDS

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

# Stands for `python -m vora_jax.cli.main train CONFIG --workdir DIR CODE_OF_0 CODE_OF_1`.
TRAINER = """#!/usr/bin/env -S python3 -S
import os, signal, sys, time
me = int(os.environ['JAX_PROCESS_ID'])
what = sys.argv[7:][me]
print('process', me, what, flush=True)
if what == 'wait':
    signal.signal(signal.SIGTERM, lambda *_: (print('saved', flush=True), sys.exit(0)))
elif what == 'hangs':
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
open(f'ready{me}', 'w').close()
while not all(os.path.exists(f'ready{other}') for other in range(2)):
    time.sleep(0.01)
if what in ('wait', 'hangs'):
    time.sleep(60)
elif what == 'killed':
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(int(what))
"""
# The launcher, with the trainer in the place of Python and less patience.
LAUNCHER = 'import sys; from launch import __main__, local; sys.executable = sys.argv.pop(1); local.FOLLOW_SECONDS = 1; ' \
           'sys.exit(__main__.main())'


def start(folder, *codes):
    (folder / 'trainer').write_text(TRAINER)
    (folder / 'trainer').chmod(0o755)
    launcher = [sys.executable, '-c', LAUNCHER, str(folder / 'trainer')]
    argv = [*launcher, 'local', '--name=a', *KINDS['local'], '--', 'train', 'c.gin', '--workdir', 'w', *codes]
    return subprocess.Popen(argv, cwd=folder, env=os.environ | {'PYTHONPATH': ROOT}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.parametrize('codes, ends, said', [
    (('0', '0'), 0, ''),
    (('0', '1'), 1, 'process 1 ended first, with exit code 1'),
    (('2', '2'), 2, ' ended first, with exit code 2'),  # whichever was first
    (('hangs', 'killed'), 1, 'process 1 was ended by SIGKILL'),
])
def test_the_first_failure_ends_all_and_is_named(tmp_path, codes, ends, said):
    started = time.monotonic()
    process = start(tmp_path, *codes)
    out, error = process.communicate(timeout=60)
    assert process.returncode == ends, error
    assert said in error and time.monotonic() - started < 30
    assert f'process 0 {codes[0]}' in out
    assert (tmp_path / 'runs/launch/a/logs/1.log').read_text().startswith(f'process 1 {codes[1]}')


@pytest.mark.parametrize('number, ends', [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_reach_all(tmp_path, number, ends):
    process = start(tmp_path, 'wait', 'wait')
    deadline = time.monotonic() + 30
    while not all((tmp_path / f'ready{i}').exists() for i in range(2)) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == ends
    assert all('saved' in (tmp_path / f'runs/launch/a/logs/{i}.log').read_text() for i in range(2))
