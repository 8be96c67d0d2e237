"""Prepared folders: written whole or not at all, with a manifest."""
import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from typing import Any, Iterator, Mapping

from vora_jax.data.sources.prepared_rows import MANIFEST
from vora_jax.data.whole_file import write_whole
from vora_jax.types import UserError

VERSION = 1  # of folders that are no folders of rows


def find_prepared(to: str, source: dict[str, Any], version: int = VERSION) -> dict[str, Any] | None:
    """The manifest of the folder if it already holds this source; None if the folder is still to be made.

    Args:
        to: the folder.
        source: what the manifest's `source` must equal.
        version: what its `version` must equal.
    Raises:
        UserError: the folder holds something else.
    """
    path = pathlib.Path(to)
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return None
    advice = 'choose another --to, or remove it first'
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if not isinstance(manifest, dict):
            raise ValueError
    except (OSError, ValueError):
        raise UserError(f'{to} exists but is not a folder that `vora prepare` finished; {advice}.') from None
    if (manifest.get('version'), manifest.get('source')) != (version, source):
        raise UserError(f'{to} was prepared from another source, with other options or by another version; {advice}.')
    return manifest


@contextlib.contextmanager
def new_folder(to: str) -> Iterator[pathlib.Path]:
    """A temporary folder beside `to` that becomes `to` when the block ends well, and vanishes otherwise."""
    target = pathlib.Path(to).absolute()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = pathlib.Path(tempfile.mkdtemp('.partial', f'.{target.name}.', target.parent))
    except OSError as error:
        raise UserError(f'{to} cannot be written ({error.strerror}); choose another --to.') from error
    try:
        folder.chmod(0o755)
        yield folder
        try:
            folder.rename(target)
        except OSError as error:
            raise UserError(f'{to} appeared meanwhile ({error.strerror}); remove it first.') from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def continued_folder(to: str, source: dict[str, Any]) -> Iterator[tuple[pathlib.Path, pathlib.Path]]:
    """(`TO.partial`, the folder in it that becomes `to` when the block ends well).

    When the block does not, `TO.partial` stays as it is for the next run of the same source, unless it holds no file
    `part-*`.

    Raises:
        UserError: `TO.partial` belongs to another source, or another process works on it.
    """
    target = pathlib.Path(to).absolute()
    folder = target.with_name(f'{target.name}.partial')
    run, lock = folder / 'run.json', None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(exist_ok=True)
        is_new = all(path.name.startswith(('.', 'lock')) for path in folder.iterdir())
        if not is_new and _read_json(run) != source:
            raise UserError(f'{folder} holds the unfinished work of another source or of other options; give that command '
                            'again, choose another --to, or remove the folder.')
        lock = os.open(folder / 'lock', os.O_CREAT | os.O_RDWR)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        write_whole(run, lambda file: file.write(json.dumps(source).encode()))
        (folder / 'files').mkdir(exist_ok=True)
    except BlockingIOError as error:
        os.close(lock)
        raise UserError(f'{folder} is being written by another `vora prepare`; wait until it is done.') from error
    except OSError as error:
        raise UserError(f'{to} cannot be written ({error.strerror}); choose another --to.') from error
    try:
        yield folder, folder / 'files'
        try:
            (folder / 'files').rename(target)
        except OSError as error:
            raise UserError(f'{to} appeared meanwhile ({error.strerror}); remove it first.') from error
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        if not any(folder.glob('part-*')):
            shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def finish(folder: pathlib.Path, content: dict[str, Any], max_bad: float) -> dict[str, Any]:
    """Checks the share of dropped rows and writes the manifest; returns it.

    Args:
        folder: the temporary folder.
        content: source, rows, counts, dropped: a sentence for each dropped row.
        max_bad: share of rows that may be dropped, 0 to 1.
    Raises:
        UserError: more rows were dropped, or none is left.
    """
    dropped, total = content['dropped'], content['rows']
    if len(dropped) > max_bad * total or len(dropped) == total:
        raise UserError(f'{len(dropped)} of {total} rows are bad, more than --max-bad {max_bad:g} allows; '
                        f'repair them or raise the limit, the first is {dropped[0]}.')
    return write_manifest(folder, content)


def write_manifest(folder: pathlib.Path, content: dict[str, Any], version: int = VERSION,
                   known: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Writes the manifest, the last file of a folder: version, content, and the files' hashes; returns it.

    Args:
        known: hashes of files, so that those need not be read.
    """
    known = known or {}
    files = {}
    images = hashlib.sha256()
    for file in sorted(path for path in folder.rglob('*') if path.is_file()):
        name = file.relative_to(folder).as_posix()
        if name == MANIFEST:
            continue
        digest = known.get(name) or file_sha256(file)
        if name.startswith('images/'):
            images.update(f'{name} {digest}\n'.encode())
        else:
            files[name] = digest
    if (folder / 'images').is_dir():
        files['images'] = images.hexdigest()
    manifest = {'version': version, **content, 'files': files}
    text = json.dumps(manifest, indent=1, ensure_ascii=False)
    (folder / MANIFEST).write_text(text + '\n', encoding='utf-8')
    return manifest


def file_sha256(file: pathlib.Path) -> str:
    """sha256 of a file's content."""
    with open(file, 'rb') as stream:
        return hashlib.file_digest(stream, 'sha256').hexdigest()


def _read_json(file: pathlib.Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError):
        return None
