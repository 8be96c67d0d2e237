"""Productive time over restarts, killed processes and pauses."""

import json

import pytest

from vora_jax.training.log.clock import Split
from vora_jax.training.log.goodput import FILE, History

SECOND = {'num_timed_steps': 10, 'data_seconds': 0.1, 'device_seconds': 0.6, 'save_seconds': 0.1, 'host_seconds': 0.2}


class Day:
    """A fake time of day."""

    now = 1e9

    def __call__(self):
        return self.now

    def pass_(self, seconds):
        self.now += seconds


def test_a_run_with_a_kill_a_pause_and_more_steps_afterwards(tmp_path):
    """Every second of a made-up week has its place."""
    day = Day()

    # 20 s until the first step, 30 s of steps, killed 5 s after the last row; the last checkpoint was at step 21.
    history = History(tmp_path, day.now, 0, now=day)
    day.pass_(20)
    history.stepping()
    rows = []
    for number in (11, 21, 31):
        day.pass_(10)
        rows.append({'step': number, **SECOND})
        history.spend(Split(1.0, 6.0, 1.0, 2.0))
    assert history.goodput().share == 24 / 50
    day.pass_(5)
    with open(tmp_path / FILE, 'a') as file:
        file.write('{"event": "sto')  # cut off by the kill

    # A minute later a process that dies before its first step.
    day.pass_(60)
    History(tmp_path, day.now, 21, rows, now=day)
    rows.pop()  # as `Log` cuts it off

    # Another minute, and one that completes the run: 10 s to start, 10 s of steps, 3 s for the last checkpoint.
    day.pass_(60)
    history = History(tmp_path, day.now, 21, rows, now=day)
    day.pass_(10)
    history.stepping()
    day.pass_(10)
    rows.append({'step': 32, **SECOND})
    history.spend(Split(1.0, 6.0, 1.0, 2.0))
    day.pass_(3)
    history.spend(Split(0.0, 0.0, 3.0, 0.0))
    told = history.goodput()
    assert told.wall == 50 + 5 + 60 + 60 + 23
    assert told.productive == 24 and told.share == 24 / 198
    assert told.lost == {'start': 30, 'data': 3, 'save': 3 + 3, 'repeated': 10, 'stopped': 5 + 60 + 60}
    assert told.productive + sum(told.lost.values()) == told.wall
    assert str(told) == ('goodput 0.121: 24.0 of 198.0 s went into steps '
                         '(lost: start 30.0, data 3.0, save 6.0, repeated 10.0, stopped 125.0)')
    history.close(True)

    # A week later someone wants more steps: the week is nobody's loss.
    day.pass_(7 * 24 * 3600)
    history = History(tmp_path, day.now, 32, rows, now=day)
    day.pass_(10)
    history.stepping()
    told = history.goodput()
    assert told.wall == 198 + 10 - 3 + 3 and told.lost['start'] == 40
    events = [json.loads(line)['event'] for line in (tmp_path / FILE).read_text().splitlines()]
    assert events == ['start', 'stepping', 'start', 'start', 'stepping', 'complete', 'start', 'stepping']


def test_rows_of_older_versions_count_for_nothing(tmp_path):
    day = Day()
    history = History(tmp_path, day.now, 5, [{'step': 5, 'loss': 1.0}, {'step': 9}], now=day)
    day.pass_(4)
    told = history.goodput()
    assert told.productive == 0 and told.wall == told.lost['stopped'] == 4 and told.share == 0


def test_a_clock_that_was_set_back_gives_no_negative_loss(tmp_path):
    day = Day()
    history = History(tmp_path, day.now, 0, now=day)
    history.stepping()
    day.pass_(-100)
    history.spend(Split(0.0, 9.0, 0.0, 1.0))
    assert history.goodput().share == 1 and history.goodput().lost['stopped'] == pytest.approx(0)
