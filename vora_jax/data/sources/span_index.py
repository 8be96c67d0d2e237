"""The bytes of each row of a file."""
import hashlib
import os
from typing import Any, Callable, Iterable, Iterator

import numpy as np

from vora_jax.data.sources import span_cache
from vora_jax.data.sources.files import RangedFile, status
from vora_jax.data.sources.remote import is_remote, reason
from vora_jax.data.sources.span_cache import Spans
from vora_jax.types import UserError

_BLOCK = 1 << 22  # read at once: a remote file answers slowly
_CHUNK = 1 << 18  # searched at once: what is computed of it stays in the processor's cache
_BOM = b'\xef\xbb\xbf'
_MAX_ROW = 1 << 28

Chunks = Iterable[tuple[int, bytes]]  # offset in the file, and what is there
Finder = Callable[[str, Chunks], Iterator[np.ndarray]]


class SpanIndex:
    """The bytes of the rows of a file by number; neither the file nor its rows are held in memory.

    The first time one pass over the file finds its rows and hashes it. Picklable (the file is opened again; where the index
    is kept in a folder, it is memory-mapped again) and safe to share between threads.

    Args:
        path: the file.
        cache: local folder that keeps the index of this version of the file; '' keeps nothing.
        kind: name of what `find` finds.
        find: places in their order, parts of an i64[places, 2] each, of (the path for messages, chunks of the file). A
            place that stops before it starts is no row, only counted.
    Attributes:
        sha256: of the file's content.
    Raises:
        UserError: the file cannot be read, or what `find` raises.
    """

    def __init__(self, path: str, cache: str, kind: str, find: Finder):
        self._file = RangedFile(path)
        try:
            name = _name(path, cache, kind)
            kept = span_cache.load(name) if name else None
            if kept is None:
                spans = _scan(self._file, find)
                # Not if the file has changed meanwhile: this is the index of neither version.
                if name and len(spans.table) and name == _name(path, cache, kind) and span_cache.save(name, spans):
                    kept = span_cache.load(name)
        except OSError as error:
            raise UserError(f'{path} cannot be read ({reason(error)}); name a file that can.') from error
        self._kept = name if kept else ''
        self._open(kept or spans)

    def __len__(self) -> int:
        return len(self._table)

    def place(self, row: int) -> int:
        """Number of the row from 1, places without a row counted."""
        before = int(np.searchsorted(self._gaps[:, 0], row, side='right')) if len(self._gaps) else 0
        return row + 1 + (int(self._gaps[before - 1, 1]) if before else 0)

    def read(self, row: int, where: str) -> bytes:
        """The bytes of the row.

        Args:
            row: its number from 0.
            where: file and row, for messages.
        Raises:
            UserError: they cannot be read, or are more than 256 MiB.
        """
        start, stop = self._table[row].tolist()
        if stop - start > _MAX_ROW:
            raise UserError(f'{where}: the row has {stop - start} bytes, more than {_MAX_ROW}; repair or remove it.')
        try:
            content = self._file.read(start, stop - start)
        except OSError as error:
            raise UserError(f'{where}: cannot be read ({reason(error)}).') from error
        if len(content) < stop - start:
            raise UserError(f'{where}: the file has become shorter since it was indexed; start again.')
        return content

    def _open(self, spans: Spans) -> None:
        self.sha256, self._table, self._gaps = spans

    def __getstate__(self) -> dict[str, Any]:
        if self._kept:
            return {'_file': self._file, '_kept': self._kept}
        return self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._kept:
            spans = span_cache.load(self._kept, check=False)
            if spans is None:
                raise UserError(f'{self._kept}.npy is gone; leave the cache of the data alone while a run uses it.')
            self._open(spans)


def _name(path: str, cache: str, kind: str) -> str:
    """The file of a cache for the present version of a file; '' without a cache."""
    if not cache:
        return ''
    key = '\n'.join([path if is_remote(path) else os.path.abspath(path), status(path).version])
    return os.path.join(cache, f'{kind}-{hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()[:32]}')


def _scan(file: RangedFile, find: Finder) -> Spans:
    digest = hashlib.sha256()

    def chunks() -> Iterator[tuple[int, bytes]]:
        offset = len(_BOM) if file.read(0, len(_BOM)) == _BOM else 0
        digest.update(_BOM[:offset])
        while offset < file.size and (block := file.read(offset, min(_BLOCK, file.size - offset))):
            digest.update(block)
            for start in range(0, len(block), _CHUNK):
                yield offset + start, block[start:start + _CHUNK]
            offset += len(block)

    table, gaps = bytearray(), bytearray()  # they grow in place: the whole table is never copied
    rows = skipped = told = 0  # skipped: places without a row;  told: as many as the gaps say
    for spans in find(file.path, chunks()):
        held = spans[:, 0] <= spans[:, 1]
        if skipped > told or not held.all():
            before = skipped + np.cumsum(~held)[held]
            changed = np.flatnonzero(np.diff(before, prepend=told))
            gaps += np.stack([rows + changed, before[changed]], axis=1).tobytes()
            told = int(before[-1]) if len(before) else told
            skipped += int((~held).sum())
            spans = spans[held]
        table += spans.tobytes()
        rows += len(spans)
    return Spans(digest.hexdigest(), *(np.frombuffer(part, np.int64).reshape(-1, 2) for part in (table, gaps)))
