"""Ends a run in which nothing moves."""
import contextlib
import faulthandler
import os
import pathlib
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator

import jax

from vora_jax.types import RETRY

SLOW_START = 4  # the data's opening, and the first step with its compilation, may take so many times as long
OPENING, FIRST = 'opening the data', 'the first step'
DATA, STEP, SAVING = 'waiting for data', 'computing', 'saving'
# Time for the others to write down where they are: they run in step, so their dogs bark in the same moment.
GRACE_SECONDS = 5


class Watchdog:
    """A thread that wakes when the run's last sign of life is too old."""

    def __init__(self, seconds: float, folder: pathlib.Path, end: Callable[[str], None]):
        self._seconds, self._folder, self._end = seconds, folder, end
        self._closed = threading.Event()
        self._last, self._stage, self._step = time.monotonic(), OPENING, 0
        self._thread = threading.Thread(target=self._watch, name='watchdog', daemon=True)

    def beat(self, stage: str, step: int) -> None:
        """A sign of life: the run enters a stage, with `step` steps started."""
        self._last, self._stage, self._step = time.monotonic(), stage, step

    def start(self) -> None:
        """Starts to watch, unless it is switched off by 0 seconds."""
        if self._seconds:
            self._thread.start()

    def close(self) -> None:
        """Watches no more."""
        self._closed.set()

    def _watch(self) -> None:
        # The limit falls with the first sign of life: never sleep through the shorter one.
        while not self._closed.wait(min(self._left(), self._seconds)):
            if self._left() <= 0:
                return self._bark()

    def _limit(self) -> float:
        return self._seconds * (SLOW_START if self._stage in (OPENING, FIRST) else 1)

    def _left(self) -> float:
        return self._last + self._limit() - time.monotonic()

    def _bark(self) -> None:
        number = jax.process_index()
        path = self._folder / f'hang-{number}.txt'
        reason = (f'no step ended in {self._limit():g} seconds: process {number} was at {self._stage} (step {self._step}); '
                  f'{path} tells where each thread stands, and Train.hang_seconds sets the limit.')
        try:
            stacks = _stacks()
            # In a thread: the file system, or who reads what is told, may be what hangs.
            writer = threading.Thread(target=_tell, args=(path, reason, stacks), daemon=True)
            writer.start()
            if jax.process_count() > 1:
                time.sleep(GRACE_SECONDS)
            writer.join(GRACE_SECONDS)
        finally:  # whatever fails here
            self._end(reason)


def _stacks() -> str:
    """Where each thread stands; why that cannot be told, at worst."""
    try:
        with tempfile.TemporaryFile('w+', encoding='utf-8') as file:  # faulthandler wants a local one
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            return file.read()
    except OSError as error:
        return f'(no stacks: {error})'


def _tell(path: pathlib.Path, reason: str, stacks: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # closed, or nobody reads it
        sys.stderr.write(f'\n{stacks}\nvora: {reason} Run the same command to resume from the last checkpoint.\n')
        sys.stderr.flush()
    _write(path, f'{reason}\n\n{stacks}')


def _write(path: pathlib.Path, text: str) -> None:
    with contextlib.suppress(OSError):
        path.write_text(text)


@contextlib.contextmanager
def watching(seconds: float, folder: pathlib.Path, end: Callable[[str], None] | None = None) -> Iterator[Watchdog]:
    """A watchdog of the block. When no sign of life comes for `seconds` (0: never mind), it writes the stacks of all
    threads to stderr and to `folder`/hang-PROCESS.txt, and ends the process.

    A thread that is stuck inside a device or a file system cannot be stopped, only the whole process can; whatever started
    it may then start it again.

    Args:
        seconds: from one sign of life to the next; until the first step is done, `SLOW_START` times as long.
        folder: of the run.
        end: ends the process for the reason it is given, and the other processes with it; by default this process alone.
    """
    dog = Watchdog(seconds, folder, end or (lambda reason: os._exit(RETRY)))
    dog.start()
    try:
        yield dog
    finally:
        dog.close()
