"""Ends the processes of a run together."""
import contextlib
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from typing import Any, NoReturn

from vora_jax.types import RETRY

CONNECT_SECONDS = 60
HEAR_SECONDS = 5  # a line comes whole
LEAVE_SECONDS = 10  # how long process 0 outlives the others: they lean on its coordination service
# A machine that is gone cannot close its connections: this many seconds without an answer tell, a little before JAX's
# heartbeats (30 s) end the process with less readable words.
KEEPALIVE = {'TCP_KEEPIDLE': 10, 'TCP_KEEPINTVL': 5, 'TCP_KEEPCNT': 3}
BYE = 'bye'


class Lifeline:
    """A connection from each process to process 0, through which the run ends everywhere at once.

    A process that fails says why; the kernel closes the connections of one that is killed. Process 0 passes the word on,
    and every process says it and ends. JAX alone would leave them waiting for each other in a collective, until its
    heartbeats fail.
    """

    def __init__(self, coordinator: str, count: int, number: int, store: Any):
        """Connects; `store` is the client of JAX's coordination service. OSError if process 0 cannot be reached."""
        self._count, self._number = count, number
        self._peers: dict[socket.socket, str] = {}
        self._ending, self._all_gone = threading.Event(), threading.Event()
        host = coordinator.rpartition(':')[0].strip('[]')
        if number == 0:
            self._token = secrets.token_hex(8)
            self._socket = _listen(host)
            store.key_value_set('lifeline', f'{self._socket.getsockname()[1]} {self._token}')
        else:
            port, token = store.blocking_key_value_get('lifeline', CONNECT_SECONDS * 1000).split()
            self._socket = socket.create_connection((host, int(port)), CONNECT_SECONDS)
            self._socket.settimeout(None)
            _keep_alive(self._socket)
            _send(self._socket, f'{token} process {number} of {count} ({socket.gethostname()})')
        target = self._serve if number == 0 else self._listen_to_first
        threading.Thread(target=target, name='lifeline', daemon=True).start()

    def fail(self, code: int, reason: str) -> None:
        """Tells the others why this process ends with this exit code; process 0 returns when they are gone."""
        self._ending.set()
        if self._number:
            _send(self._socket, f'{code} {reason}')
        else:
            self._tell_all(f'{code} process 0 of {self._count} ({socket.gethostname()}) failed: {reason}')
            self._all_gone.wait(LEAVE_SECONDS)

    def close(self) -> None:
        """Leaves in peace; the others do not mind."""
        self._ending.set()
        if self._number:
            _send(self._socket, BYE)
        else:
            self._tell_all(BYE)
        self._socket.close()

    def _listen_to_first(self) -> None:
        """The thread of all processes but the first."""
        line = _receive(self._socket)
        if not self._ending.is_set() and line != BYE:
            _end(line or f'{RETRY} process 0 of {self._count} {_GONE}')

    def _serve(self) -> None:
        """The thread of the first process."""
        verdict, deadline = '', float('inf')
        with selectors.DefaultSelector() as ready:
            ready.register(self._socket, selectors.EVENT_READ)
            while time.monotonic() < deadline and (self._peers or not (verdict or self._ending.is_set())):
                for key, _ in ready.select(timeout=1.0):
                    found = self._accept(ready) if key.fileobj is self._socket else self._hear(key.fileobj, ready)
                    if found and not verdict and not self._ending.is_set():
                        verdict, deadline = found, time.monotonic() + LEAVE_SECONDS
                        _say(found)
                        self._tell_all(found)
        self._all_gone.set()
        if verdict and not self._ending.is_set():
            os._exit(int(verdict.split()[0]))

    def _accept(self, ready: selectors.BaseSelector) -> None:
        with contextlib.suppress(OSError):  # closed meanwhile
            peer, _ = self._socket.accept()
            peer.settimeout(HEAR_SECONDS)
            token, _, name = _receive(peer).partition(' ')
            if token != self._token:  # a stranger
                peer.close()
                return
            _keep_alive(peer)
            self._peers[peer] = name
            ready.register(peer, selectors.EVENT_READ)

    def _hear(self, peer: Any, ready: selectors.BaseSelector) -> str:
        """The verdict on the run that follows from what a process says, or '' if it just leaves."""
        line = _receive(peer)
        name = self._peers[peer]
        if line and line != BYE:
            code, _, reason = line.partition(' ')
            return f'{code} {name} failed: {reason}'
        ready.unregister(peer)
        del self._peers[peer]
        peer.close()
        return '' if line == BYE else f'{RETRY} {name} {_GONE}'

    def _tell_all(self, line: str) -> None:
        for peer in list(self._peers):
            _send(peer, line)


_GONE = ('is gone: killed, crashed, or its machine stopped (its own log may tell). Run the same command to resume from '
         'the last checkpoint.')


def _end(verdict: str) -> NoReturn:
    """Says the verdict and ends the process, whatever its other threads wait for."""
    _say(verdict)
    os._exit(int(verdict.split()[0]))


def _say(verdict: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(f'\nvora: {verdict.partition(" ")[2]}\n')
        sys.stderr.flush()


def _listen(host: str) -> socket.socket:
    if host in ('localhost', '127.0.0.1'):
        return socket.create_server(('127.0.0.1', 0), backlog=1024)
    if socket.has_dualstack_ipv6():
        return socket.create_server(('', 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    return socket.create_server(('', 0), backlog=1024)


def _keep_alive(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):  # not on every system
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _send(connection: socket.socket, line: str) -> None:
    with contextlib.suppress(OSError):  # nobody there to hear it
        connection.sendall(line.replace('\n', ' ').encode() + b'\n')


def _receive(connection: socket.socket) -> str:
    """The next line; '' when the other side is gone."""
    line = b''
    with contextlib.suppress(OSError):
        while not line.endswith(b'\n'):
            part = connection.recv(1)
            if not part:
                return ''
            line += part
    return line.decode(errors='replace').strip()
