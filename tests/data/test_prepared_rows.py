"""Reading a folder that `vora prepare rows` wrote: shared, damaged, incomplete."""
import concurrent.futures
import hashlib
import json
import os
import pathlib
import pickle
import random

import PIL.Image
import pytest
import tqdm
from tiny_rows import hashes, made_up_rows, picture, plain, turns, with_bytes, written

from vora_jax.data.prepare.row_parts import Plan
from vora_jax.data.prepare.rows_folder import prepare
from vora_jax.data.sources.json_lines import JsonLines
from vora_jax.data.sources.prepared_rows import PreparedRows, part_files
from vora_jax.types import UserError


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    """(rows, source file, prepared folder, manifest)."""
    folder = tmp_path_factory.mktemp('made')
    rows = made_up_rows(23)
    file = written(folder / 'source', rows)
    prepare(JsonLines(file), str(folder / 'out'), Plan(10, str(folder / 'source')), tqdm.tqdm)
    return rows, file, str(folder / 'out'), json.loads((folder / 'out/manifest.json').read_text())


def test_rows_and_pictures_come_back(made):
    rows, _, to, manifest = made
    prepared = PreparedRows(to)
    assert len(prepared) == 23 and prepared.where(9) == f'{to} row 10' and plain(prepared) == with_bytes(rows)
    assert prepared.sha256 == hashlib.sha256(pathlib.Path(to, 'manifest.json').read_bytes()).hexdigest()
    frames = [frame for number in range(23) for frame in prepared[number].get('frames', ())]
    for frame in frames:
        image = PIL.Image.open(frame.open())
        assert frame.size == (image.height, image.width)
    used = {(number // 10, name) for number, row in enumerate(rows) for name in row.get('frames', ())}
    assert len({frame.name for frame in frames}) == len(used) == manifest['counts']['pictures']  # once in a part
    assert sum(manifest['pictures']) == len(used) and manifest['parts'] == [10, 10, 3]
    assert sorted(hashes(to)) == sorted([*manifest['files'], 'manifest.json'])
    assert {name: sha256 for name, sha256 in hashes(to).items() if name != 'manifest.json'} == manifest['files']


def test_it_is_shared_by_threads_and_processes(made):
    rows, _, to, _ = made
    prepared, expected = PreparedRows(to), with_bytes(rows)
    prepared[0]
    copy = pickle.loads(pickle.dumps(prepared))
    row = next(row for row in map(prepared.__getitem__, range(23)) if 'frames' in row)
    frame = pickle.loads(pickle.dumps(row))['frames'][0]
    assert frame.open().read() in [content for row in expected for content in row.get('frames', ())]

    def read(seed):
        number = random.Random(seed).randrange(23)
        row = copy[number]
        if 'frames' in row:
            row['frames'] = [frame.open().read() for frame in row['frames']]
        return row == expected[number]

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(500)))


def test_few_files_stay_open(made, monkeypatch):
    rows, _, to, _ = made
    monkeypatch.setattr('vora_jax.data.sources.record_files.MOST_OPEN', 2)
    prepared, before = PreparedRows(to), len(os.listdir('/proc/self/fd'))
    assert plain(prepared) == with_bytes(rows)
    assert len(os.listdir('/proc/self/fd')) <= before + 2


def test_damage_is_found_and_told(made, tmp_path):
    """A flipped bit makes one row or picture unreadable, or nothing; never another one."""
    rows, _, to, manifest = made
    expected, rng, told = with_bytes(rows), random.Random(11), 0
    for trial in range(24):
        copy = tmp_path / str(trial)
        copy.mkdir()
        name = part_files(trial % 2, 3)[trial // 2 % 2]
        for file in pathlib.Path(to).iterdir():
            os.link(file, copy / file.name)
        content = bytearray((copy / name).read_bytes())
        place = rng.randrange(max(index for index, byte in enumerate(content[:65536]) if byte))
        content[place] ^= 1 << rng.randrange(8)
        (copy / name).unlink()
        (copy / name).write_bytes(content)
        try:
            prepared = PreparedRows(str(copy))
        except UserError as error:
            assert 'is not the file that was written' in str(error)
            continue
        for number in range(23):
            try:
                row = prepared[number]
                contents = [frame.open().read() for frame in row.get('frames', ())]
            except UserError as error:
                told += 1
                assert f'{name}: record ' in str(error) and 'cannot be read' in str(error)
                continue
            assert ({**row, 'frames': contents} if contents else row) == expected[number]
    assert told


@pytest.mark.parametrize('change, message', [
    (lambda folder, a, b: (folder / a).unlink(), 'is missing'),
    (lambda folder, a, b: (folder / a).write_bytes((folder / a).read_bytes()[:-1]), 'is not the file that was written'),
    (lambda folder, a, b: (folder / a).write_bytes(bytes((folder / a).stat().st_size)), 'and 0 records'),
    (lambda folder, a, b: (folder / a).write_bytes((folder / b).read_bytes()), 'is not the file that was written'),
    (lambda folder, a, b: (folder / 'manifest.json').unlink(), 'cannot be read'),
    (lambda folder, a, b: (folder / 'manifest.json').write_text('{'), 'is no manifest'),
    (lambda folder, a, b: (folder / 'manifest.json').write_text('{"version": 3}'), 'prepared by another version'),
    (lambda folder, a, b: (folder / 'manifest.json').write_text('{"version": 2, "parts": [1]}'), 'does not tell the files'),
    (lambda folder, a, b: (folder / 'manifest.json').write_text('{"version": 1, "files": {"test.jsonl": ""}}'),
     'is not a folder of rows; name one of its files, test.jsonl')])
@pytest.mark.parametrize('kind', [0, 1])
def test_a_folder_that_is_not_whole_is_told_at_opening(made, tmp_path, change, message, kind):
    _, _, to, _ = made
    for file in pathlib.Path(to).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    change(tmp_path, part_files(0, 3)[kind], part_files(2, 3)[kind])
    with pytest.raises(UserError, match=message):
        PreparedRows(str(tmp_path))


def test_pictures_of_another_run_are_told(tmp_path):
    for name, size in (('a', (30, 30)), ('b', (30, 40))):
        source = written(tmp_path / name, [{'frames': ['1.jpg'], 'conversations': turns('q', 'a')}])
        (tmp_path / name / '1.jpg').write_bytes(picture(1, size) + bytes(size[1]))
        prepare(JsonLines(source), str(tmp_path / f'{name}.out'), Plan(5, str(tmp_path / name)), tqdm.tqdm)
    pictures = part_files(0, 1)[1]
    (tmp_path / 'b.out' / pictures).replace(tmp_path / 'a.out' / pictures)
    with pytest.raises(UserError, match='belong to different runs'):
        PreparedRows(str(tmp_path / 'a.out'))[0]['frames'][0].open()
