"""`vora prepare --inspect`: a row is shown as it is."""
import argparse
import json
import re

import numpy as np
import PIL.Image
import pytest
import tiny_pictures

from vora_jax.cli import prepare_inspect
from vora_jax.types import UserError


@pytest.fixture
def folder(tmp_path):
    tiny_pictures.make(tmp_path)
    (tmp_path / 'run.gin').write_text(tiny_pictures.CONFIG.format(folder=tmp_path))
    return tmp_path


def inspect(folder, *arguments, bindings=()):
    parser = argparse.ArgumentParser()
    prepare_inspect.add_arguments(parser)
    args = parser.parse_args(['--inspect', str(folder / 'run.gin'), *map(str, arguments)])
    args.gin_files, args.gin_bindings = [], list(bindings)
    assert prepare_inspect.run(args) == 0


def test_a_sample_is_shown_with_text_mask_and_picture(folder, capsys):
    inspect(folder, '--sample', 2, '--draw', folder / 'row.png')
    told = capsys.readouterr().out
    assert told.startswith(f'sample 2: {folder}/test.jsonl row 3\n')
    # The second picture is 16 x 24 pixels high, green, and asked about first.
    assert 'picture 0: 3 x 2 patches' in told and '\\nwhat color?<|im_end|>' in told and '[[green<|im_end|>]]' in told
    assert 'patches       6 of     16' in told
    lines = told[told.index('mask:'):].split('\n')
    vision = lines[1].index('v')
    first = int(lines[1][:vision].count('t'))
    assert lines[1][vision:vision + 7] == 'vvvvvvt'
    seen = 'x' * (first + 6) + '.' * (len(lines[1]) - vision - 6)
    assert [line.split()[1] for line in lines[2 + first:8 + first]] == [seen] * 6
    sheet = np.asarray(PIL.Image.open(folder / 'row.png'))
    assert (sheet == (0, 128, 0)).all(-1).sum() == 16 * 24


def test_a_row_is_shown_and_may_be_any_of_the_run(folder, capsys):
    inspect(folder)
    first = capsys.readouterr().out
    assert re.match(r'row 0: [1-9] samples?\n', first)
    inspect(folder, '--row', 0)
    assert capsys.readouterr().out == first
    inspect(folder, '--row', 1000, bindings=['Train.seed=3', 'Data.pack=False'])  # in a later epoch
    assert capsys.readouterr().out.startswith('row 1000: 1 sample\n')


def test_turns_that_do_not_fit_are_told(folder, capsys):
    row = {'conversations': [{'from': role, 'value': 'is it red?'} for role in ('human', 'gpt') * 3]}
    (folder / 'test.jsonl').write_text(json.dumps(row) + '\n')
    inspect(folder, '--sample', 0, bindings=['Data.max_slots=40'])
    assert 'of its 3 turns are left out' in capsys.readouterr().out
    inspect(folder, bindings=['Data.max_slots=40'])
    assert 'turns are left out' in capsys.readouterr().out
    with pytest.raises(UserError, match='row 1: the first turn needs'):
        inspect(folder, '--sample', 0, bindings=['Data.max_slots=8'])


@pytest.mark.parametrize('arguments, problem', [
    (('--sample', 99), 'no sample 99: .* samples 0 to 11'), (('--sample', -1), 'no sample -1'), (('--row', -1), 'no row -1'),
    (('--draw', '/nowhere/at/all.png'), 'its folder does not exist'), (('--sample', 0, '--draw', 'x.nothing'), 'cannot be')])
def test_mistakes_are_told(folder, arguments, problem, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(UserError, match=problem):
        inspect(folder, *arguments)


def test_a_text_model_has_no_pictures_to_draw(folder, capsys):
    row = {'conversations': [{'from': role, 'value': 'is it red?'} for role in ('human', 'gpt')]}
    (folder / 'test.jsonl').write_text(json.dumps(row) + '\n')
    (folder / 'run.gin').write_text(tiny_pictures.TEXT_CONFIG.format(folder=folder))
    inspect(folder, '--sample', 0, '--draw', folder / 'row.png')
    assert 'pictures' not in capsys.readouterr().out and not (folder / 'row.png').exists()
