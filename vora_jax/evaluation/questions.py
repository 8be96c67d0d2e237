"""Test questions: reading, choosing, shuffling their pictures."""
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from vora_jax.data.frame import Frame, frame_name
from vora_jax.data.sources.files import locate
from vora_jax.data.sources.open_rows import open_rows
from vora_jax.data.sources.remote import folder_of
from vora_jax.data.text.records import check_record
from vora_jax.evaluation.config import Eval
from vora_jax.types import UserError

NO_KIND = 'other'


class Question(NamedTuple):
    """One question of a test file.

    id: the record's id, or its row number.    kind: what its score is grouped by.
    question: text with its `<image>` placeholders.    system: system message of the record, or None.
    answer: the expected answer.    images: picture files, or frames of rows.    where: file and row, for messages.
    groups: what its score counts in instead of `kind`; () for that alone.
    choice, num_choices: letter of the right choice and how many there are; '' and 0 where it has none.
    """

    id: str
    kind: str
    question: str
    system: str | None
    answer: str
    images: tuple[str | Frame, ...]
    where: str
    groups: tuple[str, ...] = ()
    choice: str = ''
    num_choices: int = 0


def read_questions(config: Eval) -> list[Question]:
    """The questions that `config` asks for, in the order of the file.

    Raises:
        UserError: the file is missing or empty, a row is malformed or has several questions, or
            `max_per_kind` names a kind that the file does not have.
    """
    rows = open_rows(config.data)
    root = config.image_root or folder_of(config.data)
    questions = []
    for number in range(len(rows)):
        record, where = rows[number], rows.where(number)
        system, exchanges, frames = check_record(record, where)
        if len(exchanges) != 1:
            raise UserError(f'{where}: the record has {len(exchanges)} questions; an evaluation reads one a '
                            'row, split it.')
        question, answer = exchanges[0]
        images = tuple(locate(frame, root) for frame in frames)
        name, kind = str(record.get('id', number)), str(record.get('kind', NO_KIND))
        questions.append(Question(name, kind, question, system, answer, images, where, *_marking(record, where)))
    return choose(questions, config)


def _marking(record: dict[str, Any], where: str) -> tuple[tuple[str, ...], str, int]:
    """(groups, choice, num_choices) of a record; UserError if they are malformed."""
    groups, choice, num_choices = record.get('groups', []), record.get('choice', ''), record.get('num_choices', 0)
    if not isinstance(groups, list) or not all(isinstance(group, str) for group in groups):
        raise UserError(f'{where}: groups is not a list of texts.')
    if not isinstance(choice, str) or type(num_choices) is not int:
        raise UserError(f'{where}: choice is not a letter, or num_choices not a number.')
    return tuple(groups), choice, num_choices


def choose(questions: Sequence[Question], config: Eval) -> list[Question]:
    """At most `max_per_kind` questions of each kind, drawn from the seed, in their order.

    Raises:
        UserError: a kind that no question has, or nothing is left.
    """
    members: dict[str, list[int]] = {}
    for index, question in enumerate(questions):
        members.setdefault(question.kind, []).append(index)
    for kind, limit in config.max_per_kind:
        if kind not in members:
            raise UserError(f'Eval.max_per_kind: {config.data} has no questions of kind {kind!r}; its kinds '
                            f'are {", ".join(sorted(members))}.')
        if limit < len(members[kind]):
            # The generator is the kind's own: limiting one kind never changes the draw of another.
            rng = np.random.default_rng([config.seed, *kind.encode()])
            members[kind] = rng.choice(members[kind], limit, replace=False).tolist()
    kept = sorted(index for indices in members.values() for index in indices)
    if not kept:
        raise UserError(f'Eval.max_per_kind leaves no question of {config.data}; raise a limit.')
    return [questions[index] for index in kept]


def shuffle_images(questions: Sequence[Question], seed: int) -> list[Question]:
    """The same questions, each with pictures of others.

    A seeded permutation of all pictures that gives no question a file of its own.

    Raises:
        UserError: too many questions share a picture for that.
    """
    owners = [index for index, question in enumerate(questions) for _ in question.images]
    files = [image for question in questions for image in question.images]
    names = [frame_name(image) for image in files]
    own = [{frame_name(image) for image in questions[owner].images} for owner in owners]
    rng = np.random.default_rng(seed)
    places = rng.permutation(len(files))  # slot i shows files[places[i]]
    for slot in range(len(files)):
        if names[places[slot]] not in own[slot]:
            continue
        for other in rng.permutation(len(files)):
            if names[places[other]] not in own[slot] and names[places[slot]] not in own[other]:
                places[[slot, other]] = places[[other, slot]]
                break
        else:
            raise UserError('the blind run cannot give every question another picture, because too many '
                            'questions share one; evaluate more pictures or leave it out with --no-blind.')
    shown: list[list[str | Frame]] = [[] for _ in questions]
    for owner, place in zip(owners, places):
        shown[owner].append(files[place])
    return [question._replace(images=tuple(images)) for question, images in zip(questions, shown)]
