"""Conversations to pieces of text and pictures; `records` tells what a row may hold."""
import bisect
import itertools
import re
from typing import Any, NamedTuple, Sequence

from vora_jax.data.packing import Picture, Text
from vora_jax.data.text.record_frames import Named
from vora_jax.data.text.records import check_record
from vora_jax.data.text.special_tokens import IMAGE
from vora_jax.data.text.templates import Template
from vora_jax.data.text.tokenizer import Tokenizer
from vora_jax.types import UserError


class Image(NamedTuple):
    """The place of the record's picture number `index`, counted from 0."""

    index: int


Turn = list[Text | Image]
Cut = tuple[int, int, Text | Image]  # (begin, stop, what stands there) in a text


def render_turns(record: Any, tokenizer: Tokenizer, template: Template, where: str = 'record',
                 video_frames: int = 0) -> tuple[list[Turn], list[Named]]:
    """(turns, frames): each turn is one question with its answer; only answers and their end marks are
    supervised.

    Raises:
        UserError: see `check_record` and `Template.end_id`.
    """
    system, exchanges, frames = check_record(record, where, video_frames)
    end = template.end_id(tokenizer)
    if not template.apart:
        return _render_whole(system, exchanges, tokenizer, template, end), frames
    turns, images = [], 0
    for number, (question, answer) in enumerate(exchanges):
        lead = template.opening(system) if number == 0 else template.between
        turn = _split_images(lead + template.question(question, number == 0, system), tokenizer, images)
        images += question.count(IMAGE)
        turn.append(Text(tokenizer.encode(template.answer(answer)) + [end], supervised=True))
        turns.append(turn)
    return turns, frames


def render(record: Any, tokenizer: Tokenizer, template: Template, where: str = 'record', video_frames: int = 0) -> Turn:
    """The pieces of the whole record, see `render_turns`."""
    turns, _ = render_turns(record, tokenizer, template, where, video_frames)
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
    text = template.opening(system) + template.question(question, True, system)
    if template.apart:
        return _split_images(text, tokenizer, 0)
    return _tokenize(text, [], [], [0], tokenizer, template)[0]


def place(pieces: Sequence[Text | Image], pictures: Sequence[Sequence[Picture]]) -> list[Text | Picture]:
    """The pieces as a segment for `packing.layout`: every `Image` is replaced by its picture, or its tiles."""
    return [part for piece in pieces for part in (pictures[piece.index] if isinstance(piece, Image) else [piece])]


def _split_images(text: str, tokenizer: Tokenizer, first_image: int) -> Turn:
    """Unsupervised pieces of a prompt; `<image>` is cut out before the text is tokenised."""
    pieces: Turn = []
    for number, chunk in enumerate(text.split(IMAGE)):
        if number:
            pieces.append(Image(first_image + number - 1))
        if chunk:
            pieces.append(Text(tokenizer.encode(chunk)))
    return pieces


def _render_whole(system: str | None, exchanges: Sequence[tuple[str, str]], tokenizer: Tokenizer, template: Template,
                  end: int) -> list[Turn]:
    """The turns of a conversation whose text is tokenised as a whole, as `transformers` does."""
    text, starts, learned, ends = template.opening(system), [], [], []
    mark = template.end or ' '  # cut out again: it only needs a width
    for number, (question, answer) in enumerate(exchanges):
        starts.append(len(text) if number else 0)
        text += template.between if number and not template.closes else ''
        text += template.question(question, number == 0, system)
        begin = len(text)
        text += template.answer(answer)
        learned.append((begin, len(text)))
        # The end mark is set as an id: one that is no special token would melt into the answer's last token.
        ends.append((len(text), len(text) + len(mark), Text([end], supervised=True)))
        text += mark + (template.between if template.closes else '')
    return _tokenize(text, ends, learned, starts, tokenizer, template)


def _tokenize(text: str, ends: Sequence[Cut], learned: Sequence[tuple[int, int]], starts: Sequence[int],
              tokenizer: Tokenizer, template: Template) -> list[Turn]:
    """The text of a conversation as pieces, by turns. A token that covers any character of an answer is learned.

    Args:
        ends: the end marks.
        learned: where answers begin and stop, in order.
        starts: where turns begin, in order; the first is 0.
    """
    images = [(match.start(), match.end(), Image(index)) for index, match in enumerate(re.finditer(IMAGE, text))]
    lead = template.begin_ids(tokenizer)
    turns: list[Turn] = [[] for _ in starts]
    turns[0] += [Text(lead)] if lead else []
    at = 0
    for begin, stop, piece in sorted([*images, *ends, (len(text), len(text), None)], key=lambda cut: cut[:2]):
        border = next((first for first, _ in learned if at < first < begin), at) if template.answers_apart else at
        tokens = zip(*_encode(text[at:begin], border - at, at == 0, tokenizer))

        def place_of(token: tuple[int, tuple[int, int]], at: int = at) -> tuple[int, bool]:
            first, last = (offset + at for offset in token[1])
            # The first answer that stops behind the token's first character. A token that covers nothing is a part of
            # the character that follows.
            index = bisect.bisect(learned, first, key=lambda span: span[1])
            inside = index < len(learned) and max(last, first + 1) > learned[index][0]
            return bisect.bisect(starts, first) - 1, inside

        for (turn, inside), run in itertools.groupby(tokens, place_of):
            turns[turn].append(Text([token for token, _ in run], inside))
        if piece is not None:
            turns[bisect.bisect(starts, begin) - 1].append(piece)
        at = stop
    return turns


def _encode(text: str, border: int, start: bool, tokenizer: Tokenizer) -> tuple[list[int], list[tuple[int, int]]]:
    """`Tokenizer.encode_spans`, but no token reaches over the border, a place in the text; 0 for none."""
    ids, spans = tokenizer.encode_spans(text, start)
    if not any(first < border < last for first, last in spans):
        return ids, spans
    ids, spans = tokenizer.encode_spans(text[:border], start)
    more, behind = tokenizer.encode_spans(text[border:], start=False)
    return [*ids, *more], [*spans, *((first + border, last + border) for first, last in behind)]
