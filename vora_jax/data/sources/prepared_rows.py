"""Rows of a folder that `vora prepare rows` made.

    DIR/manifest.json                               counts, statistics, sizes and hashes of the files
    DIR/rows-00000-of-00004.array_record            a record is one row, as JSON
    DIR/pictures-00000-of-00004.array_record        a record is one picture file as it was; used by the rows of this part

A row's `frames` (or `video`) are `{"picture": 17, "height": 480, "width": 640, "bytes": 51234}`: the number of the picture
in its part, its size as it is to be seen, and the length of its file.
"""
import functools
import hashlib
import io
import json
import os
import pathlib
from typing import Any

import numpy as np

from vora_jax.data.frame import Frame
from vora_jax.data.sources.record_files import RecordFiles
from vora_jax.types import UserError

VERSION = 2
MANIFEST = 'manifest.json'


def part_files(part: int, count: int) -> tuple[str, str]:
    """Names of a part's files of rows and of pictures."""
    return tuple(f'{kind}-{part:05}-of-{count:05}.array_record' for kind in ('rows', 'pictures'))


class PreparedRows:
    """The rows of the folder by number; a row is read without its pictures. See `rows.Rows`.

    Attributes:
        path: the folder.
        sha256: of the manifest, which holds the hashes of all files.
    Raises:
        UserError: the folder is none of these, or one of its files is missing or not the one that was written. Sizes and
            numbers of records are compared, hashes are not.
    """

    def __init__(self, path: str):
        self.path = path
        manifest, self.sha256 = _read_manifest(path)
        parts = manifest['parts']
        self._ends = np.cumsum(parts)
        self._names = [part_files(part, len(parts)) for part in range(len(parts))]
        self._files = RecordFiles(path)
        pictures = manifest['pictures']
        for (rows_file, pictures_file), *counts in zip(self._names, parts, pictures, strict=True):
            for name, count in zip((rows_file, pictures_file), counts):
                self._check(name, manifest['bytes'][name], count)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def where(self, row: int) -> str:
        """Folder and row (from 1), for messages."""
        return f'{self.path} row {row + 1}'

    def __getitem__(self, row: int) -> Any:
        """The row with `Frame`s; UserError if it is damaged."""
        part = int(np.searchsorted(self._ends, row, side='right'))
        rows_file, pictures_file = self._names[part]
        number = row - (int(self._ends[part - 1]) if part else 0)
        try:
            record = json.loads(self._files.read(rows_file, number))
            for key in ('frames', 'video'):
                if key in record:
                    record[key] = [self._frame(pictures_file, **frame) for frame in record[key]]
        except UserError as error:
            raise UserError(f'{self.where(row)}: {error}') from error
        except (ValueError, TypeError) as error:  # every byte is as it was written: by something else
            raise UserError(f'{self.where(row)}: {rows_file} record {number} is no row that `vora prepare rows` wrote '
                            f'({error}); prepare the folder again.') from error
        return record

    def _frame(self, file: str, picture: int, height: int, width: int, bytes: int) -> Frame:
        opened = functools.partial(_open, self._files, file, picture, bytes)
        return Frame(f'{os.path.join(self.path, file)} {picture}', opened, (height, width))

    def _check(self, name: str, size: int, count: int) -> None:
        path = os.path.join(self.path, name)
        try:
            found = os.path.getsize(path)
        except OSError as error:
            raise UserError(f'{path} is missing ({error.strerror}); copy it again, or prepare the folder again.') from error
        records = self._files.count(name) if found == size else 0
        if (found, records) != (size, count):
            raise UserError(f'{path} is not the file that was written: it has {found} bytes and {records} records, not '
                            f'{size} and {count}; copy it again, or prepare the folder again.')


def _open(files: RecordFiles, name: str, picture: int, size: int) -> io.BytesIO:
    content = files.read(name, picture)
    if len(content) != size:
        raise UserError(f'{os.path.join(files.folder, name)}: picture {picture} has {len(content)} bytes, its row says '
                        f'{size}; the files of the folder belong to different runs, copy or prepare them again.')
    return io.BytesIO(content)


def _read_manifest(path: str) -> tuple[dict[str, Any], str]:
    """(manifest, its sha256)."""
    file = pathlib.Path(path, MANIFEST)
    try:
        content = file.read_bytes()
        manifest = json.loads(content)
        version = manifest['version']
    except OSError as error:
        raise UserError(f'{file} cannot be read ({error.strerror}); name a folder that `vora prepare rows` '
                        'finished.') from error
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f'{file} is no manifest of `vora prepare`; prepare the folder again.') from error
    if version == 1:
        lines = [name for name in manifest.get('files', ()) if name.endswith('.jsonl')]
        advice = f'name one of its files, {", ".join(lines)}' if lines else 'name a file or folder of samples'
        raise UserError(f'{path} is not a folder of rows; {advice}.')
    if version != VERSION:
        raise UserError(f'{path} was prepared by another version ({version}, not {VERSION}); prepare it again.')
    try:
        tables = [[int(count) for count in manifest[name]] for name in ('parts', 'pictures')]
        sizes = {name: int(size) for name, size in manifest['bytes'].items()}
        if not sum(tables[0]) or len(tables[0]) != len(tables[1]) or not all(
                name in sizes for part in range(len(tables[0])) for name in part_files(part, len(tables[0]))):
            raise ValueError
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f'{file} does not tell the files of its folder; prepare the folder again.') from error
    return manifest, hashlib.sha256(content).hexdigest()
