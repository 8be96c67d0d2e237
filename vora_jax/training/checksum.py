"""Checksum sidecars: what makes a checkpoint committed.

Orbax does not notice a flipped byte in an array file. So each checkpoint folder gets a file with the sha256
of all its files, written last: a folder without it was never finished, one that disagrees with it is damaged.
"""
import concurrent.futures
import hashlib
import json
import os
import pathlib
import re
import shutil

SIDECAR = 'SHA256.json'


def digest(folder: pathlib.Path) -> dict[str, str]:
    """{relative path: sha256} of every file below a folder except the sidecar itself."""
    files = sorted(path for path in folder.rglob('*') if path.is_file() and path.name != SIDECAR)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:  # hashlib releases the interpreter lock
        hashes = pool.map(_sha256, files)
        return {str(path.relative_to(folder)): value for path, value in zip(files, hashes, strict=True)}


def commit(folder: pathlib.Path) -> None:
    """Writes the sidecar of a finished folder, in one atomic move."""
    temporary = folder / f'{SIDECAR}.tmp'
    temporary.unlink(missing_ok=True)
    temporary.write_text(json.dumps(digest(folder), indent=0))
    os.replace(temporary, folder / SIDECAR)


def is_committed(folder: pathlib.Path) -> bool:
    """True where the folder was finished."""
    return (folder / SIDECAR).is_file()


def damaged_files(folder: pathlib.Path) -> list[str]:
    """Files of a committed folder that are missing or changed since; empty means sound."""
    try:
        expected = json.loads((folder / SIDECAR).read_text())
    except (OSError, ValueError):
        return [SIDECAR]
    present = digest(folder)
    return sorted(name for name, value in expected.items() if present.get(name) != value)


def remove_unfinished(workdir: pathlib.Path) -> None:
    """Deletes what a killed process left in a workdir; folders that we did not name stay."""
    for parent, ours in (('steps', r'\d+(\..*)?'), ('frozen', r'[0-9a-f]{16,}(\..*)?')):
        for folder in (workdir / parent).iterdir() if (workdir / parent).is_dir() else ():
            if folder.is_dir() and re.fullmatch(ours, folder.name) and not is_committed(folder):
                shutil.rmtree(folder)


def _sha256(path: pathlib.Path) -> str:
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()
