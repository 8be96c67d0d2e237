"""ScienceQA's problems: goldens, rows, bad problems."""
import json
import pathlib

import PIL.Image
import pytest

from vora_jax.cli import main
from vora_jax.data.prepare.science_qa import FORMATS, groups, prompt_and_answer
from vora_jax.data.text.records import check_record

GOLDEN = json.loads((pathlib.Path(__file__).parent / 'science_qa_golden/prompts.json').read_text(encoding='utf-8'))


@pytest.mark.parametrize('golden', GOLDEN['out'],
                         ids=[f'{each["format"]}-{each["qid"]}{"-caption" * each["use_caption"]}' for each in GOLDEN['out']])
def test_prompts_and_answers_are_those_of_the_released_code(golden):
    problem = GOLDEN['problems'][golden['qid']]
    caption = problem['caption'] if golden['use_caption'] else ''
    assert prompt_and_answer(problem, golden['format'], caption) == (golden['prompt'], golden['answer'])


def test_the_goldens_show_every_format():
    assert {golden['format'] for golden in GOLDEN['out']} <= set(FORMATS) and len(GOLDEN['out']) == 30


@pytest.mark.parametrize('subject, hint, image, grade, expected', [
    ('natural science', 'h', 'image.png', 'grade6', ['NAT', 'TXT', 'IMG', 'G1-6']),
    ('social science', '', 'image.png', 'grade7', ['SOC', 'IMG', 'G7-12']),
    ('language science', 'h', None, 'grade1', ['LAN', 'TXT', 'G1-6']),
    ('language science', '', None, 'grade12', ['LAN', 'NO', 'G7-12'])])
def test_groups_are_the_columns_of_the_table(subject, hint, image, grade, expected):
    assert groups({'subject': subject, 'hint': hint, 'image': image, 'grade': grade}) == expected


def problem(number, **changes):
    return {'question': f'Which  is {number}?', 'choices': ['x', 'y', 'z'], 'answer': number % 3, 'hint': '', 'image': None,
            'lecture': 'One.\nTwo.', 'solution': 'So.', 'subject': 'natural science', 'grade': 'grade3', 'split': 'train',
            **changes}


def make(folder, problems, splits=None):
    """A folder laid out as ScienceQA's; every problem with an image gets its picture."""
    folder.mkdir()
    (folder / 'problems.json').write_text(json.dumps(problems))
    if splits is not None:
        (folder / 'pid_splits.json').write_text(json.dumps(splits))
    for name, each in problems.items():
        if each.get('image'):
            place = folder / 'images' / each['split'] / name
            place.mkdir(parents=True)
            PIL.Image.new('RGB', (20, 10), 'red').save(place / 'image.png')
    return folder


def run(*arguments):
    return main.main([str(argument) for argument in ('prepare', 'science-qa', *arguments)])


def rows_of(file):
    return [json.loads(line) for line in file.read_text(encoding='utf-8').splitlines()]


PROBLEMS = {'7': problem(7), '3': problem(3, split='test', image='image.png', hint='Look.', grade='grade11'),
            '8': problem(8, split='val')}


def test_one_file_a_split(tmp_path, capsys):
    source = make(tmp_path / 'science', PROBLEMS, {'train': ['7'], 'val': ['8'], 'test': ['3'], 'minitest': ['3']})
    (tmp_path / 'captions.json').write_text(json.dumps({'captions': {'3': 'a red strip', '7': ''}}))
    assert run(source, '--to', tmp_path / 'out', '--captions', tmp_path / 'captions.json', '--format', 'CQM-LEA') == 0
    assert 'train 1, val 1, test 1; 0 of 3 rows dropped' in capsys.readouterr().out
    row, = rows_of(tmp_path / 'out/test.jsonl')
    file = str(source / 'images/test/3/image.png')
    assert row == {
        'id': '3', 'frames': [file], 'kind': 'NAT', 'groups': ['NAT', 'TXT', 'IMG', 'G7-12'], 'num_choices': 3,
        'choice': 'A', 'subject': 'natural science', 'grade': 'grade11', 'has_image': True, 'has_text': True,
        'conversations': [
            {'from': 'human', 'value': '<image>\nContext: Look. a red strip\nQuestion: Which is 3?\n'
                                       'Options: (A) x (B) y (C) z\nResponse:'},
            {'from': 'gpt', 'value': 'One.\\nTwo. So. The answer is A.'}]}
    assert check_record(row, '')[2] == [file]
    text, = rows_of(tmp_path / 'out/train.jsonl')
    assert text['frames'] == [] and text['groups'] == ['NAT', 'NO', 'G1-6'] and text['choice'] == 'B'
    assert run(source, '--to', tmp_path / 'out', '--captions', tmp_path / 'captions.json', '--format', 'CQM-LEA') == 0
    assert 'already prepared' in capsys.readouterr().out
    assert run(source, '--to', tmp_path / 'out') == 2 and 'another source' in capsys.readouterr().err


def test_without_a_list_of_splits_the_problems_name_theirs(tmp_path):
    assert run(make(tmp_path / 'science', PROBLEMS), '--to', tmp_path / 'out') == 0
    assert [rows_of(tmp_path / f'out/{split}.jsonl')[0]['id'] for split in ('train', 'val', 'test')] == ['7', '8', '3']


BAD = [(problem(1, answer=3), "answer 3 is not the number of a choice, 0 to 2"), (problem(1, answer=True), 'answer True'),
       (problem(1, choices=[]), 'there are 0 choices'), (problem(1, choices=['a', 4]), 'choices is not a list of texts'),
       (problem(1, choices=['a'] * 27), 'there are 27 choices'), (problem(1, subject='art'), "subject 'art'"),
       (problem(1, grade='college'), "grade 'college'"), (problem(1, grade='grade13'), "grade 'grade13'"),
       (problem(1, question=None), 'question is not a text'), (problem(1, hint=4), 'hint, lecture'),
       (problem(1, question='<image>?'), '1 <image> placeholders for 0 frames')]


def test_bad_problems_are_left_out_and_told(tmp_path, capsys):
    problems = {str(number): problem(number) for number in range(20)}
    problems |= {f'bad{number}': each for number, (each, _) in enumerate(BAD)}
    problems['cut'] = problems['lost'] = problem(1, image='image.png')
    source = make(tmp_path / 'science', problems, {'train': [*problems, 'nowhere']})
    cut = source / 'images/train/cut/image.png'
    cut.write_bytes(cut.read_bytes()[:-20])
    (source / 'images/train/lost/image.png').unlink()
    arguments = (source, '--to', tmp_path / 'out')
    assert run(*arguments) == 2 and '14 of 34 rows are bad' in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()
    assert run(*arguments, '--max-bad', '0.5') == 0
    dropped = json.loads((tmp_path / 'out/manifest.json').read_text())['dropped']
    assert len(dropped) == 14 and len(rows_of(tmp_path / 'out/train.jsonl')) == 20
    reasons = [(f'bad{number}', reason) for number, (_, reason) in enumerate(BAD)]
    for name, reason in (*reasons, ('cut', 'cannot be read'), ('lost', 'does not exist'), ('nowhere', 'no such problem')):
        assert any(f'problem {name}: ' in sentence and reason in sentence for sentence in dropped), (name, reason)


def test_missing_and_broken_files_are_one_sentence(tmp_path, capsys):
    def fails(*arguments):
        assert run(*arguments, '--to', tmp_path / 'out') == 2
        message = capsys.readouterr().err
        assert message.count('\n') == 1 and not (tmp_path / 'out').exists()
        return message

    (tmp_path / 'empty').mkdir()
    assert 'problems.json does not exist' in fails(tmp_path / 'empty')
    source = make(tmp_path / 'science', {'1': problem(1, split='dev')})
    assert 'no problem of' in fails(source)
    (source / 'pid_splits.json').write_text('{"train": [1]}')
    assert 'is not an object {split: [id, ...]}' in fails(source)
    assert 'none.json cannot be read' in fails(source, '--captions', tmp_path / 'none.json')
    (tmp_path / 'list.json').write_text('{"captions": []}')
    assert 'correct --captions' in fails(source, '--captions', tmp_path / 'list.json')
    (source / 'problems.json').write_text('[')
    assert 'problems.json is not JSON' in fails(source)
