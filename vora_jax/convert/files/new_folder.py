"""A folder that appears whole or not at all."""
import contextlib
import errno
import fcntl
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator

from vora_jax.types import UserError

_CONTENT = _LOCK, _NEW, _OLD = 'lock', 'new', 'old'  # of the temporary sibling


@contextlib.contextmanager
def new_folder(to: str | os.PathLike, overwrite: bool, is_ours: Callable[[pathlib.Path], bool]
               ) -> Iterator[pathlib.Path]:
    """A temporary folder beside `to` that takes its place when the block ends well, and vanishes otherwise.

    Beside /out it is /out's `.out.RANDOM.partial/new`. What a killed process leaves of that name is removed by the
    next call for the same `to`; one that a living process holds (it locks a file in it) is not.

    Args:
        to: the folder to be made; its parents are made too.
        overwrite: replaces an earlier folder, if `is_ours` says that it is one.
        is_ours: (folder) -> whether we wrote it.

    Raises:
        UserError: `to` exists (also: appeared meanwhile), or cannot be written, or the disk fills up in the block.
    """
    target = pathlib.Path(os.path.abspath(to))  # also without a trailing slash or `..`
    with _writing(to, target):
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target)
    _check_free(to, target, overwrite, is_ours)
    with _writing(to, target):
        outer, lock = _locked_sibling(target)
    try:
        folder = outer / _NEW
        # In the block, only a full disk is certainly about this folder.
        with _writing(to, target, only=(errno.ENOSPC, errno.EDQUOT)):
            folder.mkdir()
            yield folder
        with _writing(to, target):
            _sync(folder)
            _check_free(to, target, overwrite, is_ours)
            _replace(target, folder, outer / _OLD)
    finally:
        shutil.rmtree(outer, ignore_errors=True)
        os.close(lock)


def _check_free(to: str | os.PathLike, target: pathlib.Path, overwrite: bool,
                is_ours: Callable[[pathlib.Path], bool]) -> None:
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise UserError(f'{to} exists already; choose another folder or pass --overwrite.')
    if not is_ours(target):
        raise UserError(f'{to} exists and is no export of vora_jax, so it is not overwritten; choose another folder.')


def _replace(target: pathlib.Path, folder: pathlib.Path, old: pathlib.Path) -> None:
    if os.path.lexists(target):
        target.rename(old)
    try:
        folder.rename(target)
    except BaseException:
        if os.path.lexists(old):
            old.rename(target)
        raise
    _sync_one(target.parent)


def _locked_sibling(target: pathlib.Path) -> tuple[pathlib.Path, int]:
    """A new `.NAME.RANDOM.partial`, and the descriptor that locks it while it is open."""
    while True:
        outer = pathlib.Path(tempfile.mkdtemp(prefix=f'.{target.name}.', suffix='.partial', dir=target.parent))
        try:
            return outer, _lock(outer)
        except (BlockingIOError, FileNotFoundError):
            continue  # before it was locked, another process took it for a leftover


def _remove_leftovers(target: pathlib.Path) -> None:
    """Removes siblings that no living process holds."""
    ours = re.compile(re.escape(f'.{target.name}.') + r'[a-z0-9_]{8}\.partial')
    for outer in [path for path in target.parent.iterdir() if ours.fullmatch(path.name)]:
        try:
            if {path.name for path in outer.iterdir()} - set(_CONTENT):
                continue
            lock = _lock(outer, wants_proof=True)
        except OSError:
            continue  # held, already gone, or someone else's
        try:
            if (outer / _OLD).exists() and not os.path.lexists(target):
                (outer / _OLD).rename(target)  # killed between the two renames
            shutil.rmtree(outer, ignore_errors=True)
        finally:
            os.close(lock)


def _lock(outer: pathlib.Path, wants_proof: bool = False) -> int:
    """The descriptor of the folder's lock file, locked until it is closed or the process ends, however it ends.

    Raises:
        BlockingIOError: another process holds it.    FileNotFoundError: the folder vanished.
        OSError: this file system has no locks, if `wants_proof`.
    """
    file = outer / _LOCK
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if wants_proof or isinstance(error, BlockingIOError):
                raise
        if os.stat(file).st_ino != os.fstat(descriptor).st_ino:
            raise FileNotFoundError(errno.ENOENT, 'replaced', str(file))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _sync(folder: pathlib.Path) -> None:
    """Brings the folder's files and names to the disk, so that a power cut after the rename finds them whole."""
    for parent, _, files in os.walk(folder):
        for name in files:
            _sync_one(pathlib.Path(parent, name))
        _sync_one(pathlib.Path(parent))


def _sync_one(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems sync no directories
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _writing(to: str | os.PathLike, target: pathlib.Path, only: tuple[int, ...] = ()
             ) -> Iterator[None]:
    """Turns OSErrors (those numbers only) into a sentence about `to`."""
    try:
        yield
    except OSError as error:
        if only and error.errno not in only:
            raise
        what = 'choose another folder'
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(target.parent).free
            what = f'{free:,} bytes are free; free some space or choose another disk'
        raise UserError(f'{to} cannot be written ({error.strerror}); {what}.') from error
