"""The next batches, ready on the devices."""
import logging
import queue
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

from vora_jax.batch import Batch
from vora_jax.training.mesh.sharding import to_device

log = logging.getLogger(__name__)

CLOSE_SECONDS = 10  # that a reader may take to end; less than the processes of a run wait for each other at the end

_LEFT_BEHIND: list[threading.Thread] = []


def is_left_behind() -> bool:
    """Whether a reader that hangs is left behind. Python, at its end, would wait for the threads that it waits for."""
    return any(thread.is_alive() for thread in _LEFT_BEHIND)


class Ready(NamedTuple):
    """A batch on the devices, and the position in the data after it."""

    batch: Batch
    position: dict[str, int]


class Prefetch:
    """Reads a loader ahead in one thread.

    The loader's own position runs ahead of training, so each batch travels with the position after it: the
    position to save is that of the last batch trained on.
    """

    def __init__(self, loader: Any, sharding: Any, depth: int = 2):
        self._loader, self._sharding = loader, sharding
        self._queue: queue.Queue = queue.Queue(depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read, name='prefetch', daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Ready]:
        return self

    def __next__(self) -> Ready:
        """The next batch; raises what reading it raised."""
        item = self._queue.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        """Stops the thread; the loader is free again, unless reading hangs: then the thread is left behind."""
        self._stop.set()
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            _LEFT_BEHIND.append(self._thread)
            log.warning('the thread that reads ahead still waits for data; it is left behind.')

    def _read(self) -> None:
        try:
            while not self._stop.is_set():
                batch = next(self._loader)
                self._put(Ready(to_device(batch, self._sharding), self._loader.get_state()))
        except BaseException as error:  # handed to the training thread
            self._put(error)

    def _put(self, item: Any) -> None:
        while not self._stop.is_set():
            try:
                return self._queue.put(item, timeout=0.2)
            except queue.Full:
                pass
