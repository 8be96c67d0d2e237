"""Lists of conversations: LLaVA's format and its variant."""
import json

import PIL.Image
import pytest

from vora_jax.cli import main
from vora_jax.data.sources.json_list import ListedRows
from vora_jax.types import UserError


def said(*values, key='from', roles=('human', 'gpt')):
    return [{key: roles[number % 2], 'value': value} for number, value in enumerate(values)]


def written(tmp_path, rows):
    PIL.Image.new('RGB', (8, 8), 'red').save(tmp_path / 'a.png')
    (tmp_path / 'list.json').write_text(json.dumps(rows))
    return str(tmp_path / 'list.json')


def test_rows_become_our_records(tmp_path):
    rows = ListedRows(written(tmp_path, [
        {'id': 'a', 'image': 'a.png', 'model': 'm', 'conversations': said('What is it?\n<image>', 'Red.', 'Sure?', 'Yes.')},
        {'id': 1, 'conversations': said('Hello', 'Hi')},
        {'id': 2, 'image': 'a.png', 'conversations': said('<image>', 'Red.', key='form', roles=('question', 'answer'))},
        {'id': 3, 'conversations': said('Nobody asked', 'q', 'a', roles=('gpt', 'human'))},
        {'id': 4, 'image': ['a.png', 'b.png'], 'conversations': said('<image> or <image>?', 'b')}]))
    assert [rows[number] for number in range(len(rows))] == [
        {'id': 'a', 'model': 'm', 'frames': ['a.png'],
         'conversations': said('<image>\nWhat is it?', 'Red.', 'Sure?', 'Yes.')},
        {'id': 1, 'conversations': said('Hello', 'Hi')},
        {'id': 2, 'frames': ['a.png'], 'conversations': said('<image>', 'Red.')},
        {'id': 3, 'conversations': said('q', 'a')},
        {'id': 4, 'frames': ['a.png', 'b.png'], 'conversations': said('<image> or <image>?', 'b')}]
    assert rows.where(1) == f'{rows.path} row 2'


def test_the_command_keeps_good_rows_and_counts_bad_ones(tmp_path, capsys):
    good = {'id': 'a', 'image': 'a.png', 'conversations': said('<image>\nq', 'a')}
    bad = [4, {'id': 1}, {'conversations': ['x']}, {**good, 'image': 'none.png'}, {**good, 'image': 5},
           {'id': 2, 'conversations': said('q')}, {'id': 3, 'conversations': said('<image>q', 'a')},
           {'id': 4, 'conversations': said('q', 'a', key='form', roles=('human', 'robot'))}]
    file = written(tmp_path, [good] * 5 + bad)
    arguments = ['prepare', 'llava', file, '--image-root', str(tmp_path), '--to', str(tmp_path / 'out')]
    assert main.main(arguments) == 2 and 'list.json row 6: ' in capsys.readouterr().err
    assert main.main([*arguments, '--max-bad', '0.7', '--vocab-size', '280']) == 0
    assert '8 of 13 rows dropped' in capsys.readouterr().out
    kept = [json.loads(line) for line in (tmp_path / 'out/data.jsonl').read_text().splitlines()]
    assert kept == [{'id': 'a', 'frames': [str(tmp_path / 'a.png')], 'conversations': said('<image>\nq', 'a')}] * 5
    assert (tmp_path / 'out/tokenizer/tokenizer.model').is_file()
    assert len(json.loads((tmp_path / 'out/manifest.json').read_text())['dropped']) == 8


@pytest.mark.parametrize('content, message', [
    ('[]', 'is not a list of conversations'), ('{}', 'is not a list'), ('{"a": 1}\n{"b": 2}', 'is not JSON'),
    (None, 'cannot be read')])
def test_files_that_are_no_list_are_told(tmp_path, content, message):
    if content is not None:
        (tmp_path / 'x.json').write_text(content)
    with pytest.raises(UserError, match=message):
        ListedRows(str(tmp_path / 'x.json'))
