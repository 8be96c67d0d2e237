"""Marks: exact match, and the letter of a choice."""
import json

import pytest

from vora_jax.evaluation import tasks
from vora_jax.evaluation.config import Eval
from vora_jax.evaluation.questions import Question, read_questions
from vora_jax.evaluation.scorers import SCORERS, Mark, choice, chosen_letter, exact, matches
from vora_jax.types import UserError


def question(name='0', right='B', num_choices=3, groups=(), answer='The answer is B.'):
    return Question(name, 'NAT', 'q', None, answer, (), 'test.jsonl row 1', groups, right, num_choices)


def test_answers_match_after_lower_casing_and_stripping():
    assert matches(' Blue\n', 'blue') and matches('blue', ' BLUE')
    assert not matches('blue.', 'blue') and not matches('light blue', 'blue')
    assert exact(' the answer is b.', question()) == Mark(True) and exact('B', question()) == Mark(False)


@pytest.mark.parametrize('text, letter', [
    ('The answer is B.', 'B'), ('Lecture. So. The answer is C.', 'C'), ('The answer is A. BECAUSE: The answer is B.', 'A'),
    ('The answer is D.', None), ('The answer is Z.', None), ('The answer is B', None), ('the answer is B.', None),
    ('The answer is b.', None), ('B', None), ('', None), ('The answer is Blue.', None),
    ('The answer is D. The answer is A.', None)])
def test_the_first_letter_is_read(text, letter):
    """A first letter outside the choices is not replaced by a later one."""
    assert chosen_letter(text, 3) == letter
    assert choice(text, question(right='B')) == Mark(letter == 'B', letter is not None)
    assert choice(text, question(right='C')) == Mark(letter == 'C', letter is not None)


def test_guesses_are_seeded_and_each_questions_own():
    asked = [question(str(number), num_choices=4) for number in range(2000)]
    marks = [choice('?', each, 7) for each in asked]
    assert not any(mark.readable for mark in marks)
    assert 0.22 < sum(mark.correct for mark in marks) / 2000 < 0.28
    assert marks == [choice('?', each, 7) for each in asked] != [choice('?', each, 8) for each in asked]
    assert not any(choice('?', each).correct for each in asked)
    assert all(choice('The answer is B.', each, 7) == Mark(True) for each in asked)


def test_a_row_without_choices_is_told():
    for wrong in (question(right=''), question(right='D'), question(num_choices=0)):
        with pytest.raises(UserError, match="test.jsonl row 1: Eval.scorer 'choice' needs `num_choices`"):
            SCORERS['choice'].check(wrong)
    SCORERS['choice'].check(question())
    SCORERS['exact'].check(question(right='', num_choices=0))


def test_the_configuration_is_checked():
    with pytest.raises(UserError, match="Eval.scorer 'letter' is unknown; choose one of exact, choice"):
        Eval('f', scorer='letter')
    with pytest.raises(UserError, match="needs Eval.scorer = 'choice'"):
        Eval('f', guess_unreadable=True)
    assert all(Eval('f', scorer=name).scorer == name for name in SCORERS)


# id, groups, right letter, what the model says
ANSWERS = [('1', ['NAT', 'TXT', 'IMG', 'G1-6'], 'A', 'The answer is A. BECAUSE: ...'),
           ('2', ['NAT', 'TXT', 'G7-12'], 'B', 'The answer is C.'),
           ('3', ['SOC', 'IMG', 'G1-6'], 'C', 'The answer is C.'),
           ('4', ['LAN', 'NO', 'G7-12'], 'A', 'I do not know.'),
           ('5', ['LAN', 'NO', 'G7-12'], 'A', 'The answer is E.')]


def test_scores_by_subject_context_and_grade(tmp_path, monkeypatch):
    """Overlapping groups: a question with a hint and a picture counts in both."""
    rows = [{'id': name, 'kind': groups[0], 'groups': groups, 'choice': right, 'num_choices': 4,
             'conversations': [{'from': 'human', 'value': 'q'}, {'from': 'gpt', 'value': f'The answer is {right}.'}]}
            for name, groups, right, _ in ANSWERS]
    file = tmp_path / 'test.jsonl'
    file.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    monkeypatch.setattr(tasks, 'load_tokenizer', lambda folder: None)
    monkeypatch.setattr(tasks, 'PromptRows', lambda *arguments: None)
    monkeypatch.setattr(tasks, 'answer', lambda *arguments, **_: [said for *_, said in ANSWERS])

    class Data:
        tokenizer = ''

    results, predictions = tasks.evaluate(None, {}, Data, None, Eval(str(file), scorer='choice'))
    assert results['by_kind'] == {'G1-6': 1, 'G7-12': 0, 'IMG': 1, 'LAN': 0, 'NAT': 0.5, 'NO': 0, 'SOC': 1, 'TXT': 0.5}
    assert results['num_by_kind'] == {'G1-6': 2, 'G7-12': 3, 'IMG': 2, 'LAN': 2, 'NAT': 2, 'NO': 2, 'SOC': 1, 'TXT': 2}
    assert (results['accuracy'], results['num_questions'], results['num_unreadable']) == (0.4, 5, 2)
    told = [prediction.row() for prediction in predictions]
    assert [row.get('readable', True) for row in told] == [True, True, True, False, False]
    assert told[0]['groups'] == ANSWERS[0][1] and told[0]['correct']
    guessed = [tasks.evaluate(None, {}, Data, None, Eval(str(file), scorer='choice', guess_unreadable=True, seed=seed))[0]
               for seed in range(40)]
    assert all(each['num_unreadable'] == 2 for each in guessed)
    assert {each['accuracy'] for each in guessed} == {0.4, 0.6, 0.8}


@pytest.mark.parametrize('row, message', [({'groups': 'NAT'}, 'groups is not a list of texts'),
                                          ({'choice': 1}, 'choice is not a letter'), ({'num_choices': '4'}, 'num_choices')])
def test_malformed_rows_are_told(tmp_path, row, message):
    turns = [{'from': 'human', 'value': 'q'}, {'from': 'gpt', 'value': 'a'}]
    (tmp_path / 'test.jsonl').write_text(json.dumps({**row, 'conversations': turns}) + '\n')
    with pytest.raises(UserError, match=f'row 1: .*{message}'):
        read_questions(Eval(str(tmp_path / 'test.jsonl')))
