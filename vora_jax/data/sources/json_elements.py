"""Finds the elements of a JSON list."""
from typing import Iterator

import numpy as np

from vora_jax.data.sources.span_index import Chunks
from vora_jax.types import UserError

SPACE = b' \t\r\n'

_BACKSLASH = ord('\\')
_QUOTE, _OPEN, _CLOSE, _COMMA = 1, 2, 3, 4
_KIND = {'"': _QUOTE, '[': _OPEN, '{': _OPEN, ']': _CLOSE, '}': _CLOSE, ',': _COMMA}
_KINDS = np.array([_KIND.get(chr(byte), 0) for byte in range(256)], np.uint8)
_STEPS = np.array([0, 0, 1, -1, 0], np.int8)  # of the depth, by kind


def find_elements(path: str, chunks: Chunks) -> Iterator[np.ndarray]:
    """The elements of the list with the space around them, for `SpanIndex`.

    An element ends at a comma, or at the end of the list, that is in no string and no inner list or object. What kind a
    bracket is does not matter, so most elements that are malformed inside leave their neighbours whole.

    Raises:
        UserError: the file is not one list, or ends before the list does.
    """
    scan, start, rows, ended = _Scan(), None, 0, False  # start: of the element that is not over, then of what follows
    for offset, chunk in chunks:
        if start is None:
            held = chunk.lstrip(SPACE)
            if not held:
                continue
            if not held.startswith(b'['):
                raise UserError(f'{path} is not a JSON list, it does not begin with `[`; name a file of JSON lines '
                                '`.jsonl`, and put other rows in a list.')
            start = offset = offset + len(chunk) - len(held) + 1
            chunk = held[1:]
        if not ended:
            stops, ended = scan.advance(chunk)
            if len(stops):
                stops += offset
                yield np.stack([np.append(start, stops[:-1] + 1), stops], axis=1)
                start, rows = int(stops[-1]) + 1, rows + len(stops)
            if not ended:
                continue
            end, offset, chunk = chunk[start - offset - 1:start - offset], start, chunk[start - offset:]
            if end != b']':
                raise UserError(f'{path} is not one JSON list: a `}}` ends it after {rows} rows, at byte {start - 1}; '
                                'repair the row before.')
        if held := chunk.lstrip(SPACE):
            raise UserError(f'{path} is not one JSON list: its end after {rows} rows is followed by more, at byte '
                            f'{offset + len(chunk) - len(held)}; repair the row before, or remove what follows.')
    if start is None:
        raise UserError(f'{path} is empty; it needs a JSON list of rows.')
    if not ended:
        raise UserError(f'{path}: the list has no end, row {rows + 1} from byte {start} on is cut off or malformed; '
                        'get the file again, or repair that row.')


class _Scan:
    """What has to be known from one chunk of a list to the next; it begins behind the list's bracket."""

    def __init__(self):
        self._escaped = False  # a backslash stands before the next byte
        self._in_string = False
        self._depth = 1

    def advance(self, chunk: bytes) -> tuple[np.ndarray, bool]:
        """(where elements end in the chunk, i64; whether the list ends with the last of them)."""
        content = np.frombuffer(chunk, np.uint8)
        brackets = content | 32  # turns [ into { and ] into }, and nothing else into these
        marked = (content == ord('"')) | (content == ord(',')) | (brackets == ord('{')) | (brackets == ord('}'))
        escaped = self._find_escaped(content)
        marked[escaped[content[escaped] == ord('"')]] = False
        places = np.flatnonzero(marked)
        kinds = _KINDS[content[places]]
        quotes = kinds == _QUOTE
        inside = np.logical_xor.accumulate(quotes) ^ self._in_string  # of a quote: whether it begins a string
        self._in_string = bool(inside[-1]) if len(inside) else self._in_string
        outside = np.flatnonzero(~(quotes | inside))
        places, kinds = places[outside], kinds[outside]
        depths = self._depth + np.cumsum(_STEPS[kinds], dtype=np.int64)
        self._depth = int(depths[-1]) if len(depths) else self._depth
        cuts, ends = np.flatnonzero((kinds == _COMMA) & (depths == 1)), np.flatnonzero(depths == 0)
        if len(ends):
            return places[np.append(cuts[cuts < ends[0]], ends[0])], True
        return places[cuts], False

    def _find_escaped(self, content: np.ndarray) -> np.ndarray:
        """Places of the bytes with an effective backslash before them: after the first, third, ... of a run."""
        slashes = np.flatnonzero(content == _BACKSLASH)
        if self._escaped:  # the backslash before the chunk is the first of the run that may follow
            slashes = np.append(-1, slashes)
        first = np.diff(slashes, prepend=-9) != 1
        begins = np.maximum.accumulate(np.where(first, slashes, -9))
        escaped = slashes[(slashes - begins) % 2 == 0] + 1
        self._escaped = len(escaped) > 0 and int(escaped[-1]) == len(content)
        return escaped[escaped < len(content)]
