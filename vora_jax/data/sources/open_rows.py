"""Opens a source by what its path is."""
import json
import os

from vora_jax.data.sources import files
from vora_jax.data.sources.compression import find_compression
from vora_jax.data.sources.json_lines import JsonLines
from vora_jax.data.sources.json_list import JsonList
from vora_jax.data.sources.parquet_rows import ParquetRows
from vora_jax.data.sources.prepared_rows import MANIFEST, VERSION, PreparedRows
from vora_jax.data.sources.remote import reason
from vora_jax.data.sources.rows import Rows
from vora_jax.data.sources.tar_rows import TarRows
from vora_jax.types import UserError

_START = 1 << 16
_TARS = ('.tar', '.tgz', '.tar.gz', '.tar.bz2', '.tar.xz', '.tar.zst')  # it tells that packed ones cannot be read
_ENDINGS = ('.parquet', '.tar', '.jsonl', '.json')


def open_rows(path: str, cache: str = '') -> Rows:
    """The rows of a path, local or remote (`gs://...`).

    A folder made by `vora prepare`; Parquet files; tars; JSON lines, or a JSON list. `*` and braces name several Parquet
    files or tars as one source, see `files.expand`.

    Args:
        path: of the folder or the files.
        cache: local folder that keeps what is slow to find out about a file; '' keeps nothing.
    Raises:
        UserError: the path does not exist, holds no rows, or is of an unknown kind.
    """
    if _is_folder(path):
        return _open_folder(path)
    names = files.expand(path)
    if all(name.endswith('.parquet') for name in names):
        return ParquetRows(path)
    if all(name.endswith(_TARS) for name in names):
        return TarRows(path, cache)
    if len(names) > 1:
        raise UserError(f'{path} names {len(names)} files, {names[0]} and others; only Parquet files, or tars, can be one '
                        'source together: give each of these a Source.')
    return _open_json(names[0], cache)


def _is_folder(path: str) -> bool:
    if files.is_remote(path) and path.endswith((*_ENDINGS, *_TARS)):
        return False  # a web server would have to send the whole file to tell
    try:
        return files.is_folder(path)
    except OSError as error:
        raise UserError(f'{path} cannot be reached ({reason(error)}); correct the path.') from error


def _open_json(path: str, cache: str) -> Rows:
    try:
        start = files.RangedFile(path).read(0, _START)
    except OSError as error:
        raise UserError(f'{path} cannot be read ({reason(error)}); name a file that can.') from error
    if start[:4] == b'PAR1' or start[257:262] == b'ustar':
        kind = '.parquet' if start[:4] == b'PAR1' else '.tar'
        raise UserError(f'{path} holds a {kind} file; give it that ending.')
    packed = find_compression(start)
    if packed:
        raise UserError(f'{path} is compressed with {packed}, which cannot be read at any place; unpack it.')
    if start[:2] in (b'\xff\xfe', b'\xfe\xff'):
        raise UserError(f'{path} is text in UTF-16; save it as UTF-8.')
    if b'\0' in start.partition(b'\n')[0]:  # further rows may be damaged: they are left out one by one
        raise UserError(f'{path} is neither text nor Parquet nor tar; name a .json, .jsonl, .parquet or .tar file, or a '
                        'folder made by `vora prepare`.')
    if start.removeprefix(b'\xef\xbb\xbf').lstrip()[:1] == b'[':
        return JsonList(path, cache)
    return JsonLines(path, cache)


def _open_folder(path: str) -> Rows:
    manifest = files.join(path, MANIFEST)
    try:
        with files.open_binary(manifest) as file:
            version = json.load(file)['version']
    except OSError:
        raise UserError(f'{path} is a folder without {MANIFEST}; {_advice(path)}') from None
    except (ValueError, TypeError, KeyError):
        version = VERSION  # damaged: its reader tells
    if version != VERSION:
        raise UserError(f'{path} is a folder of files; {_advice(path)}')
    if files.is_remote(path):
        raise UserError(f'{path}: a prepared folder is read from a local path; mount the bucket, or copy the folder.')
    return PreparedRows(files.local(path))


def _advice(path: str) -> str:
    try:
        names = [os.path.basename(name) for name in files.expand(files.join(path, '*'))]
    except UserError:
        return 'it is empty.'
    for ending in _ENDINGS:
        found = [name for name in names if name.endswith(ending) and name != MANIFEST]
        if found:
            together = len(found) > 1 and ending in ('.parquet', '.tar')
            return (f'it holds {found[0]}{" and others" * (len(found) > 1)}: name '
                    f'{files.join(path, f"*{ending}" if together else found[0])}.')
    return files.describe(path)
