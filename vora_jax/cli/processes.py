"""Joins the processes of a run."""

import contextlib
import logging
import os
import socket
import sys
import threading
import traceback
from collections.abc import Iterator
from typing import NoReturn

import jax
from jax._src import distributed  # the coordinator that JAX found, and its key-value store: nothing public tells them

from vora_jax.cli.cluster import Place, this_place
from vora_jax.cli.lifeline import Lifeline
from vora_jax.types import RETRY, TryAgain, UserError

log = logging.getLogger(__name__)

JOIN_SECONDS = 300  # machines of a pod start minutes apart
JOIN_GRACE_SECONDS = 60  # how much later JAX gives up itself: it aborts the process, with a C++ stack
HEARTBEAT_SECONDS = 30  # JAX's default leaves a pod idle for 100 s after one of its hosts died
# One process waits for nobody, and JAX aborts a process that missed its own heartbeats: it must outlast
# Ctrl-Z, a laptop's sleep, a paused virtual machine.
ALONE_SECONDS = 30 * 24 * 3600
SHUTDOWN_SECONDS = 30


class Joined:
    """The processes of a run, of which this one has the number `number`."""

    def __init__(self, number: int = 0, lifeline: Lifeline | None = None):
        self.number, self.lifeline = number, lifeline

    def leave(self, code: int, reason: str) -> NoReturn:
        """Ends this process at once and, while they are joined, the others with it, whatever they wait for; `reason` is for
        them."""
        try:
            if self.lifeline:
                self.lifeline.fail(code, reason)
            sys.stdout.flush()
            sys.stderr.flush()
        finally:  # whatever fails here, such as a pipe that nobody reads
            os._exit(code)

    def hang(self, reason: str) -> NoReturn:
        """As `leave`, with the exit code of a run that may be tried again."""
        self.leave(RETRY, reason)


@contextlib.contextmanager
def join_processes(place: Place | None = None) -> Iterator[Joined]:
    """Initialises `jax.distributed`, for one process too, and leaves it at the end.

    One process alone initialises it as well: its reductions then run in the same order as on several, and
    SIGTERM is answered with a checkpoint. Call it before anything touches a device. Without `place` the environment
    tells it.

    Several processes end together: when one raises, the others say its reason and end within seconds; the one itself
    ends here, as `main` would end it, without JAX's farewell, for which the others would have to be alive.
    """
    place = place or this_place({})
    with contextlib.ExitStack() as stack:
        if place.kind == 'alone':
            address = stack.enter_context(_free_address())
            jax.distributed.initialize(
                address, 1, 0, coordinator_bind_address=address, cluster_detection_method='deactivate',
                heartbeat_timeout_seconds=ALONE_SECONDS, shutdown_timeout_seconds=SHUTDOWN_SECONDS,
            )
            stack.callback(jax.distributed.shutdown)
            yield Joined()
            return
        _initialize(place)
        found = distributed.global_state
        if found.num_processes == 1:
            stack.callback(jax.distributed.shutdown)
            yield Joined()
            return
        if jax.config.jax_platforms == 'cpu':
            stack.enter_context(_without_native_chatter())
        lifeline = _lifeline(found.coordinator_address, found.num_processes, found.process_id, found.client)
        joined = Joined(found.process_id, lifeline)
        try:
            yield joined
            jax.distributed.shutdown()
        except BaseException as error:
            code, told = _verdict(error)
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.write(f'vora: {told}\n' if code != 1 else ''.join(traceback.format_exception(error)))
            joined.leave(code, told)
        if lifeline:
            lifeline.close()
            joined.lifeline = None


def _initialize(place: Place) -> None:
    # On a cluster only JAX knows how many, and where.
    all_of_them = f'all {place.count} processes' if place.count else f'all processes (found by {place.kind})'
    where = f' at {place.coordinator}' if place.coordinator else ''
    log.info('waiting for %s%s, up to %d s', all_of_them, where, JOIN_SECONDS)
    told = (f'{all_of_them} of the run did not meet{where} within {JOIN_SECONDS} s; see in their logs which one did not '
            'start, or cannot reach the first, and run the same command on all of them again.')
    late = threading.Timer(JOIN_SECONDS, _give_up, [told])
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(
            place.coordinator, place.count, place.number, place.local_devices,
            cluster_detection_method='deactivate' if place.kind == 'given' else None,
            initialization_timeout=JOIN_SECONDS + JOIN_GRACE_SECONDS, heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except Exception as error:  # a cluster that does not answer, or a port in use: lateness never comes here
        raise UserError(f'the processes of the run could not join ({place.kind}: {_first_line(error)}); see that nothing '
                        f'else uses the port{where} of the first one, and start all of them with the same command.'
                        ) from error
    finally:
        late.cancel()


def _give_up(told: str) -> NoReturn:
    try:
        sys.stderr.write(f'vora: {told}\n')
        sys.stderr.flush()
    finally:
        os._exit(RETRY)


def _lifeline(coordinator: str, count: int, number: int, store: object) -> Lifeline | None:
    try:
        return Lifeline(coordinator, count, number, store)
    except Exception as error:
        log.warning('process %d cannot reach process 0 beside JAX (%s): when a process dies, the others notice after %d s.',
                    number, _first_line(error), HEARTBEAT_SECONDS)
        return None


def _verdict(error: BaseException) -> tuple[int, str]:
    """Exit code and sentence for what ended the run."""
    if isinstance(error, UserError):
        return 2, str(error)
    if isinstance(error, TryAgain):
        return RETRY, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, 'interrupted.'
    return 1, f'{type(error).__name__}: {_first_line(error)}'


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), '')


@contextlib.contextmanager
def _without_native_chatter() -> Iterator[None]:
    """Keeps what the C++ library of CPU collectives writes to standard output off the terminal: a line for each connection.

    Python's own `print` goes where it went.
    """
    sys.stdout.flush()
    kept, python = os.dup(1), sys.stdout
    with open(os.devnull, 'wb') as nowhere, os.fdopen(os.dup(1), 'w', buffering=1) as terminal:
        os.dup2(nowhere.fileno(), 1)
        sys.stdout = terminal
        try:
            yield
        finally:
            sys.stdout = python
            os.dup2(kept, 1)
            os.close(kept)


@contextlib.contextmanager
def _free_address() -> Iterator[str]:
    """A local host:port that stays ours: JAX's server crashes the process if another program takes it first.

    The socket is bound but does not listen; SO_REUSEPORT lets the server of this process bind the same port.
    """
    with socket.socket() as reserved:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        reserved.bind(('127.0.0.1', 0))
        yield f'127.0.0.1:{reserved.getsockname()[1]}'
