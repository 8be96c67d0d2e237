"""Conversations to pieces of text and pictures.

The record format is VoRA's: JSON lines `{id, frames, conversations: [{from: human, value}, {from: gpt,
value}, ...]}` with an optional first `{from: system}` turn.
"""
import dataclasses
from typing import Any, NamedTuple, Sequence

from vora_jax.data.packing import Picture, Text
from vora_jax.data.tokenizer import IM_END, IM_START, IMAGE, Tokenizer
from vora_jax.types import UserError


class Image(NamedTuple):
    """The place of the record's picture number `index`, counted from 0."""

    index: int


Turn = list[Text | Image]


@dataclasses.dataclass(frozen=True)
class Template:
    """A chat template in the ChatML family. system: message where a record has none; '' is no message."""

    system: str = ''

    def question(self, text: str, first: bool, system: str | None = None) -> str:
        """The prompt text of one turn, up to and including the assistant marker."""
        lead = '\n'
        if first:
            message = self.system if system is None else system
            lead = f'{IM_START}system\n{message}{IM_END}\n' if message else ''
        return f'{lead}{IM_START}user\n{text}{IM_END}\n{IM_START}assistant\n'


TEMPLATES = {'chatml': Template(), 'chatml_system': Template('You are a helpful assistant.')}


def find_template(name: str) -> Template:
    """The template of this name; UserError naming the known ones otherwise."""
    if name not in TEMPLATES:
        raise UserError(f'Data.template {name!r} is unknown; choose one of {", ".join(TEMPLATES)}.')
    return TEMPLATES[name]


def check_record(record: Any, where: str) -> tuple[str | None, list[tuple[str, str]], list[str]]:
    """(system message or None, [(question, answer), ...], frames) of a well-formed record.

    Where frames exist but no question has `<image>`, one for each frame is put in front of the first
    question.

    Args:
        record: a parsed JSON line.
        where: file and row, for the message.
    Raises:
        UserError: one sentence that says what is wrong with which row.
    """
    def bad(problem: str) -> UserError:
        return UserError(f'{where}: {problem}.')

    if not isinstance(record, dict):
        raise bad('the row is not a JSON object; write {"id": ..., "frames": [...], "conversations": [...]}')
    turns = record.get('conversations')
    if not isinstance(turns, list) or not turns:
        raise bad('conversations is missing or empty; it needs a human and a gpt turn')
    for turn in turns:
        if not isinstance(turn, dict) or not isinstance(turn.get('value'), str):
            raise bad('a turn of conversations is not {"from": ..., "value": text}')
    system = None
    if turns[0].get('from') == 'system':
        system, turns = turns[0]['value'], turns[1:]
    roles = [turn.get('from') for turn in turns]
    if not turns or roles != ['human', 'gpt'] * (len(turns) // 2):
        raise bad(f'the roles of conversations are {roles}; they must be human, gpt, human, gpt, ...')
    frames = record.get('frames', [])
    if not isinstance(frames, list) or not all(isinstance(frame, str) and frame for frame in frames):
        raise bad('frames is not a list of file names')
    questions, answers = ([turn['value'] for turn in turns[start::2]] for start in (0, 1))
    if any(IMAGE in text for text in (*answers, system or '')):
        raise bad(f'{IMAGE} stands outside a human turn; move it into the question')
    placeholders = sum(question.count(IMAGE) for question in questions)
    if placeholders == 0:
        questions[0] = IMAGE * len(frames) + questions[0]
    elif placeholders != len(frames):
        raise bad(f'{placeholders} {IMAGE} placeholders for {len(frames)} frames; the counts must be equal')
    return system, list(zip(questions, answers)), frames


def render_turns(record: Any, tokenizer: Tokenizer, template: Template,
                 where: str = 'record') -> tuple[list[Turn], list[str]]:
    """(turns, frames): each turn is one question with its answer; only answers and their end marks are
    supervised.

    Raises:
        UserError: see `check_record`.
    """
    system, exchanges, frames = check_record(record, where)
    turns, images = [], 0
    for number, (question, answer) in enumerate(exchanges):
        turn = _split_images(template.question(question, number == 0, system), tokenizer, images)
        images += question.count(IMAGE)
        turn.append(Text(tokenizer.encode(answer) + [tokenizer.eos_id], supervised=True))
        turns.append(turn)
    return turns, frames


def render(record: Any, tokenizer: Tokenizer, template: Template, where: str = 'record') -> Turn:
    """The pieces of the whole record, see `render_turns`."""
    turns, _ = render_turns(record, tokenizer, template, where)
    return [piece for turn in turns for piece in turn]


def render_prompt(question: str, num_images: int, tokenizer: Tokenizer, template: Template,
                  system: str | None = None) -> Turn:
    """The pieces of one question, ending with the assistant marker, ready for generation.

    A question without `<image>` gets one line of it for each picture in front, as the training data is
    usually written.

    Raises:
        UserError: the placeholders do not match the number of pictures.
    """
    placeholders = question.count(IMAGE)
    if placeholders == 0:
        question = f'{IMAGE}\n' * num_images + question
    elif placeholders != num_images:
        raise UserError(f'the question has {placeholders} {IMAGE} placeholders for {num_images} images; '
                        'leave them out or write one for each image.')
    return _split_images(template.question(question, True, system), tokenizer, 0)


def place(pieces: Sequence[Text | Image], pictures: Sequence[Picture]) -> list[Text | Picture]:
    """The pieces as a segment for `packing.layout`: every `Image` is replaced by its picture."""
    return [pictures[piece.index] if isinstance(piece, Image) else piece for piece in pieces]


def _split_images(text: str, tokenizer: Tokenizer, first_image: int) -> Turn:
    """Unsupervised pieces of a prompt; `<image>` is cut out before the text is tokenised."""
    pieces: Turn = []
    for number, chunk in enumerate(text.split(IMAGE)):
        if number:
            pieces.append(Image(first_image + number - 1))
        if chunk:
            pieces.append(Text(tokenizer.encode(chunk)))
    return pieces
