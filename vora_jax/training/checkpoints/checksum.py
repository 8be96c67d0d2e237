"""Checksum sidecars: what makes a checkpoint committed.

Orbax does not notice a flipped byte in an array file. So each checkpoint folder gets a file with the sha256
of all its files, written last: a folder without it was never finished, one that disagrees with it is damaged.
Each process hashes a share of the files, above all those it wrote; `commit` and `damaged_files` are called by all.
"""
import concurrent.futures
import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterable

import jax

from vora_jax.training.checkpoints import agree
from vora_jax.training.checkpoints.storage import Path, files_below, remove_folder, write_whole
from vora_jax.training.checkpoints.trouble import GONE, patiently
from vora_jax.types import UserError

SIDECAR = 'SHA256.json'
SECONDS = 6 * 3600  # that processes wait for each other's hashing; of one that died they hear at once


def digest(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """{relative path: sha256} of the named files below a folder; '' for one that is not there.

    Raises:
        UserError, TryAgain: one is there and cannot be read.
    """
    names = list(names)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:  # hashlib releases the interpreter lock
        return dict(zip(names, pool.map(lambda name: _sha256(folder / name), names), strict=True))


def commit(folder: Path) -> None:
    """Writes the sidecar of a finished folder, as one atomic write. Called by all processes; returns at each when it
    is written.

    Raises:
        OSError: a file could not be read back, or the sidecar not written; the same at all processes.
        TimeoutError: a process did not answer.
    """
    parts = agree.collect(f'commit {folder}', json.dumps(digest(folder, filter(_is_mine(), _names(folder)))),
                          SECONDS)
    trouble = ''
    if parts:
        try:
            _write(folder, {name: value for part in parts for name, value in json.loads(part).items()})
        except Exception as error:  # an OSError, or one of an object store's library
            trouble = str(error.__cause__ or error) or type(error).__name__
    trouble = agree.announce(f'commit {folder}', trouble, SECONDS)
    if trouble:
        raise OSError(trouble)


def is_committed(folder: Path) -> bool:
    """True where the folder was finished."""
    return (folder / SIDECAR).is_file()


def damaged_files(folder: Path) -> list[str]:
    """Files of a committed folder that are missing or changed since; empty means sound. Called by all processes, which
    get the same answer.

    Raises:
        UserError, TryAgain: a file is there and cannot be read, which is no damage: it may be sound.
    """
    try:
        expected = dict(json.loads(patiently((folder / SIDECAR).read_bytes, folder / SIDECAR)))
    except UserError:
        raise
    except (*GONE, ValueError, TypeError):
        expected = {}
    present = digest(folder, filter(_is_mine(), expected))
    mine = [name for name, value in present.items() if value != expected[name]] if expected else [SIDECAR]
    parts = agree.collect(f'verify {folder}', json.dumps(mine), SECONDS)
    damaged = sorted({name for part in parts for name in json.loads(part)})
    return json.loads(agree.announce(f'verify {folder}', json.dumps(damaged), SECONDS))


def remove_unfinished(workdir: Path) -> None:
    """Deletes what a killed process left in a workdir; folders that we did not name stay."""
    for parent, ours in (('steps', r'\d+(\..*)?'), ('frozen', r'[0-9a-f]{16,}(\..*)?')):
        for folder in list((workdir / parent).iterdir()) if (workdir / parent).is_dir() else ():
            if re.fullmatch(ours, folder.name) and folder.is_dir() and not is_committed(folder):
                remove_folder(folder)


def _names(folder: Path) -> list[str]:
    return [name for name in files_below(folder) if not name.startswith(SIDECAR)]


def _is_mine() -> Callable[[str], bool]:
    """Whether a file falls to this process: by the process that wrote it where its name tells (Orbax's
    `ocdbt.process_3/...`), else by a hash of the name."""
    index, count = jax.process_index(), jax.process_count()

    def is_mine(name: str) -> bool:
        writer = re.search(r'process_(\d+)', name)
        return (int(writer[1]) if writer else zlib.crc32(name.encode())) % count == index

    return is_mine


def _write(folder: Path, hashes: dict[str, str]) -> None:
    # What a process did not see on a slow network disk, the first one hashes itself.
    hashes |= digest(folder, [name for name in _names(folder) if not hashes.get(name)])
    unread = [name for name, value in hashes.items() if not value]
    if unread:
        raise OSError(f'{folder / unread[0]} cannot be read back')
    write_whole(folder / SIDECAR, json.dumps(dict(sorted(hashes.items())), indent=0))


def _sha256(path: Path) -> str:
    def read() -> str:
        with path.open('rb') as file:
            return hashlib.file_digest(file, 'sha256').hexdigest()

    try:
        return patiently(read, path)
    except GONE:
        return ''
