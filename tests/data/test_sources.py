"""JSON-lines files by row number, and mixture weights."""
import json
import random
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vora_jax.data.mixture import epoch_samples
from vora_jax.data.sources.json_lines import JsonLines, find_lines
from vora_jax.data.sources.parse_json import parse_json
from vora_jax.data.text.records import check_record
from vora_jax.types import UserError


def lined(tmp_path, content):
    (tmp_path / 'rows.jsonl').write_bytes(content)
    return JsonLines(str(tmp_path / 'rows.jsonl'))


def test_rows_by_number(tmp_path):
    rows = lined(tmp_path, '\ufeff{"a": 1}\r\n\r\n\n{"a": "ü"}\nnot json\n{"a": "\\ud800"}\n'.encode()
                 + b'"\xff"\n7\n\r\n{"a": "\0"}\n\0\0\0{\n[3]')
    assert len(rows) == 9 and rows[0] == {'a': 1} and rows[1] == {'a': 'ü'} and rows[5] == 7 and rows[8] == [3]
    assert rows.where(0) == f'{rows.path} row 1' and rows.where(8) == f'{rows.path} row 12'
    for row, line in ((2, 5), (3, 6), (4, 7), (6, 10), (7, 11)):
        with pytest.raises(UserError, match=f'rows.jsonl row {line}: not valid JSON'):
            rows[row]


@settings(max_examples=150, deadline=None)
@given(lines=st.lists(st.sampled_from(['', '\r', '1', '{"a": 2}', '{"a": 2}\r', ' ']), max_size=12), ended=st.booleans(),
       sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4), bom=st.booleans())
def test_lines_and_their_numbers_for_any_chunks(lines, ended, sizes, bom, tmp_path_factory):
    content = ('\n'.join(lines) + '\n' * ended).encode()
    held = [(number + 1, line) for number, line in enumerate(lines) if line not in ('', '\r')]
    file = tmp_path_factory.mktemp('lines', numbered=True) / 'rows.jsonl'
    file.write_bytes(b'\xef\xbb\xbf' * bom + content)

    def chunks():
        offset, number = 0, 0
        while offset < len(content):
            size = sizes[number % len(sizes)]
            yield offset, content[offset:offset + size]
            offset, number = offset + size, number + 1

    spans = np.concatenate([np.zeros((0, 2), np.int64), *find_lines('', chunks())])
    assert [content[start:stop].decode() for start, stop in spans.tolist() if stop >= start] == [line for _, line in held]
    if not held:
        with pytest.raises(UserError, match='rows.jsonl is empty'):
            JsonLines(str(file))
        return
    rows = JsonLines(str(file))
    assert [rows.where(row) for row in range(len(rows))] == [f'{file} row {number}' for number, _ in held]


def test_rows_that_a_parser_may_die_of(tmp_path):
    deep = b'[' * (100 << 20)
    numbers = [b'{"n": ' + b'9' * 5000 + b'}', b'[' * 101 + b']' * 101, b'{"a":' * 101 + b'1' + b'}' * 101,
               b'1e' + b'9' * 5000]
    rows = lined(tmp_path, b'\n'.join([b'{"a": 1}', deep, *numbers, b'[' * 100 + b']' * 100, b'{"a": 1, "a": 2}']))
    assert len(rows) == 8 and rows[0] == {'a': 1} and rows[7] == {'a': 2} and rows[5] == float('inf')
    assert json.dumps(rows[6]) == '[' * 100 + ']' * 100
    for row in (1, 2, 3, 4):
        with pytest.raises(UserError, match=f'row {row + 1}: not valid JSON'):
            rows[row]


def test_depth_is_judged_alike_in_any_stack():
    def deeper(levels):
        if levels:
            return deeper(levels - 1)
        with pytest.raises(UserError, match='more than 100 deep'):
            parse_json(b'[' * 110 + b']' * 110, 'here')
        return parse_json(b'[' * 100 + b']' * 100, 'here')

    assert deeper(0) == deeper(600)


def test_a_row_that_is_too_long_or_gone_is_told(tmp_path, monkeypatch):
    rows = lined(tmp_path, b'{"a": 1}\n{"a": "' + b'x' * 100 + b'"}\n')
    monkeypatch.setattr('vora_jax.data.sources.span_index._MAX_ROW', 50)
    assert rows[0] == {'a': 1}
    with pytest.raises(UserError, match='row 2: the row has 109 bytes, more than 50'):
        rows[1]
    (tmp_path / 'rows.jsonl').write_bytes(b'{"a"')
    with pytest.raises(UserError, match='row 1: the file has become shorter'):
        rows[0]


def test_mutated_rows_parse_alike_or_are_told(tmp_path):
    """Every row of a damaged file is the same value that it is by itself, or one sentence; the others are untouched."""
    draw = random.Random(0)
    turns = [{'from': 'human', 'value': '<image>\nsay "ü"\\'}, {'from': 'gpt', 'value': 'so\n'}]
    lines = [json.dumps({'id': n, 'frames': [f'{n}.png'], 'conversations': turns}, ensure_ascii=n % 2 == 0).encode()
             for n in range(400)]
    told = 0
    mutated = draw.sample(range(400), 200)
    for number in mutated:
        line = bytearray(lines[number])
        for _ in range(draw.randrange(1, 6)):
            at, kind = draw.randrange(len(line)) if line else 0, draw.randrange(5)
            if kind == 0 and line:
                line[at] ^= 1 << draw.randrange(8)
            elif kind == 1:
                del line[at:]
            elif kind == 2:
                del line[at:at + draw.randrange(1, 30)]
            elif kind == 3:
                line.insert(at, draw.choice(b'"\\[]{},\0\r '))
            else:
                line[at:at] = line[:draw.randrange(40)]
        lines[number] = bytes(line).replace(b'\n', b'\0')
    rows = lined(tmp_path, b'\n'.join(lines))
    held = [(number, line) for number, line in enumerate(lines) if line not in (b'', b'\r')]
    assert len(rows) == len(held) >= 390
    for row, (number, line) in enumerate(held):
        try:
            expected = json.loads(line.decode())
            json.dumps(expected, ensure_ascii=False).encode()
        except ValueError:
            with pytest.raises(UserError, match=f'rows.jsonl row {number + 1}: not valid JSON'):
                rows[row]
            told += 1
            assert number in mutated
            continue
        assert rows[row] == expected
        try:
            check_record(rows[row], rows.where(row))
        except UserError as error:
            assert number in mutated and str(error).startswith(rows.where(row))
    assert 50 < told < 200


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(UserError, match='none.jsonl does not exist; .*vora prepare'):
        JsonLines(str(tmp_path / 'none.jsonl'))
    for content in (b'', b'\n\n', b'\r\n', b'\xef\xbb\xbf', b'\xef\xbb\xbf\r\n'):
        with pytest.raises(UserError, match='rows.jsonl is empty'):
            lined(tmp_path, content)


TWO_MILLION = '''
import json, random, re, sys, time
from vora_jax.data.sources.json_lines import JsonLines
from vora_jax.data.sources.json_list import JsonList
kind, path, cache = sys.argv[1:]
def peak():  # getrusage would tell the peak of the process that started this one
    return int(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1]) / 1024
before = peak()
start = time.perf_counter()
rows = {'lines': JsonLines, 'list': JsonList}[kind](path, cache)
index = time.perf_counter() - start
order = [random.Random(0).randrange(len(rows)) for _ in range(10_000)]
start = time.perf_counter()
right = all(rows[number]['id'] == number for number in order)
access = time.perf_counter() - start
print(json.dumps({'rows': len(rows), 'right': right, 'index_seconds': index, 'row_ms': access / 10,
                  'mib': peak() - before}))
'''


@pytest.mark.slow
@pytest.mark.parametrize('kind, cached', [('lines', False), ('lines', True), ('list', False)])
def test_two_million_rows(tmp_path, kind, cached):
    opening, between, closing = {'lines': ('', '\n', '\n'), 'list': ('[\n', ',\n', '\n]')}[kind]
    with open(tmp_path / 'rows', 'w') as file:
        for number in range(2_000_000):
            question = f'<image>\\n{"what is it " * 8}'
            turns = f'[{{"from": "human", "value": "{question}"}}, {{"from": "gpt", "value": "a \\"cat\\""}}]'
            file.write(f'{between if number else opening}'
                       f'{{"id": {number}, "frames": ["{number:08d}.jpg"], "conversations": {turns}}}')
        file.write(closing)
    for run in range(1 + cached):
        done = subprocess.run([sys.executable, '-c', TWO_MILLION, kind, str(tmp_path / 'rows'),
                               str(tmp_path / 'cache') if cached else ''], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout)
        print(kind, 'cached' * cached, run, told)
        assert told['rows'] == 2_000_000 and told['right']
        assert told['index_seconds'] < (1 if run else 60) and told['row_ms'] < 1 and told['mib'] < (100 if run else 500)


def test_weights_count_samples():
    epoch = epoch_samples([10, 10, 10], [1, 0.3, 2.5], seed=0)
    counts = np.bincount(epoch, minlength=30)
    assert (counts[:10] == 1).all() and counts[10:20].sum() == 3 and counts[10:20].max() == 1
    assert counts[20:].sum() == 25 and set(counts[20:]) == {2, 3}
    np.testing.assert_array_equal(epoch, epoch_samples([10, 10, 10], [1, 0.3, 2.5], seed=0))
    assert (epoch[10:13] != epoch_samples([10, 10, 10], [1, 0.3, 2.5], seed=1)[10:13]).any()
    assert epoch_samples([10, 10], [1, 0], seed=0).tolist() == list(range(10))
