"""Random access to JSON-lines files."""
import hashlib
import json
import os
from typing import Any

import numpy as np

from vora_jax.types import UserError

_CHUNK = 1 << 26


class JsonLines:
    """The rows of a JSON-lines file by number, without reading the file into memory.

    One pass finds where each non-empty line starts and ends and hashes the file; a row is then one `pread`.
    Picklable (the file is opened again) and safe to share between threads.

    Attributes:
        path: the file.
        sha256: of its content.
    """

    def __init__(self, path: str):
        self.path = path
        self._descriptor: int | None = None
        if not os.path.isfile(path):
            raise UserError(f'{path} does not exist; correct the path, or make the data with `vora prepare`.')
        breaks, digest, offset = [], hashlib.sha256(), 0
        with open(path, 'rb') as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                breaks.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == 10) + offset)
                offset += len(chunk)
        self.sha256 = digest.hexdigest()
        stops = np.concatenate([*breaks, [offset]]).astype(np.int64)
        starts = np.concatenate([[0], stops[:-1] + 1])
        kept = np.flatnonzero(stops - starts > 1)  # not 0: drops the empty lines of CRLF files too
        self._starts, self._stops, self._lines = starts[kept], stops[kept], kept + 1
        if not len(self):
            raise UserError(f'{path} is empty; it needs at least one JSON line.')

    def __len__(self) -> int:
        return len(self._starts)

    def where(self, row: int) -> str:
        """File and line number (from 1) of a row, for messages."""
        return f'{self.path} row {self._lines[row]}'

    def __getitem__(self, row: int) -> Any:
        """The parsed row; UserError if it is not JSON."""
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_RDONLY)
        start = int(self._starts[row])
        line = os.pread(self._descriptor, int(self._stops[row]) - start, start)
        try:
            record = json.loads(line)
            if b'\\u' in line:  # half a surrogate pair is valid JSON but no text: nothing could encode it
                json.dumps(record, ensure_ascii=False).encode()
            return record
        except ValueError as error:
            raise UserError(f'{self.where(row)}: not valid JSON ({error}); repair or remove it.') from error

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, '_descriptor': None}

    def __del__(self):
        if getattr(self, '_descriptor', None) is not None:
            os.close(self._descriptor)
