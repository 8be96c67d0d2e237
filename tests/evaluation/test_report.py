"""The picture grid: honest choice, drawn colours."""
import collections

import numpy as np
import PIL.Image
import pytest

from vora_jax.evaluation.questions import Question
from vora_jax.evaluation.report import RIGHT, WRONG, choose_examples, draw_grid
from vora_jax.evaluation.tasks import Prediction


@pytest.fixture
def predictions(tmp_path):
    PIL.Image.new('RGB', (64, 48), 'blue').save(tmp_path / 'a.png')

    def predict(number, kind, correct):
        question = Question(f'{kind}{number}', kind, '<image>\nwhat color is it?', None, 'blue',
                            (str(tmp_path / 'a.png'),), '')
        return Prediction(question, 'blue' if correct else 'a long wrong answer ' * 5, correct)
    return [predict(n, kind, n % 10 > 2) for kind in ('colour', 'shape', 'yes_no') for n in range(100)]


def test_the_choice_is_seeded_and_balanced_and_blind_to_the_outcome(predictions):
    chosen = choose_examples(predictions, 90, seed=0)
    assert chosen == choose_examples(predictions, 90, seed=0) != choose_examples(predictions, 90, seed=1)
    assert len({p.question.id for p in chosen}) == 90
    assert collections.Counter(p.question.kind for p in chosen) == {'colour': 30, 'shape': 30, 'yes_no': 30}
    assert 0.15 < sum(not p.correct for p in chosen) / 90 < 0.45  # 0.3 in all of them
    flipped = [p._replace(correct=not p.correct) for p in predictions]
    assert [p.question for p in choose_examples(flipped, 90, seed=0)] == [p.question for p in chosen]


def test_questions_without_pictures_are_left_out(predictions):
    text = [p._replace(question=p.question._replace(images=())) for p in predictions]
    assert choose_examples(text, 5, seed=0) == []
    assert len(choose_examples(predictions[:2] + text, 5, seed=0)) == 2


def test_right_ones_are_green_and_wrong_ones_red(predictions):
    right = next(p for p in predictions if p.correct)
    wrong = next(p for p in predictions if not p.correct)
    grid = np.asarray(draw_grid([right, wrong]))
    left, second = np.split(grid, 2, axis=1)

    def has(cell, colour):
        return (cell == colour).all(-1).any()

    assert has(left, RIGHT) and not has(left, WRONG)
    assert has(second, WRONG) and not has(second, RIGHT)
    assert has(left, (0, 0, 255)) and (grid[:, -10:] == 255).all()  # the picture; no text beyond the cell
    assert np.asarray(draw_grid([right] * 9)).shape[1] == 2 * grid.shape[1]
