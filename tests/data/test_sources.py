"""JSON-lines files by row number, and mixture weights."""

import concurrent.futures
import json
import pickle

import numpy as np
import pytest

from vora_jax.data.mixture import epoch_samples
from vora_jax.data.sources.json_lines import JsonLines
from vora_jax.types import UserError


def test_rows_by_number(tmp_path):
    file = tmp_path / 'rows.jsonl'
    file.write_bytes(
        '\ufeff{"a": 1}\r\n\r\n\n{"a": "ü"}\nnot json\n{"a": "\\ud800"}\n\xff\n[3]'.encode('utf-8')
    )
    rows = JsonLines(str(file))
    assert len(rows) == 6 and rows[0] == {'a': 1} and rows[1] == {'a': 'ü'} and rows[5] == [3]
    assert rows.where(1) == f'{file} row 4'
    for row, line in ((2, 5), (3, 6), (4, 7)):
        with pytest.raises(UserError, match=f'rows.jsonl row {line}: not valid JSON'):
            rows[row]
    assert pickle.loads(pickle.dumps(rows))[5] == [3]


def test_threads_share_a_source(tmp_path):
    (tmp_path / 'rows.jsonl').write_text(
        '\n'.join(json.dumps({'n': n, 'pad': 'x' * (n % 97)}) for n in range(2000))
    )
    rows = JsonLines(str(tmp_path / 'rows.jsonl'))
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert [row['n'] for row in pool.map(rows.__getitem__, range(2000))] == list(range(2000))


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(UserError, match='none.jsonl does not exist; .*vora prepare'):
        JsonLines(str(tmp_path / 'none.jsonl'))
    (tmp_path / 'empty.jsonl').write_text('\n\n')
    with pytest.raises(UserError, match='empty.jsonl is empty'):
        JsonLines(str(tmp_path / 'empty.jsonl'))


def test_weights_count_samples():
    epoch = epoch_samples([10, 10, 10], [1, 0.3, 2.5], seed=0)
    counts = np.bincount(epoch, minlength=30)
    assert (counts[:10] == 1).all() and counts[10:20].sum() == 3 and counts[10:20].max() == 1
    assert counts[20:].sum() == 25 and set(counts[20:]) == {2, 3}
    np.testing.assert_array_equal(epoch, epoch_samples([10, 10, 10], [1, 0.3, 2.5], seed=0))
    assert (epoch[10:13] != epoch_samples([10, 10, 10], [1, 0.3, 2.5], seed=1)[10:13]).any()
    assert epoch_samples([10, 10], [1, 0], seed=0).tolist() == list(range(10))
