"""Pinned packages: the cache, pip, and files that are not what they should be."""
import hashlib
import pathlib
import subprocess

import pytest

from vora_jax.cli import package_download
from vora_jax.cli.package_download import Package, package_file
from vora_jax.types import UserError

CONTENT = b'a package'
PACKAGE = Package('thing==1.0', 'thing-1.0-py3-none-any.whl', hashlib.sha256(CONTENT).hexdigest())


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    return tmp_path / 'vora_jax'


@pytest.fixture
def pip(monkeypatch):
    """Replaces pip: `pip.content` is what it downloads (None: it fails); `pip.calls` are its command lines."""
    class Pip:
        content, calls = CONTENT, []

    def run(command, **_):
        Pip.calls.append(command)
        if Pip.content is None:
            return subprocess.CompletedProcess(command, 1, '', 'ERROR: first\nERROR: no such package\n')
        (pathlib.Path(command[command.index('--dest') + 1]) / PACKAGE.file).write_bytes(Pip.content)
        return subprocess.CompletedProcess(command, 0, '', '')

    monkeypatch.setattr(package_download.subprocess, 'run', run)
    return Pip


def test_a_download_is_kept_and_used_offline(cache, pip):
    file = pathlib.Path(package_file(PACKAGE))
    assert file == cache / PACKAGE.file and file.read_bytes() == CONTENT
    assert '--no-deps' in pip.calls[0] and pip.calls[0][-1] == 'thing==1.0'
    assert [path.name for path in cache.iterdir()] == [PACKAGE.file]
    pip.content = None
    assert package_file(PACKAGE) == str(file) and len(pip.calls) == 1


def test_a_failed_download_tells_the_way_out(cache, pip):
    pip.content = None
    with pytest.raises(UserError, match=r'thing==1.0 could not be downloaded \(ERROR: no such package\); fetch thing-1.0'):
        package_file(PACKAGE)
    assert not list(cache.iterdir())


def test_a_wrong_file_is_named_with_both_hashes(cache, pip, tmp_path):
    pip.content = CONTENT[:-1]
    found = hashlib.sha256(CONTENT[:-1]).hexdigest()
    with pytest.raises(UserError, match=f'{PACKAGE.file} is not thing==1.0: its sha256 is {found}, expected {PACKAGE.sha256}'
                                        '; remove it'):
        package_file(PACKAGE)
    other = tmp_path / 'other.whl'
    other.write_bytes(b'another')
    with pytest.raises(UserError, match='other.whl is not thing==1.0: its sha256 is .*; give the right file'):
        package_file(PACKAGE, str(other))
    with pytest.raises(UserError, match='no.whl cannot be read'):
        package_file(PACKAGE, str(tmp_path / 'no.whl'))


def test_a_given_file_needs_no_cache(cache, pip, tmp_path):
    (tmp_path / 'mine.whl').write_bytes(CONTENT)
    assert package_file(PACKAGE, str(tmp_path / 'mine.whl')) == str(tmp_path / 'mine.whl')
    assert not cache.exists() and not pip.calls
