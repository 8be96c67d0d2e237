"""`vora prepare rows`: every kind of source, bad rows, interruptions."""
import argparse
import datetime
import errno
import io
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import PIL.Image
import pytest
from tiny_rows import hashes, in_every_kind, made_up_rows, picture, plain, turns, with_bytes, written

from vora_jax.cli import main, prepare
from vora_jax.data.config import ImagePolicy
from vora_jax.data.images.patches import fit_grid
from vora_jax.data.prepare import rows_folder, tallies
from vora_jax.data.prepare.row_parts import Plan
from vora_jax.data.sources.json_lines import JsonLines
from vora_jax.data.sources.open_rows import open_rows
from vora_jax.data.sources.prepared_rows import PreparedRows
from vora_jax.data.text.tokenizer import load_tokenizer
from vora_jax.types import UserError


def run(*arguments):
    parser = argparse.ArgumentParser()
    prepare.add_arguments(parser)
    return prepare.run(parser.parse_args(['rows', *map(str, arguments)]))


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    """(rows, source file, prepared folder, manifest)."""
    folder = tmp_path_factory.mktemp('made')
    rows = made_up_rows(23)
    file = written(folder / 'source', rows)
    assert run(file, '--to', folder / 'out', '--workers', 0, '--rows-per-part', 10) == 0
    return rows, file, str(folder / 'out'), json.loads((folder / 'out/manifest.json').read_text())


def test_counts_and_statistics(made, tmp_path):
    rows, file, _, manifest = made
    assert manifest['counts'] == {'samples': 23, 'pictures': manifest['counts']['pictures'], 'turns': 23,
                                  'text_only': sum('frames' not in row for row in rows)}
    assert (manifest['version'], manifest['rows'], manifest['num_dropped'], manifest['dropped']) == (2, 23, 0, [])
    text = [''.join(turn['value'] for turn in row['conversations']).replace('<image>', '') for row in rows]
    assert manifest['statistics']['characters']['sum'] == sum(map(len, text))
    run(file, '--to', tmp_path / 'words', '--workers', 0, '--vocab-size', 300)
    run(file, '--to', tmp_path / 'out', '--workers', 0, '--tokenizer', tmp_path / 'words/tokenizer', '--patch-size', 4)
    statistics = json.loads((tmp_path / 'out/manifest.json').read_text())['statistics']
    tokenizer = load_tokenizer(str(tmp_path / 'words/tokenizer'))
    tokens = sorted(sum(len(tokenizer.encode(turn['value'].replace('<image>', ''))) for turn in row['conversations'])
                    for row in rows)
    assert statistics['tokens'] == {'sum': sum(tokens), 'min': tokens[0], 'median': tokens[11], 'p95': tokens[21],
                                    'max': tokens[22]}
    patches = []
    for row in with_bytes(rows):
        sizes = [PIL.Image.open(io.BytesIO(content)).size[::-1] for content in row.get('frames', ())]
        grids = [fit_grid(*size, 4, ImagePolicy()) for size in sizes]
        patches.append(sum(height * width for height, width in grids))
    assert statistics['patches']['sum'] == sum(patches) and statistics['patches']['max'] == max(patches)


def test_summary_of_merged_tallies():
    rng = random.Random(5)
    values, parts = [], []
    for _ in range(4):
        part = {}
        for _ in range(rng.randint(1, 50)):
            values.append(rng.randint(0, 40))
            tallies.add(part, x=values[-1])
        parts.append(json.loads(json.dumps(tallies.stored(part))))
    values.sort()
    assert tallies.summary(tallies.merged(parts)['x']) == {
        'sum': sum(values), 'min': values[0], 'median': values[-(-len(values) // 2) - 1],
        'p95': values[-(-len(values) * 95 // 100) - 1], 'max': values[-1]}


def test_every_kind_of_picture_place_is_kept(tmp_path):
    """Videos keep all frames, pictures that stand in turns move out of them, EXIF turns sizes, keys of the row stay."""
    turned, exif = io.BytesIO(), PIL.Image.Exif()
    exif[0x0112] = 6
    PIL.Image.new('RGB', (20, 10)).save(turned, 'JPEG', exif=exif)
    rows = [
        {'video': ['0.jpg', '1.jpg', '2.jpg'], 'timestamps': [1, 2, 3], 'conversations': turns('And?', 'It moves.')},
        {'id': 'm', 'image': None, 'messages': [
            {'role': 'user', 'content': [{'type': 'image', 'image': '3.jpg'}, {'type': 'text', 'text': 'And?'}]},
            {'role': 'assistant', 'content': 'Nothing.'}]},
        {'image': 'turned.jpg', 'conversations': turns('q', 'a')}]
    source = written(tmp_path / 's', rows, ['0.jpg', '1.jpg', '2.jpg', '3.jpg'])
    (tmp_path / 's/turned.jpg').write_bytes(turned.getvalue())
    assert run(source, '--to', tmp_path / 'out', '--workers', 0) == 0
    prepared = PreparedRows(str(tmp_path / 'out'))
    assert prepared[2]['frames'][0].size == (20, 10)
    assert plain(prepared)[:2] == [
        {**rows[0], 'video': [picture(number) for number in range(3)]},
        {'id': 'm', 'frames': [picture(3)], 'messages': [
            {'role': 'user', 'content': [{'type': 'image'}, {'type': 'text', 'text': 'And?'}]},
            {'role': 'assistant', 'content': 'Nothing.'}]}]


def test_every_kind_of_source_becomes_the_same_rows(tmp_path):
    rows = made_up_rows(12)
    for row in rows:  # a list moves a lone `<image>` to a line of its own
        row['conversations'][-2]['value'] = row['conversations'][-2]['value'].replace('<image>', '')
    written(tmp_path / 's', rows)
    pytest.importorskip('pyarrow')
    kinds = {**in_every_kind(tmp_path / 's', rows), 'again': str(tmp_path / 'jsonl')}
    for kind, path in kinds.items():
        run(path, '--to', tmp_path / kind, '--workers', 0, '--rows-per-part', 5)
    found = {kind: plain(open_rows(str(tmp_path / kind))) for kind in kinds}
    assert found['jsonl'] == found['json'] == found['again'] == found['tar'] == with_bytes(rows)
    assert found['parquet'] == [{key: value for key, value in row.items() if key != 'kind'} for row in with_bytes(rows)]


class Listed:
    """Rows in memory. Picklable."""

    path, sha256 = 'listed', 'f' * 64

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, row):
        if isinstance(self.rows[row], Exception):
            raise self.rows[row]
        return self.rows[row]

    def where(self, row):
        return f'listed row {row + 1}'


class Bar:
    """Counts like tqdm."""

    def __init__(self, total, initial, desc):
        self.n, self.total = initial, total
        Bar.last = self

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def update(self, count):
        self.n += count


def test_values_that_json_lacks(tmp_path):
    rows = [{'conversations': turns('q', 'a'), 'day': datetime.date(2026, 1, 2)},
            {'conversations': turns('q', 'a'), 'x': b'bytes'}, {'conversations': turns('q', 'a'), 'x': '\ud800'}]
    manifest = rows_folder.prepare(Listed(rows), str(tmp_path / 'out'), Plan(2, ''), Bar, max_bad=0.9)
    assert PreparedRows(str(tmp_path / 'out'))[0]['day'] == '2026-01-02' and Bar.last.n == Bar.last.total == 3
    assert manifest['num_dropped'] == 2 and 'what JSON cannot (a value of type bytes)' in manifest['dropped'][0]


def test_bad_rows_are_dropped_counted_and_limited(tmp_path, capsys):
    rows = made_up_rows(8) + [{'frames': ['none.jpg'], 'conversations': turns('q', 'a')}, 4, {'id': 1},
                              {'frames': ['cut.jpg'], 'conversations': turns('q', 'a')},
                              {'frames': ['0.jpg'], 'conversations': turns('<image><image>', 'a')}]
    source = written(tmp_path / 's', rows[:8])
    whole = picture(1, (64, 64))
    (tmp_path / 's/cut.jpg').write_bytes(whole[:-40])
    (tmp_path / 's/rows.jsonl').write_text('\n'.join(map(json.dumps, rows)) + '\n{"id": 3,')
    to = tmp_path / 'out'
    with pytest.raises(UserError, match=r'6 of 14 rows are bad, .*rows.jsonl row 9: image .*none.jpg does not exist'):
        run(source, '--to', to, '--workers', 0, '--max-bad', 0.42)
    assert not to.exists() and (tmp_path / 'out.partial').exists()
    assert run(source, '--to', to, '--workers', 2, '--max-bad', 0.5) == 0  # nothing is left for the processes
    assert '6 of 14 rows dropped' in capsys.readouterr().out and not (tmp_path / 'out.partial').exists()
    manifest = json.loads((to / 'manifest.json').read_text())
    listed = [json.loads(line) for line in (to / 'dropped.jsonl').read_text().splitlines()]
    assert [f'{row["where"]}: {row["reason"]}' for row in listed] == manifest['dropped']
    assert [row['where'] for row in listed] == [f'{source} row {number}' for number in range(9, 15)]
    for row, reason in zip(listed, ('none.jpg does not exist', 'not a JSON object', 'conversations is missing',
                                    'cut.jpg cannot be read', 'placeholders', 'not valid JSON')):
        assert reason in row['reason']
    assert plain(PreparedRows(str(to))) == with_bytes(rows[:8])
    assert run(source, '--to', to, '--workers', 0) == 0 and 'already prepared' in capsys.readouterr().out


def test_it_stops_as_soon_as_too_many_rows_are_bad(tmp_path):
    rows = [{'frames': ['none.jpg'], 'conversations': turns('q', 'a')}] * 40
    with pytest.raises(UserError, match=r'5 of 40 rows \(of 5 that were read\) are bad, .*row 1: image .*none.jpg does not'):
        run(written(tmp_path / 's', rows, []), '--to', tmp_path / 'out', '--workers', 0, '--rows-per-part', 5)
    assert os.listdir(tmp_path) == ['s']  # nothing is worth keeping


def test_headers_are_enough_without_check(tmp_path):
    source = written(tmp_path / 's', [{'frames': ['1.jpg'], 'conversations': turns('q', 'a')}])
    (tmp_path / 's/1.jpg').write_bytes(picture(1, (64, 64))[:-40])
    with pytest.raises(UserError, match='1 of 1 rows are bad'):
        run(source, '--to', tmp_path / 'out', '--workers', 0)
    assert run(source, '--to', tmp_path / 'out', '--workers', 0, '--no-check') == 0
    assert PreparedRows(str(tmp_path / 'out'))[0]['frames'][0].size == (64, 64)


def test_processes_write_the_same_bytes(made, tmp_path):
    _, file, to, _ = made
    assert run(file, '--to', tmp_path / 'out', '--workers', 2, '--rows-per-part', 10) == 0
    assert hashes(tmp_path / 'out') == hashes(to)
    assert os.listdir(tmp_path) == ['out']


class Fragile(Listed):
    """Stops like Ctrl-C when a row is read that often."""

    def __init__(self, rows, left):
        super().__init__(rows)
        self.left = left

    def __getitem__(self, row):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return super().__getitem__(row)


def test_interrupted_anywhere_it_goes_on(tmp_path):
    rows, rng = [{'id': number, 'conversations': turns(f'q{number}', 'a')} for number in range(17)], random.Random(2)
    plan = Plan(3, '')
    rows_folder.prepare(Listed(rows), str(tmp_path / 'whole'), plan, Bar)
    done, attempts = False, 0
    while not done:
        attempts += 1
        try:
            rows_folder.prepare(Fragile(rows, rng.randint(1, 7)), str(tmp_path / 'out'), plan, Bar)
            done = True
        except KeyboardInterrupt:
            assert not (tmp_path / 'out').exists()
        assert not list(tmp_path.glob('out.partial/new-*'))
    assert attempts > 2 and hashes(tmp_path / 'out') == hashes(tmp_path / 'whole') and Bar.last.n == 17
    assert sorted(os.listdir(tmp_path)) == ['out', 'whole']


def test_unfinished_work_of_another_source_is_refused(tmp_path):
    rows = [{'conversations': turns('q', 'a')}] * 4
    to, plan = str(tmp_path / 'out'), Plan(1, '')
    with pytest.raises(KeyboardInterrupt):
        rows_folder.prepare(Fragile(rows, 2), to, plan, Bar)
    before = hashes(tmp_path)
    with pytest.raises(UserError, match='out.partial holds the unfinished work of another source'):
        rows_folder.prepare(Listed(rows), to, plan._replace(rows_per_part=2), Bar)
    assert hashes(tmp_path) == before
    (tmp_path / 'mine.partial').mkdir()
    (tmp_path / 'mine.partial/notes.txt').write_text('keep')
    with pytest.raises(UserError, match='mine.partial holds the unfinished work of another source'):
        rows_folder.prepare(Listed(rows), str(tmp_path / 'mine'), plan, Bar)
    assert os.listdir(tmp_path / 'mine.partial') == ['notes.txt']
    part = next((tmp_path / 'out.partial/files').glob('rows-00000*'))
    part.write_bytes(b'cut')  # a part that is not what its report says is made again
    rows_folder.prepare(Listed(rows), to, plan, Bar)
    assert len(PreparedRows(to)) == 4


def test_two_at_a_time_are_refused(tmp_path):
    class Nested(Listed):
        def __getitem__(self, row):
            with pytest.raises(UserError, match='is being written by another `vora prepare`'):
                rows_folder.prepare(Listed(self.rows), str(tmp_path / 'out'), Plan(1, ''), Bar)
            return super().__getitem__(row)

    rows_folder.prepare(Nested([{'conversations': turns('q', 'a')}]), str(tmp_path / 'out'), Plan(1, ''), Bar)
    assert os.listdir(tmp_path) == ['out']


def test_a_full_disk_is_told_and_the_rest_is_done_later(tmp_path):
    rows = [{'id': number, 'frames': [f'{number}.jpg'], 'conversations': turns('q', 'a')} for number in range(12)]
    source = written(tmp_path / 's', rows)
    for number in range(6, 12):
        (tmp_path / f's/{number}.jpg').write_bytes(picture(number) + bytes(100_000))
    command = ['prepare', 'rows', source, '--to', str(tmp_path / 'out'), '--workers', '0', '--rows-per-part', '6']
    program = ('import resource, sys; from vora_jax.cli.main import main; '
               'resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000)); sys.exit(main(sys.argv[1:]))')
    result = subprocess.run([sys.executable, '-c', program, *command], capture_output=True, text=True, check=False)
    assert result.returncode == 2 and result.stderr.count('\n') == 1, result.stderr
    assert 'File too large' in result.stderr and 'goes on with the missing parts' in result.stderr
    assert [path.name for path in (tmp_path / 'out.partial').glob('part-*')] == ['part-00000-of-00002.json']
    assert main.main(command) == 0 and len(PreparedRows(str(tmp_path / 'out'))) == 12


@pytest.mark.slow
@pytest.mark.parametrize('send', [signal.SIGKILL, signal.SIGINT])
def test_killed_processes_leave_work_that_goes_on(tmp_path, send):
    rows = [{'id': number, 'frames': [f'{number}.png'], 'conversations': turns('q', 'a')} for number in range(40)]
    source = written(tmp_path / 's', rows, [])
    for number in range(40):
        (tmp_path / f's/{number}.png').write_bytes(picture(number, (600, 600), 'PNG'))
    arguments = (source, '--rows-per-part', 4, '--workers', 2)
    run(*arguments, '--to', tmp_path / 'whole')
    command = [sys.executable, '-m', 'vora_jax.cli.main', 'prepare', 'rows', *map(str, arguments),
               '--to', str(tmp_path / 'out')]
    ended, after = [], 2
    for _ in range(3):
        process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
        while process.poll() is None and len(list(tmp_path.glob('out.partial/part-*'))) < after:
            time.sleep(0.005)
        after += 3
        if send == signal.SIGKILL:
            process.kill()  # only the first process; the others notice
        else:
            os.killpg(process.pid, send)
        _, told = process.communicate(timeout=30)
        ended.append(process.returncode)
        if send == signal.SIGINT and process.returncode:
            assert process.returncode == 130 and 'Traceback' not in told
            assert told.strip().splitlines()[-1] == 'vora: interrupted.'
        deadline = time.time() + 10
        while _session(process.pid) and time.time() < deadline:
            time.sleep(0.05)
        assert not _session(process.pid)
    assert ended[0]
    run(*arguments, '--to', tmp_path / 'out')
    assert hashes(tmp_path / 'out') == hashes(tmp_path / 'whole')


def _session(leader):
    """Processes that a process of this number started."""
    found = []
    for folder in pathlib.Path('/proc').glob('[0-9]*'):
        try:
            state, _, _, session = (folder / 'stat').read_text().rpartition(')')[2].split()[:4]
        except OSError:
            continue
        if int(session) == leader and state != 'Z':
            found.append(folder.name)
    return found


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_tokenizer_is_trained_on_request(made, tmp_path, capsys, monkeypatch):
    _, file, _, _ = made
    for to in ('out', 'again'):
        assert run(file, '--to', tmp_path / to, '--workers', 0, '--vocab-size', 300, '--json') == 0
        assert json.loads(capsys.readouterr().out)['vocab_size'] == 300
    assert load_tokenizer(str(tmp_path / 'out/tokenizer')).vocab_size == 300
    assert hashes(tmp_path / 'out') == hashes(tmp_path / 'again') and 'tokenizer/tokenizer.model' in hashes(tmp_path / 'out')
    with pytest.raises(UserError, match='another --vocab-size'):
        run(file, '--to', tmp_path / 'small', '--workers', 0, '--vocab-size', 20)
    with monkeypatch.context() as patch, pytest.raises(UserError, match='partial/files cannot be written .No space left'):
        patch.setattr(rows_folder, 'train_sentencepiece', full_disk)
        run(file, '--to', tmp_path / 'small', '--workers', 0, '--vocab-size', 300)
    assert run(file, '--to', tmp_path / 'small', '--workers', 0, '--vocab-size', 300) == 0  # the parts were kept
    assert hashes(tmp_path / 'small') == hashes(tmp_path / 'out')


def test_mistakes_are_told(made, tmp_path, capsys):
    _, file, to, _ = made
    with pytest.raises(UserError, match='nowhere.json does not exist'):
        run(tmp_path / 'nowhere.json', '--to', tmp_path / 'b')
    with pytest.raises(UserError, match='was prepared from another source, with other options'):
        run(file, '--to', to, '--rows-per-part', 11)
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match='cannot be written'):
        run(file, '--to', tmp_path / 'file/out', '--workers', 0)
    for wrong in (('--workers', '-1'), ('--rows-per-part', '0'), ('--rows-per-part', 'x'), ('--max-bad', '2')):
        with pytest.raises(SystemExit):
            run(file, '--to', tmp_path / 'b', *wrong)
    for arguments, told in (
            (['prepare'], 'needs a SOURCE'), (['prepare', '--row', '0'], 'belong to --inspect'),
            (['prepare', '--draw', 'x.png', 'rows', file, '--to', 'b'], 'belong to --inspect'),
            (['prepare', '--inspect', 'x.gin', 'rows', file, '--to', 'b'], 'prepares nothing; leave rows out')):
        assert main.main(arguments) == 2 and told in capsys.readouterr().err
    assert JsonLines(file).sha256 and not (tmp_path / 'b').exists()
