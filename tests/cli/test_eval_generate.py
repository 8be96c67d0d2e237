"""The verbs eval and generate, on a real checkpoint."""
import json

import PIL.Image
import pytest
import tiny_model
import tiny_pictures

from vora_jax.cli.main import main
from vora_jax.data.fake import fake_batch
from vora_jax.training.checkpoints.checkpoint import write_checkpoint

SMALL = ('--gin.Eval.batch_rows=4', '--gin.Eval.max_new_tokens=3')  # one compiled program for all tests


def checkpoint(folder, text, name, batch):
    config, resolved = tiny_pictures.config(folder, text)
    params = tiny_model.random_params(config.method.stage(config.stage).model, batch, spread=2.0)
    write_checkpoint(folder / name, params, resolved, config.data.tokenizer, step=3)
    return str(folder / name)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return tiny_pictures.make(tmp_path_factory.mktemp('pictures'))


@pytest.fixture(scope='module')
def ckpt(folder):
    batch = fake_batch(1, 16, 8, 8, tiny_pictures.VOCAB_SIZE, 2, seed=0)
    return checkpoint(folder, tiny_pictures.CONFIG, 'run', batch)


@pytest.fixture(scope='module')
def text_ckpt(folder):
    batch = fake_batch(1, 16, 8, 8, tiny_pictures.VOCAB_SIZE, 2, seed=0, text_only=True)
    return checkpoint(folder, tiny_pictures.TEXT_CONFIG, 'text_run', batch)


@pytest.fixture
def vora(capsys):
    """Runs a verb; (exit code, stdout, stderr)."""
    def call(*arguments):
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()
    return call


def test_eval_prints_a_table_and_writes_what_is_asked(vora, folder, ckpt, tmp_path):
    code, out, _ = vora('eval', ckpt, '--data', folder / 'test.jsonl', *SMALL, '--max-per-kind', 'yes_no=4',
                        '--json', tmp_path / 'r.json', '--predictions', tmp_path / 'p.jsonl',
                        '--grid', tmp_path / 'g.png', '--grid-count', '5')
    assert code == 0
    rows = [line.split() for line in out.splitlines()]
    assert [' '.join(row[:2]) for row in rows] == ['kind questions', 'colour 6', 'yes_no 4', 'all 10']
    assert rows[0][-1] == 'blind'
    results = json.loads((tmp_path / 'r.json').read_text())
    assert results['num_questions'] == 10 and results['step'] == 3
    assert 0 < results['trainable_params'] < results['total_params']
    assert {'accuracy', 'by_kind', 'blind_accuracy', 'blind_by_kind', 'seconds'} <= results.keys()
    predictions = [json.loads(line) for line in (tmp_path / 'p.jsonl').read_text().splitlines()]
    assert len(predictions) == 10 and predictions[0]['answer'] == 'red'
    assert sum(p['correct'] for p in predictions) / 10 == results['accuracy']
    assert PIL.Image.open(tmp_path / 'g.png').width > 600


def test_eval_reads_its_configuration_from_a_file(vora, folder, ckpt, tmp_path):
    file = tmp_path / 'eval.gin'
    file.write_text(f"Eval.data = '{folder}/test.jsonl'\nEval.batch_rows = 4\nEval.max_new_tokens = 3\n"
                    'Eval.blind = False\n')
    code, out, _ = vora('eval', ckpt, file)
    assert code == 0 and 'blind' not in out


def test_generate_prints_the_answer_that_eval_counts(vora, folder, ckpt, tmp_path):
    vora('eval', ckpt, '--data', folder / 'test.jsonl', *SMALL, '--no-blind',
         '--predictions', tmp_path / 'p.jsonl')
    row = json.loads((tmp_path / 'p.jsonl').read_text().splitlines()[2])
    arguments = ('generate', ckpt, '--image', folder / 'images/1.png', 'what color?', '--max-new-tokens', '3')
    code, out, _ = vora(*arguments)
    assert code == 0 and out == row['prediction'] + '\n'
    _, out, _ = vora(*arguments, '--json')
    assert json.loads(out) == {'question': 'what color?', 'images': [str(folder / 'images/1.png')],
                               'answer': row['prediction'], 'step': 3}


def test_generate_asks_a_text_only_model(vora, text_ckpt):
    code, out, _ = vora('generate', text_ckpt, 'is it red?', '--max-new-tokens', '2')
    assert code == 0 and out.endswith('\n')


def test_mistakes_are_one_sentence(vora, folder, ckpt, text_ckpt, tmp_path):
    picture, broken, test = folder / 'images/0.png', tmp_path / 'broken.png', folder / 'test.jsonl'
    broken.write_bytes(picture.read_bytes()[:-20])
    table = [
        (('generate', ckpt, '--image', 'gone.png', 'what?'), 'image gone.png does not exist'),
        (('generate', ckpt, '--image', broken, 'what?'), 'broken.png cannot be read'),
        (('generate', ckpt, '--image', folder / 'test.jsonl', 'what?'), 'no known image format'),
        (('generate', ckpt, '--image', picture, '<image><image>?'), '2 <image> placeholders for 1 images'),
        (('generate', ckpt, '<image> what?'), '1 <image> placeholders for 0 images'),
        (('generate', text_ckpt, '--image', picture, 'what?'), 'is a text-only language model'),
        (('generate', folder / 'images', 'what?'), 'is no checkpoint'),
        (('generate', folder / 'nothing', 'what?'), 'does not exist'),
        (('generate', ckpt, 'what?', '--max-new-tokens', '0'), '--max-new-tokens is 0'),
        (('eval', ckpt), 'give --data FILE'),
        (('eval', ckpt, '--data', 'gone.jsonl'), 'gone.jsonl does not exist'),
        (('eval', text_ckpt, '--data', test), 'test.jsonl row 1: this checkpoint is a text-only'),
        (('eval', ckpt, '--data', test, '--max-per-kind', 'shape=2'), "no questions of kind 'shape'"),
        (('eval', ckpt, '--data', test, '--gin.Eval.batch_row=2'), 'Eval.batch_row'),
    ]
    for arguments, message in table:
        code, out, err = vora(*arguments)
        assert code == 2 and not out, arguments
        assert message in err and err.startswith('vora: ') and err.count('\n') == 1, err
