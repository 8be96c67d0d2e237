"""The most recently used pictures."""
import collections
import threading
from typing import Any, Callable, Hashable

from vora_jax.data.packing import Picture


class PictureCache:
    """The most recently used pictures up to a number of bytes. Thread-safe; pickled empty."""

    def __init__(self, max_bytes: int):
        self._max_bytes = max_bytes
        self.__setstate__({'_max_bytes': max_bytes})

    def get(self, key: Hashable, load: Callable[[], Picture]) -> Picture:
        """The picture of this key, loaded if it is not there; what `load` raises passes through."""
        with self._lock:
            if key in self._pictures:
                self._pictures.move_to_end(key)
                return self._pictures[key]
        picture = load()
        with self._lock:
            if key not in self._pictures:
                self._pictures[key] = picture
                self._bytes += picture.pixels.nbytes
            while self._bytes > self._max_bytes:
                self._bytes -= self._pictures.popitem(last=False)[1].pixels.nbytes
        return picture

    def __getstate__(self) -> dict[str, Any]:
        return {'_max_bytes': self._max_bytes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._max_bytes = state['_max_bytes']
        self._pictures: collections.OrderedDict[Hashable, Picture] = collections.OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()
