"""Rows on disk and their summary."""

import json

import numpy as np

from vora_jax.training.metrics import Log, summarise


def step(loss, tokens=8):
    return {
        name: np.asarray(value)
        for name, value in {
            'loss': np.float32(loss),
            'lr': np.float32(loss),
            'num_text_tokens': np.int32(tokens),
            'num_vision_tokens': np.int32(0),
            'pad_fraction': np.float32(0.5),
            'bad_samples': np.int32(1),
            'distill_layers': np.float32([loss, 1.0]),
        }.items()
    }


def test_summary_sums_counts_and_means_the_rest():
    row = summarise([step(1.0), step(3.0)])
    assert (
        row['loss'] == 2.0 and row['lr'] == 3.0 and row['num_text_tokens'] == 16 and row['bad_samples'] == 2
    )
    assert row['distill_layers'] == [2.0, 1.0]


def test_resuming_cuts_off_later_rows_and_half_a_line(tmp_path):
    log = Log(tmp_path, 0, 9)
    log.start_clock()
    for number in (2, 4, 6):
        log.write(number, [step(number), step(number)])
    assert log.tokens_per_second > 0 and log.padding == {'pad_fraction': 0.5}
    log.close()
    path = tmp_path / 'metrics.jsonl'
    path.write_text(path.read_text() + '{"step": 7, "lo')
    log = Log(tmp_path, 4, 9)
    log.start_clock()
    log.write(5, [step(5.0)])
    log.close()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row['step'] for row in rows] == [2, 4, 5]
    assert 'tokens_per_second' not in rows[2]  # it held the first step only, whose time does not count
