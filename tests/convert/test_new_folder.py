"""Folders that appear whole or not at all: failures, kills, locks."""
import errno
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from vora_jax.convert.files.new_folder import new_folder
from vora_jax.types import UserError

# Writes half of the folder, says so, and waits to be killed.
HANGING = """
import pathlib, sys, time
from vora_jax.convert.files.new_folder import new_folder
with new_folder(sys.argv[1], True, lambda folder: True) as folder:
    (folder / 'weights').write_text('half')
    print('inside', flush=True)
    time.sleep(60)
"""


def is_ours(folder):
    return (folder / 'ours').exists()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def make(to, text, overwrite=False):
    with new_folder(to, overwrite, is_ours) as folder:
        (folder / 'ours').write_text(text)
        (folder / 'sub').mkdir()
        (folder / 'sub' / 'file').write_text(text)


@pytest.fixture
def hanging(tmp_path):
    """A living process that is in the middle of writing tmp_path/out."""
    process = subprocess.Popen([sys.executable, '-c', HANGING, tmp_path / 'out'], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == 'inside\n'
    yield process
    process.kill()
    process.communicate()


def test_it_appears_when_the_block_ends(tmp_path):
    with new_folder(tmp_path / 'a' / 'out', False, is_ours) as folder:
        assert folder.is_dir() and not (tmp_path / 'a' / 'out').exists()
        assert folder.parent.parent == tmp_path / 'a' and folder.parent.name.startswith('.out.')
        (folder / 'file').write_text('x')
    assert names(tmp_path / 'a') == ['out'] and names(tmp_path / 'a' / 'out') == ['file']


def test_an_existing_folder_is_replaced_only_on_request_and_if_ours(tmp_path):
    make(tmp_path / 'out', 'old')
    with pytest.raises(UserError, match='out exists already; choose another folder or pass --overwrite'):
        make(tmp_path / 'out', 'new')
    assert (tmp_path / 'out' / 'ours').read_text() == 'old'
    make(f'{tmp_path}/out/', 'new', overwrite=True)
    assert (tmp_path / 'out' / 'sub' / 'file').read_text() == 'new' and names(tmp_path) == ['out']
    (tmp_path / 'out' / 'ours').unlink()
    with pytest.raises(UserError, match='is no export of vora_jax, so it is not overwritten'):
        make(tmp_path / 'out', 'newer', overwrite=True)


def test_one_that_appeared_meanwhile_is_kept(tmp_path):
    with pytest.raises(UserError, match='exists already'):
        with new_folder(tmp_path / 'out', False, is_ours):
            make(tmp_path / 'out', 'theirs')
    assert (tmp_path / 'out' / 'ours').read_text() == 'theirs' and names(tmp_path) == ['out']


@pytest.mark.parametrize('failure', [KeyboardInterrupt, SystemExit, GeneratorExit, ValueError])
def test_a_failure_leaves_what_was_there(tmp_path, failure):
    make(tmp_path / 'out', 'old')
    with pytest.raises(failure):
        with new_folder(tmp_path / 'out', True, is_ours) as folder:
            (folder / 'ours').write_text('half')
            raise failure
    assert names(tmp_path) == ['out'] and (tmp_path / 'out' / 'ours').read_text() == 'old'


def test_a_failed_rename_puts_the_old_one_back(tmp_path, monkeypatch):
    make(tmp_path / 'out', 'old')
    rename = pathlib.Path.rename

    def failing(self, to):
        if self.name == 'new':
            raise OSError(errno.EIO, 'Input/output error')
        return rename(self, to)

    monkeypatch.setattr(pathlib.Path, 'rename', failing)
    with pytest.raises(UserError, match='out cannot be written .Input/output error.; choose another folder'):
        make(tmp_path / 'out', 'new', overwrite=True)
    assert names(tmp_path) == ['out'] and (tmp_path / 'out' / 'ours').read_text() == 'old'


def test_a_termination_signal_made_an_exception_cleans_up(tmp_path):
    code = 'import signal, sys\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n' + HANGING
    with subprocess.Popen([sys.executable, '-c', code, tmp_path / 'out'], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == 'inside\n'
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 143
    assert names(tmp_path) == []


def test_what_a_killed_process_leaves_is_removed_by_the_next(tmp_path, hanging):
    hanging.kill()
    hanging.wait()
    left, = tmp_path.iterdir()
    assert left.name.startswith('.out.') and left.name.endswith('.partial') and names(left) == ['lock', 'new']
    make(tmp_path / 'out.x', 'another target')
    assert left.exists()
    make(tmp_path / 'out', 'whole')
    assert names(tmp_path) == ['out', 'out.x']


def test_a_living_neighbour_is_left_alone(tmp_path, hanging):
    make(tmp_path / 'out', 'mine')
    left, = (path for path in tmp_path.iterdir() if path.name != 'out')
    assert (left / 'new' / 'weights').read_text() == 'half' and hanging.poll() is None


def test_a_kill_between_the_two_renames_is_undone(tmp_path):
    make(tmp_path / 'out', 'old')
    left = tmp_path / '.out.abcd_123.partial'
    (left / 'new').mkdir(parents=True)
    (tmp_path / 'out').rename(left / 'old')
    with pytest.raises(ValueError):
        with new_folder(tmp_path / 'out', True, is_ours):
            assert (tmp_path / 'out' / 'ours').read_text() == 'old'
            raise ValueError
    assert names(tmp_path) == ['out']


def test_folders_that_only_look_alike_are_kept(tmp_path):
    for name in ('.out.short.partial', '.out.x.abcd_123.partial', '.other.abcd_123.partial'):
        (tmp_path / name).mkdir()
    (tmp_path / '.out.abcd_123.partial').mkdir()
    (tmp_path / '.out.abcd_123.partial' / 'mine').write_text('')
    make(tmp_path / 'out', 'x')
    assert len(names(tmp_path)) == 5


def test_it_works_without_file_locks_but_removes_nothing_then(tmp_path, monkeypatch):
    (tmp_path / '.out.abcd_123.partial').mkdir()

    def no_locks(*_):
        raise OSError(errno.ENOLCK, 'No locks available')

    monkeypatch.setattr('fcntl.flock', no_locks)
    make(tmp_path / 'out', 'x')
    assert names(tmp_path) == ['.out.abcd_123.partial', 'out']


def test_a_sibling_taken_before_it_was_locked_is_made_again(tmp_path, monkeypatch):
    """Another process may see the folder before its lock."""
    mkdtemp, made = __import__('tempfile').mkdtemp, []

    def unlucky(**kwargs):
        made.append(mkdtemp(**kwargs))
        if len(made) == 1:
            os.rmdir(made[0])
        return made[-1]

    monkeypatch.setattr('tempfile.mkdtemp', unlucky)
    make(tmp_path / 'out', 'x')
    assert len(made) == 2 and names(tmp_path) == ['out']


def test_a_full_disk_is_told_and_other_errors_pass(tmp_path):
    with pytest.raises(UserError, match='out cannot be written .No space left on device.; [0-9,]+ bytes are free; '
                                        'free some space'):
        with new_folder(tmp_path / 'out', False, is_ours):
            raise OSError(errno.ENOSPC, 'No space left on device')
    with pytest.raises(FileNotFoundError):
        with new_folder(tmp_path / 'out', False, is_ours):
            open(tmp_path / 'source')
    assert names(tmp_path) == []
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match='file/out cannot be written .*; choose another folder'):
        make(tmp_path / 'file' / 'out', 'x')
