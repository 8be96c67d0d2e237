"""Local folders and object stores, as paths.

A workdir is a local folder (`pathlib.Path`) or a URL of an object store (`etils.epath`, which Orbax brings: gs://, s3://
...). Both have the same methods; the few things that differ are here. Who may write there is found by the libraries
themselves: nothing here reads credentials.

An object store has no appending, no memory maps and no atomic rename, but each of its files appears whole or not at
all. So the data index, the logs while they grow and tokenizers that are read lie in a local folder (`local_side`).
"""
import hashlib
import importlib.util
import os
import pathlib
import shutil
from collections.abc import Iterable

from etils import epath

from vora_jax.training.checkpoints.trouble import first_line, mistake
from vora_jax.types import TryAgain, UserError

Path = pathlib.Path | epath.Path

PACKAGES = {'gs': 'gcsfs', 's3': 's3fs', 'az': 'adlfs', 'hf': 'huggingface_hub'}  # what reads the small files there


def to_path(text: str | Path) -> Path:
    """The folder or file that a text names.

    Raises:
        UserError: a URL of another kind or one that may not be read, or the Python package for its kind is missing.
        TryAgain: the network or the store fails.
    """
    scheme, mark, _ = str(text).partition('://')
    if not mark:
        return pathlib.Path(text)
    if scheme not in PACKAGES:
        raise UserError(f'{text}: cannot read {scheme}://; give a local folder or one of '
                        f'{", ".join(f"{known}://" for known in PACKAGES)}.')
    if importlib.util.find_spec(PACKAGES[scheme]) is None:
        raise UserError(f'{text}: {scheme}:// needs the Python package {PACKAGES[scheme]}; install it, or give a local '
                        'folder.')
    path = epath.Path(text)
    try:
        path.exists()
    except Exception as error:  # each library has errors of its own
        if mistake(error) or isinstance(error, ValueError | ImportError):  # its name makes no sense; a library is incomplete
            raise UserError(f'{text} cannot be read: {first_line(error)}; check its name, and what this machine may do '
                            'there.') from error
        raise TryAgain(f'{text} cannot be read: {first_line(error)}; run the same command again.') from error
    return path


def is_remote(path: Path) -> bool:
    """True for a URL."""
    return '://' in str(path)


def absolute(path: Path) -> Path:
    """The same place, whatever the working directory."""
    return path if is_remote(path) else path.absolute()


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that it is there whole or not at all."""
    if is_remote(path):
        path.write_text(text)
        return
    temporary = path.with_name(f'{path.name}.tmp')
    temporary.write_text(text, encoding='utf-8')
    os.replace(temporary, path)


def files_below(folder: Path) -> list[str]:
    """Relative paths of all files below a folder, sorted."""
    if not is_remote(folder):
        return sorted(path.relative_to(folder).as_posix() for path in folder.rglob('*') if path.is_file())
    found = []
    for root, _, names in folder.walk():
        # Object stores list names without the scheme, and some a folder as an empty file of its name.
        below = str(root).partition('://')[2] or str(root)
        below = below[len(str(folder).partition('://')[2]):].strip('/')
        found += [f'{below}/{name}'.lstrip('/') for name in names if name]
    return sorted(found)


def remove_folder(folder: Path) -> None:
    """Deletes a folder and all below it."""
    if is_remote(folder):
        folder.rmtree()
    else:
        shutil.rmtree(folder)


def copy_files(names: Iterable[str], source: Path, target: Path) -> None:
    """Copies files from one folder to another; either may be remote. A file that is not there is left out.

    A local one appears whole, also where several processes copy it at once.
    """
    for name in names:
        if not (source / name).is_file():
            continue
        target.mkdir(parents=True, exist_ok=True)
        if is_remote(target):
            (target / name).write_bytes((source / name).read_bytes())
            continue
        temporary = target / f'{name}.{os.getpid()}.tmp'
        temporary.write_bytes((source / name).read_bytes())
        os.replace(temporary, target / name)


def local_side(folder: Path) -> pathlib.Path:
    """Where things of a workdir lie that must be local: itself, or below the user's cache for a remote one."""
    if not is_remote(folder):
        return folder
    key = hashlib.sha256(str(folder).encode()).hexdigest()[:16]
    return pathlib.Path.home() / '.cache' / 'vora_jax' / 'workdirs' / key
