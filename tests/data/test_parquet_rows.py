"""Rows of Parquet files with pictures inside."""
import concurrent.futures
import datetime
import json
import pickle
import random
import sys
import uuid

import pytest

from vora_jax.data.frame import Frame
from vora_jax.data.sources.parquet_rows import ParquetRows
from vora_jax.types import UserError

fsspec = pytest.importorskip('fsspec')
pyarrow = pytest.importorskip('pyarrow')
parquet = pytest.importorskip('pyarrow.parquet')


def turns(question, answer):
    return [{'from': 'human', 'value': question}, {'from': 'gpt', 'value': answer}]


def write(path, rows, **options):
    with fsspec.open(str(path), 'wb') as file:
        parquet.write_table(pyarrow.Table.from_pylist(rows), file, **options)
    return str(path)


def seen(record):
    """The record with the bytes of its frames."""
    if isinstance(record, Frame):
        return record.open().read()
    if isinstance(record, dict):
        return {key: seen(value) for key, value in record.items()}
    return [seen(value) for value in record] if isinstance(record, list) else record


@pytest.mark.parametrize('where', ['local', 'memory'])
def test_rows_of_many_files_and_row_groups(tmp_path, where):
    draw = random.Random(1)
    folder = tmp_path if where == 'local' else f'memory://{uuid.uuid4()}'
    rows = [{'id': f'r{n}', 'frames': [draw.randbytes(draw.randrange(200)) for _ in range(draw.randrange(4))],
             'conversations': turns('q' * draw.randrange(9), f'ä{n}')} for n in range(101)]
    for file, (start, stop) in enumerate(((0, 40), (40, 40), (40, 41), (41, 101))):
        table = rows[start:stop]
        if table:
            write(f'{folder}/part-{file}.parquet', table, row_group_size=7)
        else:
            with_schema = pyarrow.Table.from_pylist(rows[:1]).slice(0, 0)
            with fsspec.open(f'{folder}/part-{file}.parquet', 'wb') as out:
                parquet.write_table(with_schema, out)
    source = ParquetRows(f'{folder}/part-*.parquet', cache_bytes=3000)
    assert len(source) == 101 and source.path == f'{folder}/part-*.parquet'
    order = draw.choices(range(101), k=300)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for one in (source, pickle.loads(pickle.dumps(source))):
            assert [seen(record) for record in pool.map(one.__getitem__, order)] == [rows[n] for n in order]
    assert source.where(40) == f'{folder}/part-2.parquet row 1' and source.where(100).endswith('part-3.parquet row 60')
    names = [frame.name for n in range(101) for frame in source[n]['frames']]
    assert len(set(names)) == len(names) and all(' row ' in name and ' picture ' in name for name in names)
    assert pickle.loads(pickle.dumps(source[100])) is not None


@pytest.mark.parametrize('row, record', [
    ({'image': {'bytes': b'1', 'path': 'a.png'}, 'conversations': turns('q', 'a')},
     {'image': b'1', 'conversations': turns('q', 'a')}),
    ({'image': {'bytes': None, 'path': 'a.png'}, 'conversations': json.dumps(turns('q', 'ä'))},
     {'image': 'a.png', 'conversations': turns('q', 'ä')}),
    ({'image': {'bytes': None, 'path': None}, 'frames': None, 'conversations': turns('q', 'a')},
     {'conversations': turns('q', 'a')}),
    ({'images': [{'bytes': b'1', 'path': None}, {'bytes': b'2', 'path': None}], 'text': 'not this',
      'messages': [{'role': 'user', 'content': [{'type': 'image', 'text': None}, {'type': 'text', 'text': 'q'}]},
                   {'role': 'assistant', 'content': [{'type': 'text', 'text': 'a'}]}]},
     {'images': [b'1', b'2'], 'text': 'not this',
      'messages': [{'role': 'user', 'content': [{'type': 'image'}, {'type': 'text', 'text': 'q'}]},
                   {'role': 'assistant', 'content': [{'type': 'text', 'text': 'a'}]}]}),
    ({'image': b'1', 'caption': 'A dog.'},
     {'image': b'1', 'caption': 'A dog.', 'conversations': turns('<image>', 'A dog.')}),
    ({'images': [b'1', b'2'], 'text': 'Dogs.'},
     {'images': [b'1', b'2'], 'text': 'Dogs.', 'conversations': turns('<image>\n<image>', 'Dogs.')}),
    ({'frames': ['a.png'], 'conversations': turns('q', 'a'), 'when': datetime.date(2020, 1, 2), 'n': 1.5, 'vector': b'123'},
     {'frames': ['a.png'], 'conversations': turns('q', 'a'), 'when': '2020-01-02', 'n': 1.5})])
def test_kinds_of_columns(tmp_path, row, record):
    assert seen(ParquetRows(write(tmp_path / 'a.parquet', [row]))[0]) == record


def test_only_the_last_row_groups_are_kept(tmp_path):
    rows = [{'image': bytes(1000), 'caption': 'x'}] * 50
    source = ParquetRows(write(tmp_path / 'a.parquet', rows, row_group_size=5), cache_bytes=20_000)
    reads = []
    read, source._read = source._read, lambda number: reads.append(number) or read(number)
    for n in range(50):
        source[n]
    assert reads == list(range(10)), 'in order, each is read once'
    source[49], source[36], source[0], source[49]
    assert reads[10:] == [0], 'three fit, the one not used for longest goes'
    small = ParquetRows(source.path, cache_bytes=1)
    assert [len(small._tables) for n in range(50) if small[n]] == [1] * 50, 'the last one is always kept'


def test_hash_follows_the_content(tmp_path):
    one, two = ([{'caption': word, 'n': n} for n in range(9)] for word in ('a', 'b'))
    hashes = [ParquetRows(write(tmp_path / 'a.parquet', rows)).sha256 for rows in (one, one, two, one * 2)]
    assert hashes[0] == hashes[1] and len(set(hashes)) == 3


def test_damage_is_told(tmp_path):
    rows = [{'id': n, 'image': random.Random(n).randbytes(500), 'caption': 'x'} for n in range(20)]
    path = tmp_path / 'a.parquet'
    write(path, rows, row_group_size=10, write_page_checksum=True)
    content = path.read_bytes()
    path.write_bytes(content[:4000] + b'\xff' * 20 + content[4020:])
    source = ParquetRows(str(path))
    for _ in range(2):
        with pytest.raises(UserError, match='a.parquet: row group 1, which has 10 rows, cannot be read .*; repair the file'):
            source[3]
    assert source[13]['id'] == 13
    for damaged in (content[:-100], content[:-9] + b'\xff' * 5 + content[-4:], b'', b'PAR1', b'{"a": 1}\n'):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match='a.parquet is no readable Parquet file .*; repair it'):
            ParquetRows(str(path))


@pytest.mark.slow
def test_bytes_flipped_anywhere_are_told_or_harmless(tmp_path):
    draw = random.Random(5)
    path = tmp_path / 'a.parquet'
    write(path, [{'id': n, 'image': draw.randbytes(50), 'caption': f'x{n}'} for n in range(20)], row_group_size=5)
    content = path.read_bytes()
    told = 0
    for _ in range(1000):
        changed = bytearray(content)
        for _ in range(draw.choice((1, 1, 8))):
            changed[draw.randrange(len(changed))] = draw.randrange(256)
        path.write_bytes(changed)
        try:
            source = ParquetRows(str(path))
        except UserError:
            told += 1
            continue
        for n in range(len(source) if len(source) < 1000 else 5):
            try:
                source[n]
            except UserError:
                told += 1
    assert told > 50


def test_rows_that_cannot_be_read_are_told(tmp_path):
    text = pyarrow.array([b'\xff', b'good']).cast(pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({'caption': text, 'image': [b'1', b'2']}), tmp_path / 'a.parquet')
    source = ParquetRows(str(tmp_path / 'a.parquet'))
    with pytest.raises(UserError, match='a.parquet row 1: .*; repair or remove the row'):
        source[0]
    assert source[1]['caption'] == 'good'
    source = ParquetRows(write(tmp_path / 'b.parquet', [{'conversations': '[{'}]))
    with pytest.raises(UserError, match='b.parquet row 1 conversations: not valid JSON'):
        source[0]
    source = ParquetRows(write(tmp_path / 'c.parquet', [{'image': b'1', 'caption': 'x'}, {'image': None, 'caption': 'x'}]))
    with pytest.raises(UserError, match='c.parquet row 2 has a caption but no picture'):
        source[1]


def test_mistakes(tmp_path, monkeypatch):
    with pytest.raises(UserError, match='none.parquet does not exist'):
        ParquetRows(str(tmp_path / 'none.parquet'))
    write(tmp_path / 'a.parquet', [{'x': 1, 'y': 2}])
    with pytest.raises(UserError, match='a.parquet has the columns x, y; it needs one of conversations, .*text'):
        ParquetRows(str(tmp_path / 'a.parquet'))
    parquet.write_table(pyarrow.table({'caption': pyarrow.array([], pyarrow.string())}), tmp_path / 'b.parquet')
    with pytest.raises(UserError, match='b.parquet holds no rows'):
        ParquetRows(str(tmp_path / 'b.parquet'))
    monkeypatch.setitem(sys.modules, 'pyarrow.parquet', None)
    with pytest.raises(UserError, match=r"need pyarrow; install it with `pip install 'vora_jax\[parquet\]'`"):
        ParquetRows(str(tmp_path / 'a.parquet'))
