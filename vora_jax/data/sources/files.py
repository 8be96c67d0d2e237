"""Local and remote files by one name.

A path with `://` is remote and read through fsspec (`gs://`, `s3://`, `memory://`, ...), which is an optional extra; every
other path, and `file://`, is local. What a remote store raises is an `OSError` here, whatever its library calls it.
"""
import glob
import io
import itertools
import os
import re
import stat
import threading
from typing import Any, BinaryIO, NamedTuple

from vora_jax.data.frame import Frame
from vora_jax.data.sources.remote import as_os_error, file_system, is_remote, reason
from vora_jax.types import UserError

_BLOCK = 1 << 22
_MAX_READ = 1 << 30  # Linux gives at most 2 GiB a call
_SHOWN = 5
_VERSIONS = ('generation', 'etag', 'ETag', 'md5Hash', 'mtime', 'LastModified', 'last_modified', 'created')


class Status(NamedTuple):
    """size: bytes.    version: changes whenever the content does."""

    size: int
    version: str


class RangedFile:
    """Any part of a file, by offset. Picklable (the file is opened again) and safe to share between threads.

    Attributes:
        path: the file.
        size: bytes.
    Raises:
        UserError: there is no such file, or no way to read it.
    """

    def __init__(self, path: str):
        try:
            self.size = status(path).size
        except FileNotFoundError as error:
            raise UserError(f'{path} does not exist; correct the path, or make the data with `vora prepare`.') from error
        except OSError as error:
            raise UserError(f'{path} cannot be read ({reason(error)}); name a file that can.') from error
        self.path = path
        self.__setstate__({})

    def read(self, offset: int, count: int) -> bytes:
        """`count` bytes from `offset`; fewer where the file ends.

        Raises:
            OSError: reading failed; its text says why.
        """
        if not is_remote(self.path):
            return self._read_local(offset, count)
        stop = min(offset + count, self.size)
        if stop <= offset:
            return b''
        system, name = file_system(self.path)
        with as_os_error(self.path):
            return system.cat_file(name, start=offset, end=stop)

    def _read_local(self, offset: int, count: int) -> bytes:
        with self._lock:
            if self._descriptor is None:
                self._descriptor = os.open(local(self.path), os.O_RDONLY)
        parts = []
        while count > 0:
            part = os.pread(self._descriptor, min(count, _MAX_READ), offset)
            if not part:
                break
            parts.append(part)
            offset, count = offset + len(part), count - len(part)
        return parts[0] if len(parts) == 1 else b''.join(parts)

    def __getstate__(self) -> dict[str, Any]:
        return {'path': self.path, 'size': self.size}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._descriptor: int | None = None
        self._lock = threading.Lock()

    def __del__(self, close: Any = os.close):  # bound now: at exit the module may be gone first
        if getattr(self, '_descriptor', None) is not None:
            close(self._descriptor)


def status(path: str) -> Status:
    """Size and version of a file.

    Raises:
        OSError: FileNotFoundError if there is none, IsADirectoryError if it is a folder, another if it cannot be reached.
        UserError: fsspec or a package it needs is missing.
    """
    if not is_remote(path):
        found = os.stat(local(path))
        if stat.S_ISDIR(found.st_mode):
            raise IsADirectoryError(f'{path} is a folder')
        if not stat.S_ISREG(found.st_mode):  # reading a pipe would wait for ever
            raise OSError(f'{path} is no regular file')
        return Status(found.st_size, f'{found.st_size} {found.st_mtime_ns}')
    system, name = file_system(path)
    with as_os_error(path):
        found = system.info(name)
    if found['type'] == 'directory':
        raise IsADirectoryError(f'{path} is a folder')
    if found.get('size') is None:
        raise OSError('the server does not tell its size')
    return Status(found['size'], ' '.join([str(found['size']), *(f'{found[key]}' for key in _VERSIONS if found.get(key))]))


def open_binary(path: str) -> BinaryIO:
    """The file, opened for reading; it can seek, and a remote one is fetched in blocks of 4 MiB.

    Raises:
        OSError: see `status`; reading raises it too.
        UserError: fsspec or a package it needs is missing.
    """
    if not is_remote(path):
        status(path)
        return open(local(path), 'rb')
    status(path)  # for its FileNotFoundError
    return io.BufferedReader(_Stream(RangedFile(path)), _BLOCK)


def join(root: str, name: str) -> str:
    """`name` under `root`; a name that is absolute or has `://` stays as it is."""
    if '://' in name or os.path.isabs(name) or not root:
        return name
    return os.path.join(root, name) if root.endswith('://') or '://' not in root else f'{root.rstrip("/")}/{name}'


def locate(frame: str | Frame, root: str) -> str | Frame:
    """The frame of a row; a file name is completed with the folder of the pictures."""
    return frame if isinstance(frame, Frame) else join(root, frame)


def local(path: str) -> str:
    """The path as the operating system knows it; of a local file."""
    return path.removeprefix('file://')


def is_folder(path: str) -> bool:
    """Whether the path is a folder; OSError if it cannot be reached."""
    if not is_remote(path):
        return os.path.isdir(local(path))
    system, name = file_system(path)
    with as_os_error(path):
        return system.isdir(name)


def expand(path: str) -> list[str]:
    """The files that a path names, sorted: `*`, `?`, `[abc]`, `{a,b}` and `{00000..00012}` are filled in.

    Raises:
        UserError: nothing matches, or a file that is named in braces does not exist; says what is there.
    """
    try:
        if not re.search(r'[*?[{]', path) or _names(path, literal=True):
            return [path]
        found = set()
        for name in _fill_braces(path):
            matches = _names(name, literal=not glob.has_magic(name))
            if not matches:
                raise UserError(f'{name}: nothing matches; {describe(_firm_folder(name))}')
            found |= set(matches)
        return sorted(found)
    except OSError as error:
        raise UserError(f'{path} cannot be listed ({reason(error)}); correct the path.') from error


def describe(folder: str) -> str:
    """What a folder holds, as the end of a sentence."""
    entries = [entry for entry in _names(join(folder, '*'), literal=False) if os.path.basename(entry)]
    entries = sorted(os.path.basename(entry) for entry in entries)
    if not entries:
        return f'{folder or "this folder"} is empty or does not exist.'
    more = f' and {len(entries) - _SHOWN} more' if len(entries) > _SHOWN else ''
    return f'{folder or "this folder"} holds {", ".join(entries[:_SHOWN])}{more}.'


class _Stream(io.RawIOBase):
    """A remote file for `io.BufferedReader`."""

    def __init__(self, file: RangedFile):
        self.name, self._file, self._at = file.path, file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._file.size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        part = self._file.read(self._at, len(buffer))
        buffer[:len(part)] = part
        self._at += len(part)
        return len(part)

    def readall(self) -> bytes:
        part = self._file.read(self._at, max(0, self._file.size - self._at))
        self._at += len(part)
        return part


def _names(path: str, literal: bool) -> list[str]:
    """The paths that match, with what stands in front of a remote one's name."""
    if not is_remote(path):
        return [path] * os.path.exists(local(path)) if literal else glob.glob(local(path), recursive=True)
    system, name = file_system(path)
    with as_os_error(path):
        if literal:
            return [path] * system.exists(name)
        lead = path.removesuffix(name) if path.endswith(name) else f'{path.split("://")[0]}://'
        return [lead + match for match in system.glob(name)]


def _fill_braces(path: str) -> list[str]:
    """The paths of a path with braces. Example: `a{08..10}.{x,y}` gives a08.x a08.y a09.x a09.y a10.x a10.y."""
    pieces = re.split(r'\{([^{}]*(?:,|\.\.)[^{}]*)\}', path)
    return [''.join(parts) for parts in itertools.product(*(
        _choices(piece) if number % 2 else [piece] for number, piece in enumerate(pieces)))]


def _choices(inside: str) -> list[str]:
    numbers = re.fullmatch(r'(\d+)\.\.(\d+)', inside)
    if not numbers:
        return inside.split(',')
    first, last = numbers.groups()
    return [f'{number:0{len(first)}d}' for number in range(int(first), int(last) + 1)]


def _firm_folder(path: str) -> str:
    """The folder of a path above everything that is to be filled in."""
    return os.path.dirname(re.split(r'[*?[{]', path)[0])
