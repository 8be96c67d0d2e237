"""Any source by its path."""
import gzip
import io
import json
import pickle
import uuid

import PIL.Image
import pytest
import tiny_tars

from vora_jax.data.sources.files import join, open_binary
from vora_jax.data.sources.json_lines import JsonLines
from vora_jax.data.sources.json_list import JsonList
from vora_jax.data.sources.open_rows import open_rows
from vora_jax.data.sources.parquet_rows import ParquetRows
from vora_jax.data.sources.tar_rows import TarRows
from vora_jax.data.text.records import check_record
from vora_jax.types import UserError

fsspec = pytest.importorskip('fsspec')
pyarrow = pytest.importorskip('pyarrow')
parquet = pytest.importorskip('pyarrow.parquet')

ROW = {'id': 'a', 'conversations': [{'from': 'human', 'value': 'q'}, {'from': 'gpt', 'value': 'a'}]}


def a_tar():
    return tiny_tars.packed([('a.json', json.dumps(ROW).encode())])


def a_parquet():
    file = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist([ROW]), file)
    return file.getvalue()


LINES, LIST = json.dumps(ROW).encode(), json.dumps([ROW]).encode()


@pytest.fixture(params=['local', 'memory'])
def folder(request, tmp_path):
    return str(tmp_path) if request.param == 'local' else f'memory://{uuid.uuid4()}'


def write(folder, **files):
    for name, content in files.items():
        with fsspec.open(f'{folder}/{name.replace("_", ".")}', 'wb') as file:
            file.write(content)


@pytest.mark.parametrize('name, content, kind', [
    ('a.jsonl', LINES, JsonLines), ('a.json', LINES, JsonLines), ('a.json', b'\xef\xbb\xbf \n ' + LIST, JsonList),
    ('a.jsonl', LIST, JsonList), ('a.parquet', a_parquet(), ParquetRows), ('a.tar', a_tar(), TarRows),
    ('rows', LINES, JsonLines)])
def test_the_content_decides(folder, tmp_path, name, content, kind):
    write(folder, **{name.replace('.', '_'): content})
    for path in (name, name.replace('a', '?', 1), name.replace('a', '{a,a}', 1)):
        rows = open_rows(f'{folder}/{path}', cache=str(tmp_path / 'cache'))
        assert type(rows) is kind and len(rows) == 1 and rows[0]['conversations'] == ROW['conversations']
        assert folder.rpartition('/')[2] in rows.where(0) and len(rows.sha256) == 64
        again = pickle.loads(pickle.dumps(rows))
        assert again[0] == rows[0] and again.sha256 == rows.sha256 and again.where(0) == rows.where(0)


def test_several_files_are_one_source(folder):
    tars = dict.fromkeys(('a_tar', 'b_tar', 'c_tar'), a_tar())
    write(folder, a_parquet=a_parquet(), b_parquet=a_parquet(), a_json=LIST, b_json=LIST, **tars)
    assert len(open_rows(f'{folder}/*.parquet')) == 2 and len(open_rows(f'{folder}/{{a,c}}.tar')) == 2
    with pytest.raises(UserError, match=r'json names 2 files, .*a\.json and others; .* give each of these a Source'):
        open_rows(f'{folder}/*.json')
    with pytest.raises(UserError, match='names 3 files'):
        open_rows(f'{folder}/a.*')


@pytest.mark.parametrize('files, told', [
    ({'a_parquet': b'', 'b_parquet': b''}, r'it holds a\.parquet and others: name .*/\*\.parquet\.$'),
    ({'a_tar': b'', 'x_jpg': b''}, r'it holds a\.tar: name .*/a\.tar\.$'),
    ({'a_json': b'', 'b_json': b''}, r'it holds a\.json and others: name .*/a\.json\.$'),
    ({'x_jpg': b''}, r'without manifest\.json; .* holds x\.jpg\.$'),
    ({'manifest_json': b'{"version": 1}', 'data_jsonl': b''},
     r'is a folder of files; it holds data\.jsonl: name .*/data\.jsonl\.$')])
def test_folders_that_are_no_source_say_what_to_name(folder, files, told):
    write(folder, **files)
    with pytest.raises(UserError, match=told):
        open_rows(folder)


def test_an_empty_folder(tmp_path):
    with pytest.raises(UserError, match='without manifest.json; it is empty'):
        open_rows(str(tmp_path))


def test_a_damaged_manifest_and_a_remote_prepared_folder(tmp_path):
    (tmp_path / 'manifest.json').write_text('{"version":')
    with pytest.raises(UserError, match='manifest'):
        open_rows(str(tmp_path))
    remote = f'memory://{uuid.uuid4()}'
    write(remote, manifest_json=b'{"version": 2}')
    with pytest.raises(UserError, match='read from a local path; mount the bucket'):
        open_rows(remote)


@pytest.mark.parametrize('name, content, told', [
    ('a.json', gzip.compress(LINES, mtime=0), 'a.json is compressed with gzip, .*; unpack it'),
    ('a.tar.gz', gzip.compress(a_tar(), mtime=0), 'compressed with gzip'),
    ('a.tgz', gzip.compress(a_tar(), mtime=0), 'compressed with gzip'),
    ('data', a_parquet(), 'holds a .parquet file; give it that ending'), ('data', a_tar(), 'holds a .tar file'),
    ('a.bin', bytes(range(256)) * 9, 'is neither text nor Parquet nor tar'), ('a.jsonl', b'', 'a.jsonl is empty'),
    ('a.jsonl', LINES.decode().encode('utf-16'), 'a.jsonl is text in UTF-16; save it as UTF-8'),
    ('a.jsonl', b'\n', 'a.jsonl is empty'), ('a.tar', LINES, 'a.tar is no tar file'),
    ('a.parquet', LINES, 'a.parquet is no readable Parquet')])
def test_unknown_content_is_told(folder, name, content, told):
    with fsspec.open(f'{folder}/{name}', 'wb') as file:
        file.write(content)
    with pytest.raises(UserError, match=told):
        open_rows(f'{folder}/{name}')


def test_what_is_missing(folder):
    write(folder, b_tar=a_tar())
    for name in ('none.json', 'none.parquet', 'none.tar', 'none'):
        with pytest.raises(UserError, match=f'{name} does not exist'):
            open_rows(f'{folder}/{name}')
    with pytest.raises(UserError, match=r'nothing matches; .* holds b\.tar'):
        open_rows(f'{folder}/*.parquet')


def test_all_kinds_give_the_same_samples(folder):
    pictures = {}
    for name, color in (('a.png', 'red'), ('b.png', 'blue')):
        file = io.BytesIO()
        PIL.Image.new('RGB', (28, 14), color).save(file, 'PNG')
        pictures[name] = file.getvalue()
        with fsspec.open(f'{folder}/pictures/{name}', 'wb') as out:
            out.write(file.getvalue())
    rows = [{'id': 'x', 'image': 'a.png',
             'conversations': [{'from': 'human', 'value': '<image>\nq'}, {'from': 'gpt', 'value': 'a'}]},
            {**ROW, 'id': 'y'},
            {'id': 'z', 'image': ['b.png', 'a.png'],
             'conversations': [{'from': 'human', 'value': '<image> or <image>?'}, {'from': 'gpt', 'value': 'b'}]}]

    def named(row):
        image = row.get('image', [])
        return image if isinstance(image, list) else [image]

    table = pyarrow.Table.from_pylist([{**row, 'image': [pictures[name] for name in named(row)]} for row in rows])
    held = io.BytesIO()
    parquet.write_table(table, held)
    tar = tiny_tars.packed((f'{row["id"]}.{name}', content) for row in rows for name, content in (
        *((name, pictures[name]) for name in named(row)), ('json', json.dumps(row).encode())))
    lines = '\n'.join(map(json.dumps, rows)).encode()
    write(folder, lines_jsonl=lines, list_json=json.dumps(rows).encode(), rows_parquet=held.getvalue(),
          rows_tar=tar)

    def samples(path):
        source, found = open_rows(f'{folder}/{path}'), []
        for n in range(len(source)):
            system, exchanges, frames = check_record(source[n], source.where(n))
            contents = [(open_binary(join(f'{folder}/pictures', frame)) if isinstance(frame, str) else frame.open()).read()
                        for frame in frames]
            found.append((source[n]['id'], system, exchanges, contents))
        return found

    expected = samples('lines.jsonl')
    assert [len(contents) for *_, contents in expected] == [1, 0, 2]
    assert [contents for *_, contents in expected] == [[pictures[name] for name in named(row)] for row in rows]
    for path in ('list.json', 'rows.parquet', 'rows.tar'):
        assert samples(path) == expected, path
