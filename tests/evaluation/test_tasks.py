"""Scores by generation: batches, blind runs, marks."""
import dataclasses
import json
import pathlib

import numpy as np
import pytest
import tiny_model
import tiny_pictures

from vora_jax.data.text.tokenizer import load_tokenizer
from vora_jax.evaluation.config import Eval
from vora_jax.evaluation.prompts import Prompt, PromptRows
from vora_jax.evaluation.questions import Question
from vora_jax.evaluation.tasks import Prediction, answer, decode_answers, evaluate, score


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """(model, random parameters, data, rule, Eval) on the tiny set."""
    folder = tiny_pictures.make(tmp_path_factory.mktemp('pictures'))
    config, _ = tiny_pictures.config(folder)
    rule = config.method.vision_tokens
    model = config.method.stage('finetune').model
    rows = PromptRows([Prompt('what?')], config.data, rule, load_tokenizer(config.data.tokenizer))
    # Large weights, so that answers depend on question and picture.
    params = tiny_model.random_params(model, next(rows.batches(1)), spread=2.0)
    return model, params, config.data, rule, Eval(str(folder / 'test.jsonl'), batch_rows=4, max_new_tokens=4)


def test_answers_do_not_depend_on_the_batch(run):
    model, params, data, rule, config = run
    results, predictions = evaluate(*run)
    tokenizer = load_tokenizer(data.tokenizer)
    prompts = [Prompt(p.question.question, p.question.images) for p in predictions]
    prompts += [Prompt(p.question.question, p.blind_images) for p in predictions]
    alone = answer(model, params, PromptRows(prompts, data, rule, tokenizer), tokenizer, batch_rows=1,
                   max_new_tokens=config.max_new_tokens)
    assert alone == [p.prediction for p in predictions] + [p.blind for p in predictions]
    assert len(set(alone)) > 2
    assert results['num_questions'] == 12 and results['num_by_kind'] == {'colour': 6, 'yes_no': 6}


def test_the_blind_run_shows_other_pictures_and_can_be_left_out(run):
    model, params, data, rule, config = run
    results, predictions = evaluate(*run)
    assert results['blind_by_kind'].keys() == {'colour', 'yes_no'}
    assert all(p.blind_images and p.blind_images != p.question.images for p in predictions)
    assert any(p.blind != p.prediction for p in predictions)
    results, predictions = evaluate(model, params, data, rule, dataclasses.replace(config, blind=False))
    assert not any(key.startswith('blind') for key in results)
    assert 'blind_prediction' not in predictions[0].row()


def test_a_right_answer_counts(run, tmp_path):
    """The model's own answers, written as the expected ones, score 1 where the picture is shown."""
    model, params, data, rule, config = run
    _, predictions = evaluate(*run)
    root = config.data.removesuffix('test.jsonl')
    lines = pathlib.Path(config.data).read_text().splitlines()
    said = [p.prediction.strip().upper() for p in predictions]
    file = tmp_path / 'said.jsonl'
    rows = []
    for line, text in zip(lines, said):
        row = json.loads(line)
        row['conversations'][1]['value'] = f' {text}\n'
        rows.append(json.dumps(row) + '\n')
    file.write_text(''.join(rows))
    config = dataclasses.replace(config, data=str(file), image_root=root)
    results, _ = evaluate(model, params, data, rule, config)
    assert results['accuracy'] == 1.0 and results['by_kind'] == {'colour': 1.0, 'yes_no': 1.0}
    assert results['blind_accuracy'] < 1.0


def test_scores_by_kind():
    def prediction(kind, correct, blind):
        return Prediction(Question('', kind, '', None, '', (), ''), '', correct, '', (), blind)

    results = score([prediction('a', True, False), prediction('a', False, False), prediction('b', True, True),
                     prediction('a', True, True)])
    assert results == {
        'accuracy': 0.75, 'by_kind': {'a': 2 / 3, 'b': 1.0}, 'blind_accuracy': 0.5,
        'blind_by_kind': {'a': 1 / 3, 'b': 1.0}, 'num_questions': 4, 'num_by_kind': {'a': 3, 'b': 1}, 'num_unreadable': 0}


def test_answers_end_at_the_end_mark(run):
    tokenizer = load_tokenizer(run[2].tokenizer)
    ids = tokenizer.encode('red')
    end = tokenizer.eos_id
    rows = [ids + [end, 0, 0], [end] + ids + [end, end], ids + [tokenizer.vocab_size + 5] * 3]
    assert decode_answers(np.array(rows), tokenizer, end) == ['red', '', 'red']
