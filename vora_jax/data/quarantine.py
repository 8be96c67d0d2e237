"""The file that names unusable samples."""
import fcntl
import json
import logging
import os
import threading
from typing import Any

from vora_jax.types import UserError

log = logging.getLogger(__name__)

MAX_TOLD = 100  # samples that a process logs; the file has all


class Quarantine:
    """JSON lines `{source, row, where, reason}`, one for each sample that could not be used. Picklable, thread-safe.

    Several processes of a host may share the file: it is locked while one looks whether a sample is there and adds it.

    Attributes:
        path: the file; '' keeps the samples in memory only.
    """

    def __init__(self, path: str):
        self.path = path
        self.__setstate__({})

    def add(self, source: str, row: int, where: str, reason: str) -> bool:
        """Notes a sample (`row` counts from 0); False if it was noted before."""
        with self._lock:
            if (source, row) in self._reasons:
                return False
            if self.path and not self._write(source, row, where, reason):
                return False
            self._reasons[source, row] = reason
            self._told += 1
        if self._told <= MAX_TOLD:
            # A file name may hold what is no text: no terminal could show it.
            log.warning('left out a sample: %s', reason.encode(errors='backslashreplace').decode())
        if self._told == MAX_TOLD:
            log.warning('more samples that are left out are not told here%s', self.path and f', but in {self.path}')
        return True

    def _write(self, source: str, row: int, where: str, reason: str) -> bool:
        line = json.dumps({'source': source, 'row': row, 'where': where, 'reason': reason}, ensure_ascii=False)
        try:
            with open(self.path, 'a+b') as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                self._read_on(file)
                if (source, row) in self._reasons:
                    return False
                file.seek(0, os.SEEK_END)
                file.write(line.encode('utf-8', 'backslashreplace') + b'\n')
                file.flush()
                self._offset = file.tell()
        except OSError as error:
            raise UserError(f'{self.path} cannot be written ({error.strerror}); it must name a sample that was left out: '
                            f'{reason}') from error
        return True

    @property
    def reasons(self) -> list[str]:
        """Why, of each sample noted so far."""
        with self._lock:
            if self.path and os.path.exists(self.path):
                with open(self.path, 'rb') as file:
                    self._read_on(file)
            return list(self._reasons.values())

    def _read_on(self, file: Any) -> None:
        """What was added since this process last looked; a line cut off by a crash is finished first."""
        if os.fstat(file.fileno()).st_size < self._offset:  # somebody emptied it
            self._offset = 0
        file.seek(self._offset)
        content = file.read()
        if content and not content.endswith(b'\n'):
            content = content[:content.rfind(b'\n') + 1]
            if file.writable():
                file.truncate(self._offset + len(content))
        for line in content.splitlines():
            try:
                found = json.loads(line)
                self._reasons.setdefault((found['source'], found['row']), found['reason'])
            except (ValueError, KeyError, TypeError):  # somebody edited it: training need not stop for that
                continue
        self._offset += len(content)

    def __getstate__(self) -> dict[str, Any]:
        return {'path': self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock(), _offset=0, _reasons={}, _told=0)
