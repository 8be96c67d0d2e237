"""Where the rows of a file are: kept on disk, shared between processes and threads."""
import concurrent.futures
import json
import logging
import multiprocessing
import os
import pathlib
import pickle
import random

import numpy as np
import pytest

from vora_jax.data.sources import span_cache
from vora_jax.data.sources.files import Status
from vora_jax.data.sources.json_lines import JsonLines
from vora_jax.data.sources.json_list import JsonList
from vora_jax.data.sources.span_cache import Spans
from vora_jax.types import UserError

ROWS = [{'n': n, 'pad': 'x' * (n % 97)} for n in range(2000)]
KINDS = pytest.mark.parametrize('kind', [JsonLines, JsonList])


def written(tmp_path, kind, rows=ROWS):
    lines = [json.dumps(row) + '\n' * (row['n'] % 3 == 0) for row in rows]
    text = '\n'.join(lines) if kind is JsonLines else f'[{",".join(lines)}]'
    file = tmp_path / 'rows.json'
    file.write_text(text)
    return str(file)


def numbers(rows, order):
    return [rows[number]['n'] for number in order]


@KINDS
def test_threads_share_a_source(tmp_path, kind):
    rows = kind(written(tmp_path, kind))
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert [row['n'] for row in pool.map(rows.__getitem__, range(2000))] == list(range(2000))


@KINDS
def test_the_index_is_made_once_and_memory_mapped(tmp_path, kind, monkeypatch):
    path, cache = written(tmp_path, kind), str(tmp_path / 'kept/data')
    new = kind(path, cache)
    assert sorted(name.split('.')[-1] for name in os.listdir(cache)) == ['json', 'npy']
    monkeypatch.setattr('vora_jax.data.sources.span_index._scan', None)
    kept = kind(path, cache)
    assert kept.sha256 == new.sha256 and [kept.where(row) for row in range(2000)] == [new.where(row) for row in range(2000)]
    assert numbers(kept, range(2000)) == list(range(2000))
    mapped = pathlib.Path('/proc/self/maps')
    if mapped.exists():
        assert cache in mapped.read_text()


@KINDS
@pytest.mark.parametrize('cached', [False, True])
def test_pickled_sources_are_opened_again(tmp_path, kind, cached):
    rows = kind(written(tmp_path, kind), str(tmp_path / 'kept') if cached else '')
    content = pickle.dumps(rows)
    assert cached == (len(content) < 1000)
    again = pickle.loads(content)
    assert (again.path, again.sha256, again.where(1999)) == (rows.path, rows.sha256, rows.where(1999))
    with multiprocessing.get_context('spawn').Pool(1) as pool:
        assert pool.apply(numbers, (again, [1999, 0, 7])) == [1999, 0, 7]


def test_a_pickled_source_whose_index_is_gone_is_told(tmp_path):
    content = pickle.dumps(JsonLines(written(tmp_path, JsonLines), str(tmp_path / 'kept')))
    for file in (tmp_path / 'kept').iterdir():
        file.unlink()
    with pytest.raises(UserError, match='npy is gone; leave the cache'):
        pickle.loads(content)


def test_another_version_of_the_file_is_another_index(tmp_path):
    cache = str(tmp_path / 'kept')
    first = JsonLines(written(tmp_path, JsonLines, [{'n': 1}]), cache)
    os.utime(written(tmp_path, JsonLines, [{'n': 2}]), ns=(1, 1))  # as many bytes
    second = JsonLines(str(tmp_path / 'rows.json'), cache)
    assert second[0] == {'n': 2} and first.sha256 != second.sha256
    assert len(JsonLines(written(tmp_path, JsonLines), cache)) == 2000 and len(os.listdir(cache)) == 6


@pytest.mark.parametrize('suffix', ['npy', 'json'])
def test_a_damaged_cache_is_made_again(tmp_path, suffix, caplog):
    path, cache, draw = written(tmp_path, JsonLines), str(tmp_path / 'kept'), random.Random(2)
    sha256 = JsonLines(path, cache).sha256
    file, = (tmp_path / 'kept').glob(f'*.{suffix}')
    whole = file.read_bytes()
    for number in range(30):
        content = bytearray(whole)
        at = draw.randrange(len(content)) if number % 2 else draw.randrange(min(130, len(content)))
        content[at] ^= 1 << draw.randrange(8)
        file.write_bytes(content if number % 3 else content[:at])
        with caplog.at_level(logging.WARNING):
            rows = JsonLines(path, cache)
        assert len(rows) == 2000 and rows.sha256 == sha256 and numbers(rows, [0, 1999, 5]) == [0, 1999, 5]
        assert suffix == 'json' or number % 3 == 1 or 'the data is indexed again' in caplog.text
        file.write_bytes(whole)


def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path, caplog):
    (tmp_path / 'kept').write_text('a file')
    rows = JsonLines(written(tmp_path, JsonLines), str(tmp_path / 'kept/index'))
    assert numbers(rows, [3]) == [3] and 'cannot be written' in caplog.text
    assert len(pickle.dumps(rows)) > 1000 and numbers(pickle.loads(pickle.dumps(rows)), [3]) == [3]


def test_many_write_one_cache(tmp_path):
    name = str(tmp_path / 'kept/x')
    spans = Spans('0' * 64, np.arange(2000).reshape(-1, 2), np.array([[1, 1]]))
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda _: span_cache.save(name, spans), range(40)))
    read = span_cache.load(name)
    assert read.sha256 == spans.sha256 and (read.table == spans.table).all() and (read.gaps == spans.gaps).all()
    assert sorted(os.listdir(tmp_path / 'kept')) == ['x.json', 'x.npy']


def test_remote_files(tmp_path):
    fsspec = pytest.importorskip('fsspec')
    with fsspec.open('memory://folder/rows.jsonl', 'wb') as file:
        file.write(b'{"n": 0}\n\n{"n": 1}')
    for _ in range(2):
        rows = JsonLines('memory://folder/rows.jsonl', str(tmp_path / 'kept'))
        assert numbers(rows, [1, 0]) == [1, 0] and rows.where(1) == 'memory://folder/rows.jsonl row 3'
    assert len(os.listdir(tmp_path / 'kept')) == 2
    with pytest.raises(UserError, match='none.jsonl does not exist'):
        JsonLines('memory://folder/none.jsonl')


def test_a_file_that_changes_meanwhile_is_not_kept(tmp_path, monkeypatch):
    versions = iter('ab')
    monkeypatch.setattr('vora_jax.data.sources.span_index.status', lambda path: Status(0, next(versions)))
    rows = JsonLines(written(tmp_path, JsonLines), str(tmp_path / 'kept'))
    assert numbers(rows, [7]) == [7] and not (tmp_path / 'kept').exists()
