"""Random access to the rows of Parquet files.

The pictures are inside, as VoRA-Recap and most data sets of the Hugging Face hub have them.
"""
import collections
import concurrent.futures
import functools
import hashlib
import io
import itertools
import threading
from typing import Any, Iterator, NamedTuple

import numpy as np

from vora_jax.data.frame import Frame
from vora_jax.data.sources import captions
from vora_jax.data.sources.files import RangedFile, expand, open_binary
from vora_jax.data.sources.parse_json import parse_json
from vora_jax.data.sources.remote import is_remote, reason
from vora_jax.types import UserError

CACHE_BYTES = 512 << 20
_TAIL = 1 << 16
_DAMAGE = (OSError, ValueError, LookupError, TypeError, ArithmeticError, MemoryError)
_READERS = 16  # footers of remote files are waited for together


class Footer(NamedTuple):
    """digest: of the footer and the size of the file.    rows: of each row group.    columns: names."""

    digest: bytes
    rows: list[int]
    columns: list[str]


class ParquetRows:
    """The rows of Parquet files by number, in the format of `records.check_record`; pictures become `Frame`s.

    Columns: `conversations` or `messages` (lists of structs, or JSON text), or a `caption` or `text`; pictures in `frames`,
    `image` or `images`, as bytes, {bytes, path} or file names, one or a list. Other columns are kept where they hold no
    bytes.

    Opening reads only the footers. A row group can be read only as a whole, so the last ones are kept, and reading in order
    is cheap; reading in random order decodes a row group for nearly each row: that is what `vora prepare` is for.
    Picklable (without the row groups that are kept) and safe to share between threads.

    Args:
        path: a file, or several by `*` and braces, see `files.expand`.
        cache_bytes: most bytes of row groups kept in memory, besides the last one.
    Attributes:
        path: as given.
        sha256: of the footers, which hold the sizes and places of all columns, and of the files' sizes; not of all bytes.
    Raises:
        UserError: a file is missing, damaged, no Parquet file or without the columns; there are no rows, or no pyarrow.
    """

    def __init__(self, path: str, cache_bytes: int = CACHE_BYTES):
        _pyarrow(path)
        self._paths = expand(path)
        with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
            footers = list(pool.map(_read_footer, self._paths))
        self.sha256 = hashlib.sha256(b''.join(footer.digest for footer in footers)).hexdigest()
        groups = [(file, group, rows) for file, footer in enumerate(footers)
                  for group, rows in enumerate(footer.rows) if rows]
        if not groups:
            raise UserError(f'{path} holds no rows; name other files.')
        self._groups = np.array([group[:2] for group in groups])
        self._starts = np.cumsum([0, *(rows for *_, rows in groups)])  # first row of each group, then the number of rows
        counts = [sum(footer.rows) for footer in footers]
        self._file_starts = np.cumsum([0, *counts])
        self.__setstate__({'path': path, '_cache_bytes': cache_bytes})

    def __len__(self) -> int:
        return int(self._starts[-1])

    def where(self, row: int) -> str:
        """File and row (from 1) in it, for messages."""
        file = int(np.searchsorted(self._file_starts, row, side='right')) - 1
        return f'{self._paths[file]} row {row - int(self._file_starts[file]) + 1}'

    def __getitem__(self, row: int) -> Any:
        """The row; UserError if its row group cannot be read, or its text is not what it should be."""
        number = int(np.searchsorted(self._starts, row, side='right')) - 1
        table = self._row_group(number)
        where = self.where(row)
        try:
            record = table.slice(row - int(self._starts[number]), 1).to_pylist()[0]
        except ValueError as error:  # text that is not UTF-8
            raise UserError(f'{where}: {error}; repair or remove the row.') from error
        return _as_record(record, where)

    def _row_group(self, number: int) -> Any:
        with self._lock:
            if number in self._tables:
                self._tables.move_to_end(number)
                return self._tables[number]
        with self._reading:  # one at a time: pyarrow uses all cores for it
            with self._lock:
                if number in self._tables:
                    return self._tables[number]
                damage = self._damaged.get(number)
            if damage:
                raise UserError(damage)
            table = self._read(number)
            with self._lock:
                self._tables[number] = table
                self._bytes += table.nbytes
                while self._bytes > self._cache_bytes and len(self._tables) > 1:
                    self._bytes -= self._tables.popitem(last=False)[1].nbytes
            return table

    def _read(self, number: int) -> Any:
        file, group = self._groups[number].tolist()
        path, rows = self._paths[file], int(self._starts[number + 1] - self._starts[number])
        pyarrow, parquet = _pyarrow(path)
        try:
            with open_binary(path) as content:
                whole = parquet.ParquetFile(content, page_checksum_verification=True)
                columns = [field.name for field in whole.schema_arrow if _is_wanted(field)]
                table = whole.read_row_group(group, columns=columns)
            if table.num_rows != rows:
                raise OSError('it has changed since it was opened')
            return table
        except (*_DAMAGE, pyarrow.ArrowException) as error:
            told = (f'{path}: row group {group + 1}, which has {rows} rows, cannot be read ({_first_line(error)}); repair '
                    'the file or name others.')
            if not is_remote(path):  # a file does not mend itself, and each of its rows would read it again
                self._damaged[number] = told
            raise UserError(told) from error

    def __getstate__(self) -> dict[str, Any]:
        dropped = ('_tables', '_bytes', '_damaged', '_lock', '_reading')
        return {key: value for key, value in self.__dict__.items() if key not in dropped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._tables: collections.OrderedDict[int, Any] = collections.OrderedDict()
        self._bytes, self._damaged = 0, {}
        self._lock, self._reading = threading.Lock(), threading.Lock()


def _as_record(row: dict[str, Any], where: str) -> dict[str, Any]:
    """The row as plain Python: nulls left out of objects, bytes as frames, JSON text or a caption as turns."""
    numbers = itertools.count(1)
    record = _plain(row, where, numbers)
    for key in captions.TURNS:
        if isinstance(record.get(key), str):
            record[key] = parse_json(record[key].encode(errors='surrogatepass'), f'{where} {key}')
    caption = captions.find_caption(record)
    return record if caption is None else captions.with_turns(record, caption, where)


def _plain(value: Any, where: str, numbers: Iterator[int]) -> Any:
    if isinstance(value, dict):
        if value and value.keys() <= {'bytes', 'path'}:
            held = value.get('path') if value.get('bytes') is None else value['bytes']
            return _plain(held, where, numbers)
        parts = {key: _plain(part, where, numbers) for key, part in value.items()}
        return {key: part for key, part in parts.items() if part is not None}
    if isinstance(value, (list, tuple)):
        return [_plain(part, where, numbers) for part in value]
    if isinstance(value, bytes):
        return Frame(f'{where} picture {next(numbers)}', functools.partial(io.BytesIO, value))
    return value if value is None or isinstance(value, (str, int, float)) else str(value)


def _is_wanted(field: Any) -> bool:
    """Whether a column is read: bytes that are no pictures are not."""
    return field.name in (*captions.PICTURES, *captions.TURNS) or 'binary' not in str(field.type)


def _read_footer(path: str) -> Footer:
    """Raises UserError if it is no Parquet file of rows that we know."""
    file = RangedFile(path)
    pyarrow, parquet = _pyarrow(path)
    try:
        tail = file.read(max(0, file.size - _TAIL), _TAIL)
        if tail[-4:] != b'PAR1' or len(tail) < 12:
            raise OSError('it does not end as one; perhaps it was cut off')
        count = int.from_bytes(tail[-8:-4], 'little') + 8
        tail = tail if count <= len(tail) else file.read(max(0, file.size - count), count)
        about = parquet.read_metadata(pyarrow.BufferReader(b'PAR1' + tail[-count:]))
        columns = about.schema.to_arrow_schema().names
        rows = [about.row_group(group).num_rows for group in range(about.num_row_groups)]
        if sum(rows) != about.num_rows or min(rows, default=0) < 0:
            raise OSError('its numbers of rows contradict each other')
    except (*_DAMAGE, pyarrow.ArrowException) as error:
        raise UserError(f'{path} is no readable Parquet file ({_first_line(error)}); repair it or name others.') from error
    if not set(columns) & {*captions.TURNS, *captions.KEYS}:
        raise UserError(f'{path} has the columns {", ".join(columns)}; it needs one of '
                        f'{", ".join((*captions.TURNS, *captions.KEYS))}.')
    return Footer(hashlib.sha256(b'%d ' % file.size + tail[-count:]).digest(), rows, columns)


def _first_line(error: Exception) -> str:
    return reason(error).partition('\n')[0]


def _pyarrow(path: str) -> tuple[Any, Any]:
    """pyarrow's library and its Parquet module, an optional extra."""
    try:
        import pyarrow.parquet
        return pyarrow.lib, pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{path}: Parquet files need pyarrow; install it with `pip install 'vora_jax[parquet]'`.") from error
