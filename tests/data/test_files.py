"""Local and remote files by one name."""
import concurrent.futures
import io
import json
import os
import pickle
import random
import subprocess
import sys
import time
import uuid

import PIL.Image
import pytest

from vora_jax.data.images.decode import decode, read_size
from vora_jax.data.sources import files
from vora_jax.data.sources.remote import folder_of
from vora_jax.types import UserError

fsspec = pytest.importorskip('fsspec')


class BrokenSystem(fsspec.AbstractFileSystem):
    """Knows every file, reads none."""

    protocol = 'broken'
    failure: Exception = OSError('the line was cut')

    def info(self, path, **_):
        return {'name': path, 'size': 100, 'type': 'file'}

    def cat_file(self, path, **_):
        raise self.failure


fsspec.register_implementation('broken', BrokenSystem, clobber=True)


@pytest.fixture(params=['', 'file://', 'memory:/'], ids=['local', 'file', 'memory'])
def folder(request, tmp_path):
    """A folder to write to, as a path or an address."""
    return f'memory://{uuid.uuid4()}' if request.param == 'memory:/' else f'{request.param}{tmp_path}'


def write(path, content):
    with fsspec.open(path, 'wb') as file:
        file.write(content)
    return path


def test_any_part_of_a_file_by_many_threads(folder):
    draw = random.Random(1)
    content = draw.randbytes(300_000)
    file = files.RangedFile(write(f'{folder}/a.bin', content))
    assert file.size == len(content)
    spans = [(draw.randrange(310_000), draw.randrange(50_000)) for _ in range(300)]
    for one in (file, pickle.loads(pickle.dumps(file))):
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            parts = list(pool.map(lambda span, one=one: one.read(*span), spans))
        assert parts == [content[offset:offset + count] for offset, count in spans]


def test_opened_files_read_and_seek(folder):
    content = random.Random(2).randbytes(100_000)
    with files.open_binary(write(f'{folder}/a.bin', content)) as file:
        assert file.read(10) == content[:10] and file.tell() == 10
        assert file.seek(-7, io.SEEK_END) == len(content) - 7 and file.read() == content[-7:]
        file.seek(5)
        file.seek(5, io.SEEK_CUR)
        assert file.read() == content[10:] and file.read() == b''


def test_a_large_remote_file_comes_in_blocks(monkeypatch):
    monkeypatch.setattr(files, '_BLOCK', 1000)
    content = random.Random(3).randbytes(12_345)
    with files.open_binary(write(f'memory://{uuid.uuid4()}/a.bin', content)) as file:
        assert b''.join(iter(lambda: file.read(77), b'')) == content


def test_what_is_no_file(folder, tmp_path):
    write(f'{folder}/in/a.bin', b'a')
    with pytest.raises(FileNotFoundError):
        files.open_binary(f'{folder}/none')
    with pytest.raises(UserError, match='none does not exist; correct the path, or make the data with `vora prepare`.'):
        files.RangedFile(f'{folder}/none')
    with pytest.raises(IsADirectoryError):
        files.open_binary(f'{folder}/in')
    with pytest.raises(UserError, match='in cannot be read .*is a folder'):
        files.RangedFile(f'{folder}/in')
    assert files.is_folder(f'{folder}/in') and not files.is_folder(f'{folder}/in/a.bin')
    os.mkfifo(tmp_path / 'pipe')
    with pytest.raises(OSError, match='no regular file'):
        files.open_binary(str(tmp_path / 'pipe'))


def test_version_follows_the_content(folder):
    before = files.status(write(f'{folder}/a.bin', b'abc'))
    assert before == files.status(f'{folder}/a.bin') and before.size == 3
    time.sleep(0.02)  # clocks of file systems are coarse
    assert files.status(write(f'{folder}/a.bin', b'abd')).version != before.version


@pytest.mark.parametrize('root, name, path', [
    ('a/b', 'c.png', 'a/b/c.png'), ('a/b', '/c.png', '/c.png'), ('', 'c.png', 'c.png'), ('a', 'gs://b/c', 'gs://b/c'),
    ('gs://a/b', 'c/d.png', 'gs://a/b/c/d.png'), ('gs://a/b/', 'd.png', 'gs://a/b/d.png'), ('gs://a', '/d.png', '/d.png'),
    ('gs://a', 's3://b/c', 's3://b/c')])
def test_names_under_a_root(root, name, path):
    assert files.join(root, name) == path


def test_patterns(folder):
    for name in ('a-00.tar', 'a-01.tar', 'a-02.tar', 'a-10.tar', 'b.json', 'deep/c.tar', '{x,y}'):
        write(f'{folder}/{name}', b'')

    def found(pattern):
        return [path.removeprefix(f'{folder}/').removeprefix(f'{folder.removeprefix("file://")}/')
                for path in files.expand(f'{folder}/{pattern}')]

    assert found('b.json') == found('b.js*') == found('[bc].json') == ['b.json']
    assert found('none.json') == ['none.json'], 'who opens it tells it'
    assert found('a-*.tar') == ['a-00.tar', 'a-01.tar', 'a-02.tar', 'a-10.tar']
    assert found('a-{00..02}.tar') == ['a-00.tar', 'a-01.tar', 'a-02.tar']
    assert found('{b.json,a-?0.tar}') == ['a-00.tar', 'a-10.tar', 'b.json']
    assert found('*/c.tar') == ['deep/c.tar'] and found('{x,y}') == ['{x,y}']
    for path in files.expand(f'{folder}/a-*.tar'):
        assert files.RangedFile(path).size == 0
    with pytest.raises(UserError, match=r'a-03.tar: nothing matches; .* holds a-00.tar, a-01.tar, .*and 2 more\.'):
        found('a-{00..03}.tar')
    with pytest.raises(UserError, match=r'nothing matches; .*/none is empty or does not exist\.'):
        found('none/*.tar')


def test_numbers_in_braces_keep_their_width():
    assert files._fill_braces('a{8..10}{x,}') == ['a8x', 'a8', 'a9x', 'a9', 'a10x', 'a10']
    assert files._fill_braces('{098..101}') == ['098', '099', '100', '101'] and files._fill_braces('{a}') == ['{a}']


def test_pictures_of_a_remote_folder():
    root = f'memory://{uuid.uuid4()}'
    with fsspec.open(f'{root}/a.png', 'wb') as file:
        PIL.Image.new('RGB', (5, 7), 'red').save(file, 'PNG')
    for read in (decode, read_size):
        with files.open_binary(files.join(root, 'a.png')) as file:
            assert getattr(read(file), 'size', (5, 7)) == (5, 7)


@pytest.mark.parametrize('failure', [error('the line was cut') for error in (OSError, RuntimeError, KeyError)])
def test_a_picture_that_cannot_be_fetched_is_named(monkeypatch, failure):
    monkeypatch.setattr(BrokenSystem, 'failure', failure)
    for read in (decode, read_size):
        with files.open_binary('broken://bucket/a.png') as file, \
                pytest.raises(UserError, match='image broken://bucket/a.png cannot be read .*the line was cut'):
            read(file)


@pytest.mark.parametrize('cause, kind', [(None, FileNotFoundError), (FileNotFoundError('a'), FileNotFoundError),
                                         (ConnectionError('it hung up'), OSError)])
def test_a_server_without_an_answer_is_no_missing_file(monkeypatch, cause, kind):
    failure = FileNotFoundError('broken://a')  # what fsspec makes of anything that a web server does
    failure.__cause__ = cause
    monkeypatch.setattr(BrokenSystem, 'failure', failure)
    with pytest.raises(OSError) as told:
        files.RangedFile('broken://bucket/a').read(0, 1)
    assert type(told.value) is kind and ('it hung up' in str(told.value)) == (kind is OSError)


def test_missing_packages_and_unknown_protocols(monkeypatch):
    with pytest.raises(UserError, match='nope://a/b: Protocol not known: nope; fsspec reads'):
        files.RangedFile('nope://a/b')
    fsspec.register_implementation('lacking', 'no_such_module.System', clobber=True)
    with pytest.raises(UserError, match=r"pip install 'vora_jax\[remote\]'` and its own package"):
        files.RangedFile('lacking://a/b')
    monkeypatch.setitem(sys.modules, 'fsspec', None)
    with pytest.raises(UserError, match=r"memory://a: remote files need `pip install 'vora_jax\[remote\]'`\."):
        files.status('memory://a')


def test_local_files_do_not_load_fsspec(tmp_path):
    (tmp_path / 'a').write_bytes(b'x')
    code = ('import sys, json\nfrom vora_jax.data.sources import files\n'
            f'files.RangedFile({str(tmp_path / "a")!r}).read(0, 1)\n'
            "print(json.dumps([name for name in ('fsspec', 'pyarrow') if name in sys.modules]))")
    assert json.loads(subprocess.run([sys.executable, '-c', code], capture_output=True, check=True, text=True).stdout) == []


@pytest.mark.parametrize('path, folder', [
    ('rows.jsonl', ''), ('data/rows.jsonl', 'data'), ('/rows.jsonl', '/'), ('/a/b.json', '/a'),
    ('memory://rows.jsonl', 'memory://'),
    ('gs://bucket/a/rows.jsonl', 'gs://bucket/a'), ('file:///a/rows.jsonl', 'file:///a')])
def test_the_folder_of_a_file(path, folder):
    assert folder_of(path) == folder
    assert files.join(folder, 'a.png') == path.replace(path.rpartition('/')[2], 'a.png')
