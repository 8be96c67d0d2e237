"""JSON lists: their elements by number, LLaVA's rows and its variant."""
import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vora_jax.data.sources.json_elements import find_elements
from vora_jax.data.sources.json_list import JsonList
from vora_jax.data.text.records import check_record
from vora_jax.types import UserError

TEXT = st.text(st.one_of(st.sampled_from('"\\[]{},:/ \n'), st.characters(codec='utf-8')), max_size=12)
SCALARS = st.one_of(TEXT, st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False))
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4))


def said(*values, key='from', roles=('human', 'gpt')):
    return [{key: roles[number % 2], 'value': value} for number, value in enumerate(values)]


def written(tmp_path, rows):
    (tmp_path / 'list.json').write_text(json.dumps(rows))
    return str(tmp_path / 'list.json')


def listed(tmp_path, content):
    (tmp_path / 'x.json').write_bytes(content)
    return JsonList(str(tmp_path / 'x.json'))


def cut(content, sizes):
    """(offset, chunk) of chunks with these sizes, again and again."""
    offset, number = 0, 0
    while offset < len(content):
        size = sizes[number % len(sizes)]
        yield offset, content[offset:offset + size]
        offset, number = offset + size, number + 1


def elements(content, sizes):
    """The bytes of each element."""
    parts = list(find_elements('x.json', cut(content, sizes)))
    return [content[start:stop] for start, stop in np.concatenate([np.zeros((0, 2), np.int64), *parts]).tolist()]


@settings(max_examples=80, deadline=None)
@given(rows=st.lists(VALUES, min_size=1, max_size=6), indent=st.sampled_from([None, 0, 3]), escapes=st.booleans(),
       around=st.tuples(*[st.text(st.sampled_from(' \n\t\r'), max_size=3)] * 2),
       sizes=st.lists(st.integers(1, 30), min_size=1, max_size=5))
def test_elements_are_those_of_the_json_parser(rows, indent, escapes, around, sizes):
    content = (around[0] + json.dumps(rows, indent=indent, ensure_ascii=escapes) + around[1]).encode()
    for chunks in (sizes, [1 << 20]):
        assert [json.loads(part) for part in elements(content, chunks)] == rows


@settings(max_examples=200, deadline=None)
@given(content=st.text(st.sampled_from('[[]{},"\\a 1'), max_size=30),
       sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_any_text_is_a_list_or_told_and_never_another_list(content, sizes):
    content = b'[' + content.encode()
    try:
        parts = elements(content, sizes)
    except UserError as error:
        with pytest.raises(ValueError):
            json.loads(content)
        with pytest.raises(UserError) as whole:
            elements(content, [100])
        assert str(whole.value) == str(error)
        return
    assert parts == elements(content, [100]) and b'[' + b','.join(parts) + b']' == content.rstrip()
    try:
        expected = json.loads(content)
    except ValueError:
        return
    assert expected == ([] if parts == [b''] or not parts[0].strip() else [json.loads(part) for part in parts])


@pytest.mark.parametrize('run', range(1, 9))
def test_runs_of_backslashes_at_every_chunk_border(run):
    rows = ['a' + '\\' * run + '",[' + '"' * run, '\\' * run, {'\\"' * run: ['"']}]
    content = json.dumps(rows).encode()
    for first in range(1, len(content)):
        assert [json.loads(part) for part in elements(content, [first, len(content)])] == rows


def test_a_file_larger_than_a_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr('vora_jax.data.sources.span_index._CHUNK', 1000)
    draw = random.Random(0)
    rows = [{'n': n, 'text': ''.join(draw.choices('ab"\\[{ü😀,', k=draw.randrange(200)))} for n in range(500)]
    source = listed(tmp_path, b'\xef\xbb\xbf' + json.dumps(rows, ensure_ascii=False).encode())
    assert len(source) == 500 and all(source[n] == rows[n] for n in draw.sample(range(500), 500))


def test_rows_become_our_records(tmp_path):
    rows = JsonList(written(tmp_path, [
        {'id': 'a', 'image': 'a.png', 'model': 'm', 'conversations': said('What is it?\n<image>', 'Red.', 'Sure?', 'Yes.')},
        {'id': 1, 'conversations': said('Hello', 'Hi')},
        {'id': 2, 'image': 'a.png', 'conversations': said('<image>', 'Red.', key='form', roles=('question', 'answer'))},
        {'id': 3, 'conversations': said('Nobody asked', 'q', 'a', roles=('gpt', 'human'))},
        {'id': 4, 'image': ['a.png', 'b.png'], 'conversations': said('<image> or <image>?', 'b')},
        {'id': 5, 'messages': [{'role': 'user', 'content': 'q'}, {'role': 'assistant', 'content': 'a'}]},
        {'id': 6, 'conversations': [{'role': 'user', 'content': 'q'}, {'role': 'assistant', 'content': 'a'}]},
        {'id': 7, 'conversations': [{'form': ['question'], 'value': 'q'}]},
        {'id': 8, 'frames': ['a.png'], 'conversations': said('Is <image> red? ', 'Yes.')},
        {'id': 9, 'image': 'a.png', 'frames': ['b.png'], 'conversations': said('q', 'a')}]))
    assert [rows[number] for number in range(len(rows))] == [
        {'id': 'a', 'image': 'a.png', 'model': 'm',
         'conversations': said('<image>\nWhat is it?', 'Red.', 'Sure?', 'Yes.')},
        {'id': 1, 'conversations': said('Hello', 'Hi')},
        {'id': 2, 'image': 'a.png', 'conversations': said('<image>', 'Red.')},
        {'id': 3, 'conversations': said('q', 'a')},
        {'id': 4, 'image': ['a.png', 'b.png'], 'conversations': said('<image> or <image>?', 'b')},
        {'id': 5, 'messages': [{'role': 'user', 'content': 'q'}, {'role': 'assistant', 'content': 'a'}]},
        {'id': 6, 'conversations': [{'role': 'user', 'content': 'q'}, {'role': 'assistant', 'content': 'a'}]},
        {'id': 7, 'conversations': [{'from': ['question'], 'value': 'q'}]},
        {'id': 8, 'frames': ['a.png'], 'conversations': said('Is <image> red? ', 'Yes.')},
        {'id': 9, 'image': 'a.png', 'frames': ['b.png'], 'conversations': said('q', 'a')}]
    with pytest.raises(UserError, match='has frames and image; keep one'):
        check_record(rows[9], rows.where(9))
    assert rows.where(1) == f'{rows.path} row 2'


def test_bad_rows_are_told_when_they_are_checked(tmp_path):
    good = {'id': 'a', 'image': 'a.png', 'conversations': said('<image>\nq', 'a')}
    bad = [4, {'id': 1}, {'conversations': ['x']}, {**good, 'image': 5}, {'id': 2, 'conversations': said('q')},
           {'id': 3, 'conversations': said('<image>q', 'a')}, {'id': 5, 'conversations': said('q', roles=('gpt', 'human'))},
           {'id': 4, 'conversations': said('q', 'a', key='form', roles=('human', 'robot'))}]
    rows = JsonList(written(tmp_path, [good] + bad))
    assert check_record(rows[0], rows.where(0)) == (None, [('<image>\nq', 'a')], ['a.png'])
    for number in range(1, len(rows)):
        with pytest.raises(UserError, match=f'list.json row {number + 1}: '):
            check_record(rows[number], rows.where(number))


@pytest.mark.parametrize('content, message', [
    ('[]', 'is not a list of conversations: it is empty'), ('[ \n ]\n', 'it is empty'), ('', 'x.json is empty; it needs'),
    (' \n', 'x.json is empty'), ('{}', r'is not a JSON list, it does not begin with `\[`'),
    ('{"a": 1}\n{"b": 2}', 'is not a JSON list'), ('"[1]"', 'is not a JSON list'),
    ('[1, {"a": [2, ', 'x.json: the list has no end, row 2 from byte 3 on is cut off or malformed'),
    ('[1, "a]', 'the list has no end, row 2 '), ('[', 'the list has no end, row 1 from byte 1 on'),
    ('[1, 2]\n[3]', 'is not one JSON list: its end after 2 rows is followed by more, at byte 7; '),
    ('[{"a": 1}}, 3]', 'is not one JSON list: a `}` ends it after 1 rows, at byte 9; '),
    (None, 'x.json does not exist')])
def test_files_that_are_no_list_are_told(tmp_path, content, message):
    if content is not None:
        (tmp_path / 'x.json').write_text(content)
    with pytest.raises(UserError, match=message):
        JsonList(str(tmp_path / 'x.json'))


def test_a_malformed_element_is_that_rows_error_only(tmp_path):
    deep = b'[' * 2000 + b']' * 2000
    source = listed(tmp_path, b'[{"a": 1}, {"a" 2}, {"a": [1}}, , tru, "\xff", "\n", ' + deep + b', "\\ud800", {"b": 3}, ]')
    assert len(source) == 11 and source[0] == {'a': 1} and source[9] == {'b': 3}
    for row in (1, 2, 3, 4, 5, 6, 7, 8, 10):
        with pytest.raises(UserError, match=f'x.json row {row + 1}: not valid JSON'):
            source[row]


def test_mutated_lists_give_rows_or_a_sentence(tmp_path):
    draw = random.Random(1)
    rows = [{'id': n, 'image': 'ü.png', 'conversations': said('<image>\nsay "so"\\', 'a\n')} for n in range(8)]
    whole = json.dumps(rows, ensure_ascii=False).encode()
    good = listed(tmp_path, whole)
    good = [good[number] for number in range(8)]
    intact = 0
    for _ in range(200):
        content = bytearray(whole)
        for _ in range(draw.randrange(1, 4)):
            at = draw.randrange(len(content))
            kind = draw.randrange(4)
            if kind == 0:
                content[at] ^= 1 << draw.randrange(8)
            elif kind == 1:
                del content[at:at + draw.randrange(1, 20)]
            elif kind == 2:
                content.insert(at, draw.choice(b'"\\[]{},\0\n'))
            elif draw.random() < 0.2:
                del content[at:]
        try:
            source = listed(tmp_path, bytes(content))
        except UserError as error:
            assert str(error).startswith(str(tmp_path / 'x.json'))
            with pytest.raises(ValueError):
                json.loads(bytes(content).decode())
            continue
        for number in range(len(source)):
            try:
                intact += source[number] in good
            except UserError as error:
                assert str(error).startswith(f'{source.path} row {number + 1}: not valid JSON')
    assert intact > 200
