"""`vora prepare easy-vqa` on a small wheel made here."""

import argparse
import hashlib
import io
import json
import subprocess
import sys
import zipfile

import PIL.Image
import pytest

from vora_jax.cli import prepare
from vora_jax.data.prepare import easy_vqa
from vora_jax.data.prepare.easy_vqa import COLOURS, SHAPES, Question, facts, kind_of, text_samples
from vora_jax.data.prepare.prepared_folder import finish, new_folder
from vora_jax.data.text.tokenizer import load_tokenizer
from vora_jax.types import UserError


def png(value=0):
    file = io.BytesIO()
    PIL.Image.new('RGB', (64, 64), (value % 256, 90, 30)).save(file, 'PNG')
    return file.getvalue()


def questions_about(image):
    colour, shape = COLOURS[image % len(COLOURS)], SHAPES[image % len(SHAPES)]
    other = COLOURS[(image + 1) % len(COLOURS)]
    return [
        [f'what is the {colour} shape?', shape, image],
        [f'what color is the {shape}?', colour, image],
        ['what color is the shape?', colour, image],
        [f'is there a {colour} shape?', 'yes', image],
        [f'is there not a {other} shape?', 'yes', image],
        [f'does the image contain a {other} shape?', 'no', image],
    ]


def make_wheel(path, images=40, change=lambda split, rows, pictures: None):
    """A file laid out like the package: `images` pictures in training, a quarter of it in test."""
    with zipfile.ZipFile(path, 'w') as wheel:
        for split, count in (('train', images), ('test', images // 4)):
            rows = [row for image in range(count) for row in questions_about(image)]
            pictures = {f'{image}.png': png(image) for image in range(count)}
            change(split, rows, pictures)
            wheel.writestr(f'easy_vqa/data/{split}/questions.json', json.dumps(rows))
            for name, content in pictures.items():
                wheel.writestr(f'easy_vqa/data/{split}/images/{name}', content)
    return str(path)


def convert(wheel, to, max_bad=0.01):
    with new_folder(str(to)) as folder:
        content = easy_vqa.convert(wheel, folder, lambda items, desc: items)
        sha256 = hashlib.sha256(open(wheel, 'rb').read()).hexdigest()
        return finish(folder, {'source': {'name': easy_vqa.REQUIREMENT, 'sha256': sha256}, **content}, max_bad)


def read_rows(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def run(*arguments):
    parser = argparse.ArgumentParser()
    prepare.add_arguments(parser)
    return prepare.run(parser.parse_args([str(argument) for argument in arguments]))


def left_overs(folder):
    return [path.name for path in folder.iterdir() if 'partial' in path.name]


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    return make_wheel(tmp_path_factory.mktemp('wheel') / 'small.whl')


def test_easy_vqa_in_the_common_format(wheel, tmp_path):
    manifest = convert(wheel, tmp_path / 'out')
    counts = manifest['counts']
    assert counts['train.colour'] == 80 and counts['train.shape'] == 40 and counts['train.yes_no'] == 120
    assert counts['test'] == 60 and manifest['rows'] == 300 and not manifest['dropped']
    assert json.loads((tmp_path / 'out/manifest.json').read_text()) == manifest
    row = read_rows(tmp_path / 'out/train.shape.jsonl')[1]
    assert row == {
        'id': 'train-6',
        'frames': ['images/train/1.png'],
        'kind': 'shape',
        'conversations': [
            {'from': 'human', 'value': '<image>\nwhat is the blue shape?'},
            {'from': 'gpt', 'value': 'rectangle'},
        ],
    }
    assert (tmp_path / 'out' / row['frames'][0]).read_bytes() == png(1)
    assert {record['kind'] for record in read_rows(tmp_path / 'out/test.jsonl')} == {
        'colour',
        'shape',
        'yes_no',
    }
    digest = hashlib.sha256((tmp_path / 'out/test.jsonl').read_bytes()).hexdigest()
    assert manifest['files']['test.jsonl'] == digest and len(manifest['files']) == 7
    tokenizer = load_tokenizer(str(tmp_path / 'out/tokenizer'))
    assert tokenizer.vocab_size == manifest['vocab_size']
    text = '<|im_start|>user\n<image>\nwhat color is the circle?<|im_end|>\n<|im_start|>assistant\nteal'
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert not left_overs(tmp_path)


def test_two_conversions_are_equal(wheel, tmp_path):
    assert convert(wheel, tmp_path / 'a') == convert(wheel, tmp_path / 'b')


def test_text_samples_describe_training_pictures_only(wheel, tmp_path):
    convert(wheel, tmp_path / 'out')
    records = read_rows(tmp_path / 'out/text.jsonl')
    kinds = [record['kind'] for record in records]
    assert len(records) == 40 * 6 and kinds.count('yes_no') <= len(kinds) / 2
    descriptions = set()
    for record in records:
        assert 'frames' not in record
        value, answer = (turn['value'] for turn in record['conversations'])
        description, question = value.split('\n')
        words = set(description.lower().replace('.', ' ').replace(',', ' ').split())
        named = words & set(COLOURS) | words & set(SHAPES)
        assert len(named) == 2 and (record['kind'] == 'yes_no' or answer in named)
        descriptions.add(description)
    assert len(descriptions) > 40
    train = [
        Question('train', number, *row, kind_of(row[1])) for number, row in enumerate(questions_about(3) * 30)
    ]
    assert text_samples(train, 100) == text_samples(train, 100)
    assert len(text_samples(train, 100)) == 100


def test_facts():
    def about(*pairs):
        return facts(Question('train', 0, question, answer, 0, kind_of(answer)) for question, answer in pairs)

    assert about(('what color is the circle?', 'red')) == ('red', 'circle')
    assert about(('what is the teal shape?', 'triangle')) == ('teal', 'triangle')
    assert about(('is there a blue shape?', 'yes'), ('is there not a circle?', 'no')) == ('blue', 'circle')
    assert about(('is no blue shape present?', 'no')) == ('blue', None)
    assert about(('is there a blue shape?', 'no'), ('is there not a red shape?', 'yes')) == (None, None)
    assert about(('is a circle present?', 'no'), ('is no triangle present?', 'yes')) == (None, 'rectangle')
    assert about(('is a circle present?', 'yes'), ('is a triangle present?', 'yes')) == (None, None)


def damage(split, rows, pictures):
    if split == 'train':
        pictures['5.png'] = pictures['5.png'][:-20]
        del pictures['7.png']
        rows[0] = ['what?', 'purple', 0]
        rows[1] = ['what?', 'red']


def test_bad_rows_are_dropped_counted_and_limited(tmp_path):
    wheel = make_wheel(tmp_path / 'bad.whl', change=damage)
    with pytest.raises(
        UserError, match=r'14 of 300 rows are bad, more than --max-bad 0.01 allows; .*train/questions.json'
    ):
        convert(wheel, tmp_path / 'out')
    assert not (tmp_path / 'out').exists() and not left_overs(tmp_path)
    manifest = convert(wheel, tmp_path / 'out', max_bad=0.05)
    text = '\n'.join(manifest['dropped'])
    assert (
        len(manifest['dropped']) == 14
        and text.count('5.png cannot be read') == text.count('7.png is missing') == 6
    )
    assert "unknown answer 'purple'" in text and 'not [question, answer, image number]' in text
    assert not (tmp_path / 'out/images/train/5.png').exists()
    assert sum(manifest['counts'][f'train.{kind}'] for kind in easy_vqa.KINDS) == 240 - 14


def test_the_command_checks_the_wheel(wheel, tmp_path):
    with pytest.raises(UserError, match='is not easy-vqa==1.0: its sha256 is'):
        run('easy-vqa', '--to', tmp_path / 'out', '--wheel', wheel)
    with pytest.raises(UserError, match='no.whl cannot be read'):
        run('easy-vqa', '--to', tmp_path / 'out', '--wheel', tmp_path / 'no.whl')
    (tmp_path / 'text.whl').write_text('no zip')
    with pytest.raises(UserError, match='is not a wheel'):
        convert(str(tmp_path / 'text.whl'), tmp_path / 'out')
    assert not (tmp_path / 'out').exists() and not left_overs(tmp_path)


def test_a_finished_folder_is_kept_and_a_foreign_one_is_refused(wheel, tmp_path, monkeypatch, capsys):
    sha256 = hashlib.sha256(open(wheel, 'rb').read()).hexdigest()
    convert(wheel, tmp_path / 'out')
    monkeypatch.setattr(easy_vqa, 'SHA256', sha256)
    assert run('easy-vqa', '--to', tmp_path / 'out') == 0 and 'already prepared' in capsys.readouterr().out
    assert run('easy-vqa', '--to', tmp_path / 'out', '--json') == 0
    assert json.loads(capsys.readouterr().out)['source']['sha256'] == sha256
    monkeypatch.setattr(easy_vqa, 'SHA256', 'other')
    with pytest.raises(UserError, match='another source'):
        run('easy-vqa', '--to', tmp_path / 'out')
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine/notes.txt').write_text('keep')
    with pytest.raises(UserError, match='exists but is not'):
        run('easy-vqa', '--to', tmp_path / 'mine')
    assert (tmp_path / 'mine/notes.txt').read_text() == 'keep'


def test_prepare_needs_no_jax():
    program = 'import sys, vora_jax.cli.prepare; sys.exit("jax" in sys.modules or "grain" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', program], check=False).returncode == 0
