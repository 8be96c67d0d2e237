"""Whatever a row holds, it is good or its fault is told."""
import copy
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from vora_jax.data.frame import Frame
from vora_jax.data.sources.json_lines import JsonLines
from vora_jax.data.text.conversation import Image, render
from vora_jax.data.text.records import check_record
from vora_jax.data.text.templates import TEMPLATES
from vora_jax.types import UserError


def turns(*values, roles=('human', 'gpt'), names=('from', 'value')):
    return [{names[0]: roles[number % 2], names[1]: value} for number, value in enumerate(values)]


def messages(*contents):
    return turns(*contents, roles=('user', 'assistant'), names=('role', 'content'))


def text(value):
    return {'type': 'text', 'text': value}


class Letters:
    """A tokenizer with one id for each byte."""

    vocab_size, eos_id, pad_id, bos_id = 257, 256, 0, None

    def encode(self, value):
        return list(value.encode())

    def encode_spans(self, value, start=True):
        return [ord(letter) for letter in value], [(place, place + 1) for place in range(len(value))]

    def token_id(self, value):
        return 256


def accounted(record, video_frames):
    """True for a good record, False for one that is told; anything else fails."""
    where = 'rows.jsonl row 3'
    try:
        system, exchanges, frames = check_record(record, where, video_frames)
    except UserError as error:
        assert str(error).startswith(f'{where}: ') and str(error).isprintable() and len(str(error)) < 500
        return False
    assert system is None or isinstance(system, str)
    assert exchanges and all(isinstance(part, str) for exchange in exchanges for part in exchange)
    assert all(isinstance(frame, Frame) or isinstance(frame, str) and frame for frame in frames)
    pieces = render(record, Letters(), TEMPLATES['vora'], where, video_frames)
    assert [piece.index for piece in pieces if isinstance(piece, Image)] == list(range(len(frames)))
    return True


GOOD = [
    {'id': 1, 'frames': ['x.png'], 'conversations': turns('<image>\nq', 'a', 'why?', 'so')},
    {'id': 2, 'image': 'x.png', 'conversations': [{'from': 'system', 'value': 's'}, *turns('<image>\nq', 'a')]},
    {'id': 3, 'messages': messages([{'type': 'image', 'image': 'x'}, text('and'), {'type': 'image', 'image': 'y'}], 'a')},
    {'id': 4, 'video': ['x', 'y', 'z'], 'timestamps': [1, 2.5, 3], 'conversations': turns('<video>\nq', 'a')},
    {'id': 5, 'conversations': turns('q', 'a')},
    {'id': 6, 'images': [{'path': 'x', 'bytes': None}], 'messages': messages([{'type': 'image'}, text('q')], [text('a')])},
]
WORDS = some.sampled_from([
    '', 'a', '<image>', '<video>', 'human', 'user', 'gpt', 'assistant', 'system', 'text', 'image', 'image_url', 'data:',
    'http://x', 'x.mp4', '\ud800', '\0', 'from', 'value', 'role', 'content', 'type', 'path', 'url', 'bytes', 'frames',
    'video', 'images', 'conversations', 'messages', 'timestamps', '\n\r\u2028'])
NUMBERS = some.none() | some.booleans() | some.integers() | some.floats()
LEAVES = NUMBERS | WORDS | some.text(max_size=5) | some.binary(max_size=3)
VALUES = some.recursive(
    LEAVES, lambda inner: some.lists(inner, max_size=4) | some.dictionaries(WORDS, inner, max_size=4), max_leaves=9)
SPLICED = [b'NaN', b'1e999', b'null', b'[' * 50, b'"\\ud800"', b'\xff', b'{}', b'"']


def places(value, path=()):
    """Paths to all values in a record."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def mutate(record, path, change, value):
    """The record with the value at a path replaced, removed or doubled."""
    if not path:
        return value
    record = copy.deepcopy(record)
    holder = record
    for key in path[:-1]:
        holder = holder[key]
    if change == 'remove':
        del holder[path[-1]]
    elif change == 'double' and isinstance(holder, list):
        holder.insert(path[-1], copy.deepcopy(holder[path[-1]]))
    else:
        holder[path[-1]] = value
    return record


@settings(max_examples=60, deadline=None)
@given(VALUES, some.sampled_from([0, 2]))
def test_any_json_value_is_good_or_told(value, video_frames):
    accounted(value, video_frames)


@settings(max_examples=120, deadline=None)
@given(some.data())
def test_a_mutated_record_is_good_or_told(data):
    record = data.draw(some.sampled_from(GOOD))
    for _ in range(data.draw(some.integers(1, 3))):
        path = data.draw(some.sampled_from(list(places(record))))
        record = mutate(record, path, data.draw(some.sampled_from(['replace', 'remove', 'double'])), data.draw(VALUES))
    accounted(record, data.draw(some.sampled_from([0, 2])))


def test_the_records_that_are_mutated_are_good():
    assert all(accounted(record, 2) for record in GOOD)


def damaged(line, rng):
    """A line of a file that was cut, overwritten or garbled."""
    place, kind = rng.randrange(len(line)), rng.randrange(5)
    if kind == 0:
        return line[:place] or b'{'
    if kind == 1:
        return line[:place] + bytes(rng.choices(range(11, 256), k=3)) + line[place + 3:]
    if kind == 2:
        return line[:place] + b'\0' * min(9, len(line) - place) + line[place + 9:]
    if kind == 3:
        return line[:place] + rng.choice(SPLICED) + line[place:]
    record = json.loads(line)
    path = rng.choice(list(places(record))[1:])
    value = rng.choice([None, 1, float('nan'), '', 'x', '<image>', [], ['x'], {}, True, [[[]]]])
    return json.dumps(mutate(record, path, rng.choice(['replace', 'remove', 'double']), value)).encode()


@pytest.mark.parametrize('seed', range(3))
def test_200_mutated_rows_of_a_file_are_all_accounted_for(tmp_path, seed):
    rng = random.Random(seed)
    lines = [damaged(json.dumps(rng.choice(GOOD)).encode(), rng) for _ in range(200)]
    (tmp_path / 'rows.jsonl').write_bytes(b'\n'.join(lines))
    rows, good, bad = JsonLines(str(tmp_path / 'rows.jsonl')), 0, []
    for number in range(len(rows)):
        try:
            good += bool(check_record(rows[number], rows.where(number), 2))
        except UserError as error:
            assert str(error).startswith(f'{rows.where(number)}: ')
            bad.append(str(error))
    assert good + len(bad) == len(rows) == 200 and good > 5 and len(bad) > 100
