"""Reading, choosing and shuffling test questions."""
import collections
import json

import pytest

from vora_jax.evaluation.config import Eval
from vora_jax.evaluation.questions import Question, choose, read_questions, shuffle_images
from vora_jax.types import UserError


def write(file, *records):
    file.write_text(''.join(json.dumps(record) + '\n' for record in records))
    return str(file)


def record(question='what?', answer='blue', **more):
    turns = [{'from': 'human', 'value': question}, {'from': 'gpt', 'value': answer}]
    return {'conversations': turns, **more}


def questions(*images, kind='colour'):
    return [Question(str(number), kind, 'q', None, 'a', tuple(files), f'row {number}')
            for number, files in enumerate(images)]


def test_questions_carry_the_record(tmp_path):
    full = record('<image>\nwhat?', frames=['a.png'], kind='shape', id='x')
    file = write(tmp_path / 'test.jsonl', full, record())
    first, second = read_questions(Eval(file))
    assert first[:6] == ('x', 'shape', '<image>\nwhat?', None, 'blue', (str(tmp_path / 'a.png'),))
    assert (first.groups, first.choice, first.num_choices) == ((), '', 0)
    assert first.where == f'{file} row 1'
    assert second[:6] == ('1', 'other', 'what?', None, 'blue', ())
    assert read_questions(Eval(file, image_root='/pictures'))[0].images == ('/pictures/a.png',)


def test_a_record_with_two_questions_is_refused(tmp_path):
    two = record()
    two['conversations'] = two['conversations'] * 2
    with pytest.raises(UserError, match='test.jsonl row 1: the record has 2 questions'):
        read_questions(Eval(write(tmp_path / 'test.jsonl', two)))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match='nothing.jsonl does not exist'):
        read_questions(Eval(str(tmp_path / 'nothing.jsonl')))


def test_limits_choose_by_kind_from_the_seed():
    asked = [q._replace(id=f'{kind}{q.id}') for kind in ('colour', 'yes_no')
             for q in questions(*[()] * 40, kind=kind)]

    def chosen(seed, *limits):
        return [q.id for q in choose(asked, Eval('f', seed=seed, max_per_kind=limits))]

    some = chosen(0, ('yes_no', 10))
    assert len(some) == 50 and some == chosen(0, ('yes_no', 10)) and some != chosen(1, ('yes_no', 10))
    assert [name for name in some if name.startswith('colour')] == [f'colour{i}' for i in range(40)]
    assert sorted(some, key=[q.id for q in asked].index) == some
    assert [n for n in chosen(0, ('yes_no', 10), ('colour', 3)) if n.startswith('yes')] == some[40:]
    assert len(chosen(0, ('yes_no', 99))) == 80


def test_limits_are_checked():
    with pytest.raises(UserError, match="no questions of kind 'shapes'; its kinds are colour"):
        choose(questions(()), Eval('f', max_per_kind=(('shapes', 1),)))
    with pytest.raises(UserError, match='leaves no question'):
        choose(questions(()), Eval('f', max_per_kind=(('colour', 0),)))
    with pytest.raises(UserError, match='Eval.batch_rows is 0'):
        Eval('f', batch_rows=0)


@pytest.mark.parametrize('seed', range(20))
def test_every_question_gets_another_picture(seed):
    # Half of all questions share one picture: the most that leaves a solution.
    asked = questions(*[('a',)] * 10, *[(name,) for name in 'bcdef'], *[('g',)] * 3, ('h', 'i'))
    shuffled = shuffle_images(asked, seed)
    for before, after in zip(asked, shuffled):
        assert len(before.images) == len(after.images)
        assert not set(before.images) & set(after.images)
        assert before._replace(images=()) == after._replace(images=())
    assert _counts(asked) == _counts(shuffled)
    assert shuffled == shuffle_images(asked, seed) != shuffle_images(asked, seed + 100)


def test_a_shuffle_without_a_solution_is_told():
    with pytest.raises(UserError, match='--no-blind'):
        shuffle_images(questions(('a',), ('a',), ('b',)), 0)


def test_questions_without_pictures_stay_as_they_are():
    assert shuffle_images(questions((), ()), 0) == questions((), ())


def _counts(asked):
    return collections.Counter(image for question in asked for image in question.images)
