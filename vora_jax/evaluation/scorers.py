"""What makes an answer right."""
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from vora_jax.data.prepare.science_qa import LETTERS
from vora_jax.evaluation.questions import Question
from vora_jax.types import UserError

ANSWER = re.compile(r'The answer is ([A-Z])\.')


class Mark(NamedTuple):
    """The verdict on an answer. readable: False where it did not have the form that its scorer reads."""

    correct: bool
    readable: bool = True


class Scorer(NamedTuple):
    """How answers are marked.

    mark: (what the model said, the question, the seed of guesses or None) -> its mark.
    check: raises UserError where a question cannot be marked.
    """

    mark: Callable[[str, Question, int | None], Mark]
    check: Callable[[Question], None] = lambda question: None


def matches(prediction: str, expected: str) -> bool:
    """Exact match after lower-casing and stripping."""
    return prediction.strip().lower() == expected.strip().lower()


def exact(prediction: str, question: Question, guess: int | None = None) -> Mark:
    """Right if the answer `matches` the expected one."""
    return Mark(matches(prediction, question.answer))


def chosen_letter(prediction: str, num_choices: int) -> str | None:
    """The letter in the first `The answer is X.`; None if there is none, or it belongs to no choice."""
    match = ANSWER.search(prediction)
    return match[1] if match and match[1] in LETTERS[:num_choices] else None


def choice(prediction: str, question: Question, guess: int | None = None) -> Mark:
    """Right if the chosen letter is that of the question, ScienceQA's rule.

    An answer without a letter is wrong; with a seed `guess` it counts as a choice at random, as in the released code of
    the methods that are compared on ScienceQA. (That code takes any character for the final dot.) A guess is the
    question's own: what was said to others does not change it.
    """
    letter = chosen_letter(prediction, question.num_choices)
    told = letter
    if letter is None and guess is not None:
        told = LETTERS[np.random.default_rng([guess, *question.id.encode()]).integers(question.num_choices)]
    return Mark(told == question.choice, letter is not None)


def _has_choices(question: Question) -> None:
    if question.choice not in tuple(LETTERS[:question.num_choices]):
        raise UserError(f"{question.where}: Eval.scorer 'choice' needs `num_choices` and the right `choice` of each row; "
                        "make the rows with `vora prepare science-qa`, or leave Eval.scorer at 'exact'.")


SCORERS = {'exact': Scorer(exact), 'choice': Scorer(choice, _has_choices)}
