"""Random access to JSON-lines files."""
from typing import Any, Iterator

import numpy as np

from vora_jax.data.sources.parse_json import parse_json
from vora_jax.data.sources.span_index import Chunks, SpanIndex
from vora_jax.types import UserError

_NEWLINE, _RETURN = b'\n\r'


class JsonLines:
    """The rows of a JSON-lines file by number, without reading the file into memory; empty lines are no rows.

    Picklable and safe to share between threads, see `SpanIndex`.

    Args:
        path: the file, local or remote.
        cache: local folder that keeps the index; '' keeps nothing.
    Attributes:
        path: the file.
        sha256: of its content.
    Raises:
        UserError: the file does not exist, cannot be read, or has no rows.
    """

    def __init__(self, path: str, cache: str = ''):
        self._spans = SpanIndex(path, cache, 'lines', find_lines)
        self.path, self.sha256 = path, self._spans.sha256
        if not len(self):
            raise UserError(f'{path} is empty; it needs at least one JSON line.')

    def __len__(self) -> int:
        return len(self._spans)

    def where(self, row: int) -> str:
        """File and line number (from 1) of a row, for messages."""
        return f'{self.path} row {self._spans.place(row)}'

    def __getitem__(self, row: int) -> Any:
        """The parsed row; UserError if it is not JSON."""
        where = self.where(row)
        return parse_json(self._spans.read(row, where), where)


def find_lines(path: str, chunks: Chunks) -> Iterator[np.ndarray]:
    """The lines without their ends, for `SpanIndex`; a line that holds nothing stops before it starts."""
    start, stop, last = None, 0, 0  # start: of the line that is not over;  last: byte of the chunk before
    for offset, chunk in chunks:
        content = np.frombuffer(chunk, np.uint8)
        breaks = np.flatnonzero(content == _NEWLINE)
        start, stop = offset if start is None else start, offset + len(chunk)
        if len(breaks):
            lines = np.empty((len(breaks), 2), np.int64)
            lines[:, 1] = breaks + offset
            lines[0, 0], lines[1:, 0] = start, lines[:-1, 1] + 1
            before = content[breaks - 1]
            before[0] = before[0] if breaks[0] else last
            start = int(lines[-1, 1]) + 1
            yield _without_blank(lines, before)
        last = chunk[-1]
    if start is not None and stop > start:
        yield _without_blank(np.array([[start, stop]]), np.array([last]))


def _without_blank(lines: np.ndarray, last: np.ndarray) -> np.ndarray:
    """The lines, blank ones marked.

    Args:
        lines: i64[lines, 2].
        last: u8[lines] last byte of each, where it has one.
    """
    length = lines[:, 1] - lines[:, 0]
    lines[(length == 0) | ((length == 1) & (last == _RETURN)), 1] = -1
    return lines
