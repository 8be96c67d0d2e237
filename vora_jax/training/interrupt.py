"""Ctrl-C and preemption, asked for politely."""
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

CTRL_C, SIGTERM = 'Ctrl-C', 'SIGTERM'


class StopRequest:
    """Whether someone asked the run to stop after the present step."""

    def __init__(self) -> None:
        self._by_ctrl_c = False

    def at(self, step: int) -> str:
        """Why the run must stop after this step (`CTRL_C`, `SIGTERM`), or ''. When one process of a run must, all do.

        JAX's coordination service tells all processes of a SIGTERM, or a cloud's notice, that one of them got; they agree on
        the step.
        """
        several = jax.process_count() > 1
        if self._by_ctrl_c and not several:
            return CTRL_C
        if jax.distributed.is_initialized() and multihost_utils.reached_preemption_sync_point(step):
            return CTRL_C if self._by_ctrl_c else SIGTERM
        return ''

    def ctrl_c(self, *_: object) -> None:
        """The signal handler: the first one asks, the second one ends the process."""
        if self._by_ctrl_c:
            # Steps are committed atomically, so nothing half-written counts.
            os._exit(130)
        self._by_ctrl_c = True
        sys.stderr.write('\nvora: finishing the step, then saving; Ctrl-C again aborts.\n')
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)  # one process must not leave alone


@contextlib.contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Watches for Ctrl-C (in the main thread only) and, with `jax.distributed`, SIGTERM."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    previous = signal.signal(signal.SIGINT, request.ctrl_c)
    try:
        yield request
    finally:
        signal.signal(signal.SIGINT, previous)
