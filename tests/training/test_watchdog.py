"""A run in which nothing moves is ended."""

import queue
import subprocess
import sys
import threading
import time

import pytest

from vora_jax.training import prefetch, watchdog
from vora_jax.training.watchdog import DATA, STEP, watching


def test_signs_of_life_keep_it_quiet(tmp_path):
    ended = []
    with watching(0.4, tmp_path, ended.append) as dog:
        time.sleep(0.8)  # the first step may take four times as long
        for step in range(5):
            dog.beat(STEP, step)
            time.sleep(0.2)
    time.sleep(0.5)  # closed: nothing is expected any more
    assert not ended and not list(tmp_path.iterdir())


def test_zero_switches_it_off(tmp_path):
    with watching(0, tmp_path, pytest.fail):
        time.sleep(0.1)


def test_a_stall_is_told_with_its_stage_and_all_stacks(tmp_path, capsys):
    ended = queue.Queue()
    with watching(1, tmp_path, ended.put) as dog:
        dog.beat(DATA, 17)
        reason = ended.get(timeout=2.5)  # not the 4 seconds of a first step
    file = (tmp_path / 'hang-0.txt').read_text()
    assert 'no step ended in 1 seconds: process 0 was at waiting for data (step 17)' in reason
    assert file.startswith(reason) and 'test_a_stall_is_told' in file and 'in _bark' in file
    assert reason in capsys.readouterr().err


def test_a_process_that_hangs_is_ended(tmp_path):
    body = ('import pathlib, threading; from vora_jax.training.watchdog import watching\n'
            f'with watching(0.1, pathlib.Path({str(tmp_path)!r})): threading.Event().wait()')
    done = subprocess.run([sys.executable, '-c', body], capture_output=True, text=True, timeout=60)
    assert done.returncode == watchdog.RETRY, done.stderr
    assert 'at opening the data (step 0)' in done.stderr and 'run the same command to resume' in done.stderr.lower()


def test_it_ends_the_process_even_where_nothing_can_be_told(tmp_path, monkeypatch):
    class Closed:
        def write(self, _):
            raise BrokenPipeError

    def full(*_, **__):
        raise OSError('No space left on device')

    monkeypatch.setattr(watchdog.sys, 'stderr', Closed())
    monkeypatch.setattr(watchdog.tempfile, 'TemporaryFile', full)
    ended = queue.Queue()
    with watching(0.05, tmp_path, ended.put):
        assert 'no step ended' in ended.get(timeout=10)
    assert 'no stacks: No space left' in (tmp_path / 'hang-0.txt').read_text()


@pytest.mark.filterwarnings('ignore::pytest.PytestUnhandledThreadExceptionWarning')
def test_it_ends_the_process_whatever_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(watchdog, '_stacks', lambda: 1 / 0)
    ended = queue.Queue()
    with watching(0.05, tmp_path, ended.put):
        assert ended.get(timeout=10)


def test_opening_data_may_take_longer_and_measuring_is_a_sign_of_life(tmp_path):
    ended = []
    with watching(0.25, tmp_path, ended.append) as dog:
        for _ in range(4):  # longer than the four times 0.25 s that one may take
            dog.beat(watchdog.OPENING, 0)
            time.sleep(0.3)
    assert not ended


def test_a_reader_that_hangs_is_left_behind(monkeypatch, caplog):
    """As one on a dead mount: closing ends, and the thread is none that the process waits for."""
    class Dead:
        def __next__(self):
            threading.Event().wait()

    monkeypatch.setattr(prefetch, 'CLOSE_SECONDS', 0.1)
    batches = prefetch.Prefetch(Dead(), None)
    batches.close()
    assert 'left behind' in caplog.text and batches._thread.daemon


def test_a_file_system_that_hangs_does_not_keep_the_process(tmp_path, monkeypatch):
    monkeypatch.setattr(watchdog, '_write', lambda *_: time.sleep(60))
    monkeypatch.setattr(watchdog, 'GRACE_SECONDS', 0.2)
    ended = queue.Queue()
    with watching(0.05, tmp_path, ended.put):
        assert ended.get(timeout=10)
