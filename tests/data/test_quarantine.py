"""The file of unusable samples: every one exactly once, whoever finds it and whatever happened before."""
import collections
import concurrent.futures
import json
import logging
import multiprocessing
import pickle

import pytest

from vora_jax.data import quarantine as quarantine_file
from vora_jax.data.quarantine import Quarantine

ODD = ['two\nlines\r\n', 'tab\t"quoted" \\back', 'nul\0 bell\a', 'line\u2028separator\x85', '東京 🙂 é',
       'half \ud800 a pair', '', ' ']


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / 'quarantine.jsonl')


def lines(path):
    """The records of the file, which is whole UTF-8 with one JSON object a line."""
    with open(path, encoding='utf-8', newline='\n') as file:
        return [json.loads(line) for line in file]


def keys(path):
    return collections.Counter((record['source'], record['row']) for record in lines(path))


def add(quarantine, row, source='a'):
    return quarantine.add(source, row, f'{source} row {row + 1}', f'{source} row {row + 1}: reason')


def test_a_line_tells_all(path):
    assert add(Quarantine(path), 6)
    assert lines(path) == [{'source': 'a', 'row': 6, 'where': 'a row 7', 'reason': 'a row 7: reason'}]


@pytest.mark.parametrize('odd', ODD)
def test_odd_characters_survive(path, odd):
    quarantine = Quarantine(path)
    assert quarantine.add(odd, 0, odd, odd) and quarantine.add('b', 0, '', '') and not quarantine.add(odd, 0, odd, odd)
    assert lines(path)[0] == {'source': odd, 'row': 0, 'where': odd, 'reason': odd} and len(lines(path)) == 2
    assert Quarantine(path).reasons == [odd, '']
    assert not Quarantine(path).add(odd, 0, odd, odd) and len(lines(path)) == 2


def test_each_sample_once_in_order(path):
    quarantine, rows = Quarantine(path), [3, 1, 3, 2, 1, 0]
    assert [add(quarantine, row) for row in rows] == [True, True, False, True, False, True]
    assert add(quarantine, 3, 'b')
    assert quarantine.reasons == [f'a row {row + 1}: reason' for row in (3, 1, 2, 0)] + ['b row 4: reason']


def test_a_run_that_goes_on_adds_what_is_new(path):
    for start in (0, 5, 7):
        quarantine = pickle.loads(pickle.dumps(Quarantine(path)))
        assert [add(quarantine, row) for row in range(start, start + 6)] == [row >= (0, 6, 11)[(0, 5, 7).index(start)]
                                                                              for row in range(start, start + 6)]
    assert keys(path) == {('a', row): 1 for row in range(13)}
    assert len(Quarantine(path).reasons) == 13


@pytest.mark.parametrize('rest', [b'{"source": "a", "row": 9, "wh', b'{', b'\xe6\x9d', b'{"source": "a", "row": 1}'])
def test_a_line_cut_off_by_a_crash_is_written_again(path, rest):
    first = Quarantine(path)
    add(first, 0), add(first, 1)
    with open(path, 'ab') as file:
        file.write(rest)
    assert Quarantine(path).reasons == first.reasons and len(first.reasons) == 2  # looking changes nothing
    again = Quarantine(path)
    assert not add(again, 1) and add(again, 9) and add(again, 2) and not add(first, 9)
    assert keys(path) == {('a', row): 1 for row in (0, 1, 9, 2)}


def test_only_a_cut_off_line_is_there(path):
    with open(path, 'wb') as file:
        file.write(b'{"sou')
    assert Quarantine(path).reasons == [] and add(Quarantine(path), 0) and keys(path) == {('a', 0): 1}


def test_without_a_file(path):
    quarantine = Quarantine('')
    assert add(quarantine, 0) and not add(quarantine, 0) and quarantine.reasons == ['a row 1: reason']
    assert pickle.loads(pickle.dumps(quarantine)).reasons == []


def test_threads_that_share_it(path):
    two = [Quarantine(path), Quarantine(path)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda number: add(two[number % 2], number % 50), range(400)))
    assert sum(found) == 50 and keys(path) == {('a', row): 1 for row in range(50)}
    assert all(len(quarantine.reasons) == 50 for quarantine in two)


def add_all(quarantine, start):
    return sum(add(quarantine, (row + start) % 300) for row in range(300))


def test_processes_that_share_it(path):
    quarantine = Quarantine(path)
    add(quarantine, 7)
    with multiprocessing.get_context('spawn').Pool(2) as pool:
        found = pool.starmap(add_all, [(quarantine, start) for start in (0, 0, 150, 299)], 1)
    assert sum(found) == 299 and keys(path) == {('a', row): 1 for row in range(300)}
    assert len(quarantine.reasons) == 300 and not add(quarantine, 200)


def test_the_log_ends_before_it_floods(path, caplog, monkeypatch):
    monkeypatch.setattr(quarantine_file, 'MAX_TOLD', 5)
    with caplog.at_level(logging.WARNING):
        for quarantine in (Quarantine(path), Quarantine('')):
            for row in range(20):
                add(quarantine, row % 10)
    told = [record.getMessage() for record in caplog.records]
    assert [message for message in told if 'left out a sample' in message] == [
        f'left out a sample: a row {row + 1}: reason' for row in range(5)] * 2
    assert len(told) == 12 and path in told[5] and path not in told[11] and len(lines(path)) == 10
