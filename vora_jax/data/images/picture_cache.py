"""The most recently used pictures."""
import collections
import threading
from typing import Any, Callable, Hashable

from vora_jax.data.packing import Picture


class PictureCache:
    """The most recently used pictures up to a number of bytes. Thread-safe; pickled empty.

    A key stands for all pictures that a policy makes of one file.
    """

    def __init__(self, max_bytes: int):
        self._max_bytes = max_bytes
        self.__setstate__({'_max_bytes': max_bytes})

    def get(self, key: Hashable, load: Callable[[], list[Picture]]) -> list[Picture]:
        """The pictures of this key, loaded if they are not there; what `load` raises passes through."""
        with self._lock:
            if key in self._pictures:
                self._pictures.move_to_end(key)
                return self._pictures[key]
        pictures = load()
        with self._lock:
            if key not in self._pictures:
                self._pictures[key] = pictures
                self._bytes += _num_bytes(pictures)
            while self._bytes > self._max_bytes:
                self._bytes -= _num_bytes(self._pictures.popitem(last=False)[1])
        return pictures

    def __getstate__(self) -> dict[str, Any]:
        return {'_max_bytes': self._max_bytes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._max_bytes = state['_max_bytes']
        self._pictures: collections.OrderedDict[Hashable, list[Picture]] = collections.OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()


def _num_bytes(pictures: list[Picture]) -> int:
    return sum(picture.pixels.nbytes for picture in pictures)
