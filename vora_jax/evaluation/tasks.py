"""Scores by free greedy generation."""
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vora_jax.data.config import Data
from vora_jax.data.frame import Frame, frame_name
from vora_jax.data.text.tokenizer import Tokenizer, load_tokenizer
from vora_jax.evaluation.config import Eval
from vora_jax.evaluation.prompts import Prompt, PromptRows
from vora_jax.evaluation.questions import Question, read_questions, shuffle_images
from vora_jax.evaluation.scorers import SCORERS
from vora_jax.llm.generate import greedy
from vora_jax.method import VisionTokenRule
from vora_jax.model import VisionLanguageModel
from vora_jax.types import Params

Progress = Callable[..., Iterable]


class Prediction(NamedTuple):
    """What the model said to a question.

    blind, blind_images, blind_correct: the same with other pictures; None and () where that was not asked.
    readable: whether the scorer found what it reads.
    """

    question: Question
    prediction: str
    correct: bool
    blind: str | None = None
    blind_images: tuple[str | Frame, ...] = ()
    blind_correct: bool | None = None
    readable: bool = True

    def row(self) -> dict[str, Any]:
        """The prediction as a JSON object."""
        asked = self.question
        row = {'id': asked.id, 'kind': asked.kind, 'images': [frame_name(image) for image in asked.images],
               'question': asked.question, 'answer': asked.answer, 'prediction': self.prediction, 'correct': self.correct}
        if asked.groups:
            row['groups'] = list(asked.groups)
        if not self.readable:
            row['readable'] = False
        if self.blind is not None:
            row |= {'blind_images': [frame_name(image) for image in self.blind_images], 'blind_prediction': self.blind,
                    'blind_correct': self.blind_correct}
        return row


def evaluate(model: VisionLanguageModel, params: Params, data: Data, rule: VisionTokenRule | None,
             config: Eval, progress: Progress = lambda steps, **_: steps,
             ) -> tuple[dict[str, Any], list[Prediction]]:
    """(results, predictions) of a model on the questions of `config`; a pure function of its arguments.

    Args:
        model, params: of the stage, full parameters.
        data: gives tokenizer, template and image policy.
        rule: the method's; None for a text-only model.
        config: what to measure. The blind run is left out where no question has a picture.
        progress: wraps an iterable to show progress; takes `total`, `desc` and `unit`.
    Returns:
        results: accuracy, by_kind {kind or group: accuracy}, blind_accuracy and blind_by_kind after a blind run,
            num_questions, num_by_kind, num_unreadable, seconds, questions_per_second. Accuracies are from 0 to 1.
    Raises:
        UserError: see `read_questions`, `shuffle_images`, `PromptRows`.
    """
    started = time.perf_counter()
    questions, scorer = read_questions(config), SCORERS[config.scorer]
    for question in questions:
        scorer.check(question)
    asked = list(questions)
    if config.blind and any(question.images for question in questions):
        asked += shuffle_images(questions, config.seed)
    tokenizer = load_tokenizer(data.tokenizer)
    prompts = [Prompt(each.question, each.images, each.system, each.where) for each in asked]
    rows = PromptRows(prompts, data, rule, tokenizer)
    texts = answer(model, params, rows, tokenizer, batch_rows=config.batch_rows,
                   max_new_tokens=config.max_new_tokens, progress=progress)
    guess = config.seed if config.guess_unreadable else None
    marks = [scorer.mark(text, questions[index % len(questions)], guess) for index, text in enumerate(texts)]
    predictions = []
    for index, (question, (correct, readable)) in enumerate(zip(questions, marks)):
        prediction = Prediction(question, texts[index], correct, readable=readable)
        if len(asked) > len(questions):
            other = len(questions) + index
            prediction = prediction._replace(blind=texts[other], blind_images=asked[other].images,
                                             blind_correct=marks[other].correct)
        predictions.append(prediction)
    seconds = time.perf_counter() - started
    speed = {'seconds': seconds, 'questions_per_second': len(asked) / seconds}
    return score(predictions) | speed, predictions


def answer(model: VisionLanguageModel, params: Params, rows: PromptRows, tokenizer: Tokenizer, *,
           batch_rows: int, max_new_tokens: int, progress: Progress = lambda steps, **_: steps) -> list[str]:
    """The model's greedy answer to each prompt, without its end mark."""
    params = jax.tree.map(jnp.asarray, params)  # to the device once, not with every batch
    batch_rows = min(batch_rows, len(rows))
    total = -(-len(rows) // batch_rows)
    texts: list[str] = []
    waiting = None
    for batch in progress(rows.batches(batch_rows), total=total, desc='answers', unit='batch'):
        dispatched = greedy(model, params, batch, max_new_tokens=max_new_tokens, eos_id=rows.end_id)
        if waiting is not None:  # the next batch is laid out while the device works on this one
            texts += decode_answers(np.asarray(waiting), tokenizer, rows.end_id)
        waiting = dispatched
    texts += decode_answers(np.asarray(waiting), tokenizer, rows.end_id)
    return texts[:len(rows)]


def decode_answers(ids: np.ndarray, tokenizer: Tokenizer, end_id: int) -> list[str]:
    """The text of each row of `ids: i32[B, T]` before its `end_id`; ids that no token has are dropped."""
    texts = []
    for row in ids.tolist():
        row = row[:row.index(end_id)] if end_id in row else row
        texts.append(tokenizer.decode([token for token in row if token < tokenizer.vocab_size]))
    return texts


def score(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Accuracies over all predictions and by kind or group, see `evaluate`."""
    groups: dict[str, list[Prediction]] = {}
    for prediction in predictions:
        for kind in prediction.question.groups or (prediction.question.kind,):
            groups.setdefault(kind, []).append(prediction)
    groups = dict(sorted(groups.items()))

    def accuracies(field, prefix=''):
        def share(group):
            return sum(getattr(prediction, field) for prediction in group) / len(group)
        return {f'{prefix}accuracy': share(predictions),
                f'{prefix}by_kind': {kind: share(group) for kind, group in groups.items()}}

    results = accuracies('correct')
    if predictions[0].blind is not None:
        results |= accuracies('blind_correct', 'blind_')
    return results | {'num_questions': len(predictions),
                      'num_by_kind': {kind: len(group) for kind, group in groups.items()},
                      'num_unreadable': sum(not prediction.readable for prediction in predictions)}
