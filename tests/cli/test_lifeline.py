"""All processes of a run end together: here they are threads, whose end is written down."""

import queue
import socket
import threading
import time

import pytest

from vora_jax.cli import lifeline
from vora_jax.cli.lifeline import Lifeline


class Store:
    """The key-value store of JAX's coordination service."""

    def __init__(self):
        self.values, self.told = {}, threading.Condition()

    def key_value_set(self, key, value):
        with self.told:
            self.values[key] = value
            self.told.notify_all()

    def blocking_key_value_get(self, key, milliseconds):
        with self.told:
            assert self.told.wait_for(lambda: key in self.values, milliseconds / 1000)
            return self.values[key]


@pytest.fixture
def ends(monkeypatch):
    """Exit codes, in the order of `_exit`; a thread that would end its process sleeps instead."""
    codes = queue.Queue()

    def exit_(code):
        codes.put(code)
        threading.Event().wait()

    monkeypatch.setattr(lifeline.os, '_exit', exit_)
    monkeypatch.setattr(lifeline, 'LEAVE_SECONDS', 2)
    return codes


def join(count, store=None):
    store = store or Store()
    lines = [Lifeline('localhost:1', count, number, store) for number in range(count)]
    deadline = time.monotonic() + 10
    while len(lines[0]._peers) < count - 1:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return lines


def codes_of(ends, number):
    return [ends.get(timeout=10) for _ in range(number)]


def test_a_lost_process_ends_the_others(ends, capsys):
    lines = join(3)
    lines[1]._ending.set()  # its own thread is gone with it
    lines[1]._socket.shutdown(socket.SHUT_RDWR)
    assert codes_of(ends, 2) == [75, 75]
    told = capsys.readouterr().err.strip().splitlines()
    assert sum('process 1 of 3' in line and 'is gone' in line for line in told) == 2, told


def test_the_loss_of_the_first_ends_the_others(ends, capsys):
    lines = join(3)
    lines[0]._ending.set()
    for peer in list(lines[0]._peers):
        peer.shutdown(socket.SHUT_RDWR)
    assert codes_of(ends, 2) == [75, 75]
    assert capsys.readouterr().err.count('process 0 of 3 is gone') == 2


@pytest.mark.parametrize('failing', [0, 2])
def test_one_reason_is_told_by_all(ends, capsys, failing):
    lines = join(3)
    lines[failing].fail(2, 'Train.steps is 0;\nit must be at least 1.')
    if failing:  # its process ends now
        lines[failing]._socket.shutdown(socket.SHUT_RDWR)
    assert codes_of(ends, 2) == [2, 2]
    told = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(told) == 2 and len(set(told)) == 1
    assert f'process {failing} of 3' in told[0] and told[0].endswith('failed: Train.steps is 0; it must be at least 1.')


def test_leaving_in_peace_ends_nobody(ends, capsys):
    for order in (1, -1):
        for line in join(3)[::order]:
            line.close()
    time.sleep(0.3)
    assert ends.empty() and not capsys.readouterr().err


def test_strangers_are_turned_away(ends, capsys):
    store = Store()
    lines = join(2, store)
    port = int(store.values['lifeline'].split()[0])
    with socket.create_connection(('localhost', port)) as stranger:
        stranger.sendall(b'GET / HTTP/1.0\n')
        assert stranger.recv(100) == b''
    socket.create_connection(('localhost', port)).close()
    assert list(lines[0]._peers.values()) == [f'process 1 of 2 ({socket.gethostname()})']
    for line in lines:
        line.close()
    time.sleep(0.2)
    assert ends.empty() and not capsys.readouterr().err
