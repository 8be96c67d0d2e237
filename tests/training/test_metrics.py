"""Rows on disk, what they tell of time, and their sinks."""

import json
import math
import sys
import types

import numpy as np
import pytest

from vora_jax.training.log import json_lines, metrics, rows, wandb_run
from vora_jax.training.log.clock import Clock, Split
from vora_jax.training.log.metrics import Log
from vora_jax.training.log.rows import summarise, timing
from vora_jax.training.log.yardstick import Yardstick
from vora_jax.types import UserError

YARDSTICK = Yardstick(num_slots=16)


def step(loss, tokens=8, **more):
    values = {'loss': np.float32(loss), 'lr': np.float32(loss), 'num_text_tokens': np.int32(tokens),
              'num_vision_tokens': np.int32(0), 'pad_fraction': np.float32(0.5), 'bad_samples': np.int32(1),
              'distill_layers': np.float32([loss, 1.0])}
    return {name: np.asarray(value) for name, value in (values | more).items()}


class Hand:
    """A clock that moves when told."""

    def __init__(self):
        self.seconds = 100.0

    def __call__(self):
        return self.seconds

    def move(self, seconds):
        self.seconds += seconds


def test_summary_sums_counts_and_means_the_rest():
    row = summarise([step(1.0), step(3.0)])
    assert row['loss'] == 2.0 and row['lr'] == 3.0 and row['num_text_tokens'] == 16 and row['bad_samples'] == 2
    assert row['distill_layers'] == [2.0, 1.0]


def test_means_leave_out_skipped_steps_and_sums_do_not():
    skipped, good = step(math.nan, skipped_steps=np.int32(1)), step(3.0, skipped_steps=np.int32(0))
    row = summarise([good, skipped])
    assert row['loss'] == 3.0 and row['skipped_steps'] == 1 and row['num_text_tokens'] == 16
    assert math.isnan(summarise([skipped, skipped])['loss'])


def test_the_clock_splits_all_of_the_time():
    rng, hand = np.random.default_rng(), Hand()
    clock, spent = Clock(hand), dict.fromkeys(Split._fields, 0.0)
    for _ in range(50):
        name, seconds = rng.choice(Split._fields), rng.uniform(0, 2)
        spent[name] += seconds
        if name == 'host':
            hand.move(seconds)
        else:
            with clock.part(name):
                hand.move(seconds)
    split = clock.take()
    assert split._asdict() == pytest.approx(spent) and split.total == pytest.approx(hand.seconds - 100)
    assert clock.take().total == 0
    with pytest.raises(ValueError), clock.part('data'):  # what a context raises costs time as well
        hand.move(1.0)
        raise ValueError
    assert clock.take().data == 1.0


def test_rates_by_hand():
    """Two steps of 4 s on 2 chips that can do 100 FLOP/s each; 20 slots: 8 text in the mean, 4 vision, 8 padding."""
    steps = [step(1.0, text, num_vision_tokens=np.int32(4), pad_fraction=np.float32(0.4)) for text in (7, 9)]
    row = timing(steps, Split(data=1.0, device=4.0, save=2.0, host=1.0),
                 Yardstick(20, 2, lambda one: (10 * one['num_text_tokens'], 160), 100.0))
    assert row['num_timed_steps'] == 2 and row['seconds_per_step'] == 4.0
    assert [row[f'{name}_seconds'] for name in Split._fields] == [0.5, 2.0, 1.0, 0.5]
    assert row['tokens_per_second'] == 3.0
    per_chip = [row[f'{kind}_tokens_per_second_per_chip'] for kind in ('text', 'vision', 'pad')]
    assert per_chip == pytest.approx([1.0, 0.5, 1.0])
    assert row['mfu'] == 160 / 1600 and row['hfu'] == 320 / 1600
    assert not {'mfu', 'hfu'} & timing(steps, Split(1, 1, 1, 1), YARDSTICK).keys()
    assert timing([], Split(1, 1, 1, 1), YARDSTICK) == {'num_timed_steps': 0}


def test_the_parts_of_a_row_add_up_to_the_time_since_the_last(tmp_path):
    hand = Hand()
    clock = Clock(hand)
    log, told = Log(tmp_path, 0, 9, YARDSTICK, clock), []
    for number in range(1, 10):
        hand.move(5.0 if number == 1 else 0.3)
        if number == 1:
            log.start_clock()
        with clock.part('data'):
            hand.move(0.1)
        with clock.part('device'):
            hand.move(0.6)
        if number % 3 == 0:
            told.append(log.write(number, [step(1.0)] * 3))
            with clock.part('save'):
                hand.move(0.9)
    log.close(True)
    sums = [sum(row[f'{name}_seconds'] for name in Split._fields) for row in told]
    assert sums == pytest.approx([row['seconds_per_step'] for row in told])
    assert sums == pytest.approx([2.7 / 2, 1.3, 1.3])  # the first row: three waits and two steps, of which two count
    assert [row['save_seconds'] for row in told] == pytest.approx([0, 0.3, 0.3])
    assert json_lines.read_rows(tmp_path / 'metrics.jsonl') == told


def test_resuming_cuts_off_later_rows_and_half_a_line(tmp_path):
    log = Log(tmp_path, 0, 9, YARDSTICK, Clock())
    log.start_clock()
    for number in (2, 4, 6):
        log.write(number, [step(number), step(number)])
    assert log.tokens_per_second > 0 and log.padding == {'pad_fraction': 0.5} and 0 <= log.goodput.share <= 1
    log.close(False)
    path = tmp_path / 'metrics.jsonl'
    path.write_text(path.read_text() + '{"step": 7, "lo')
    log = Log(tmp_path, 4, 9, YARDSTICK, Clock())
    log.start_clock()
    log.write(5, [step(math.nan)])
    log.close(False)
    lines = path.read_text().splitlines()
    kept = [json.loads(line, parse_constant=lambda word: pytest.fail(f'{word} is not JSON')) for line in lines]
    assert [row['step'] for row in kept] == [2, 4, 5] and kept[2]['loss'] is None
    assert 'tokens_per_second' not in kept[2]  # it held the first step only, whose time does not count


def test_a_file_in_an_object_store_is_written_anew_now_and_then(tmp_path, monkeypatch):
    """A stand-in that can be read and written whole, as object stores can."""
    monkeypatch.setattr(json_lines, 'is_remote', lambda path: True)
    path, now = tmp_path / 'rows.jsonl', Hand()
    monkeypatch.setattr(json_lines.time, 'monotonic', now)
    path.write_text('{"step": 1}\n')
    lines = json_lines.JsonLines(path)
    for number, moved in ((2, 0), (3, 1), (4, json_lines.REMOTE_SECONDS), (5, 1)):
        now.move(moved)
        lines.write({'step': number})
    assert [row['step'] for row in json_lines.read_rows(path)] == [1, 2, 3, 4]
    lines.close()
    assert [row['step'] for row in json_lines.read_rows(path)] == [1, 2, 3, 4, 5]


def test_memory_is_that_of_the_fullest_device(monkeypatch):
    stats = [{'bytes_in_use': 2**30, 'peak_bytes_in_use': 3 * 2**30}, {'bytes_in_use': 2**31, 'peak_bytes_in_use': 2**31}]
    devices = [types.SimpleNamespace(memory_stats=lambda one=one: one) for one in stats]
    monkeypatch.setattr(rows.jax, 'local_devices', lambda: devices)
    assert rows.memory() == {'memory_gib': 2.0, 'peak_memory_gib': 3.0}
    monkeypatch.setattr(rows.jax, 'local_devices', lambda: [types.SimpleNamespace(memory_stats=lambda: None)])
    assert rows.memory() == {}


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics.jax, 'process_index', lambda: 1)
    log = Log(tmp_path, 0, 9, YARDSTICK, Clock())
    log.start_clock()
    assert log.write(2, [step(1.0)] * 2)['loss'] == 1.0
    assert log.goodput is None and log.close(True) is None and not list(tmp_path.iterdir())


def test_tensorboard_holds_every_value(tmp_path):
    reader = pytest.importorskip('tensorboard.backend.event_processing.event_file_loader', reason='needs tensorboard')
    log = Log(tmp_path, 0, 4, YARDSTICK, Clock())
    log.start_clock()
    told = dict(rows.scalars(log.write(2, [step(1.5), step(2.5)])))
    log.close(True)
    file, = (tmp_path / 'tensorboard').iterdir()
    events = list(reader.LegacyEventFileLoader(str(file)).Load())
    found = {value.tag: value.simple_value for event in events for value in event.summary.value if event.step == 2}
    assert found == pytest.approx(told, rel=1e-6) and {'distill_layers/1', 'device_seconds', 'goodput'} <= found.keys()


def test_wandb_gets_every_value_and_one_run_for_a_workdir(tmp_path, monkeypatch):
    class Run:
        def __init__(self, **settings):
            self.settings, self.rows = settings, []
            self.define_metric = lambda name, step_metric: self.rows.append((name, step_metric))
            self.log = self.rows.append
            self.url, self.dir, self.offline = 'there', 'here/files', False
            self.finish = lambda: self.rows.append('end')

    def init(**settings):
        runs.append(Run(**settings))
        return runs[-1]

    runs, fake = [], types.SimpleNamespace(Settings=dict, Error=OSError, init=init)
    monkeypatch.setitem(sys.modules, 'wandb', fake)
    monkeypatch.setattr(wandb_run.importlib.util, 'find_spec', lambda name: fake)
    for start in (0, 2):
        log = Log(tmp_path, start, 4, YARDSTICK, Clock(), project='seeing', config_text='Train.steps = 4\n# text')
        log.start_clock()
        told = log.write(start + 2, [step(1.5)] * 2)
        log.close(True)
        assert runs[-1].rows == [('*', 'step'), dict(rows.scalars(told)), 'end']
    assert runs[0].settings == runs[1].settings and runs[0].settings['project'] == 'seeing'
    assert runs[0].settings['config'] == {'Train.steps': '4'} and runs[0].settings['resume'] == 'allow'
    monkeypatch.setattr(fake, 'init', lambda **_: (_ for _ in ()).throw(OSError('no key.\nmore')))
    with pytest.raises(UserError, match=r"'seeing', but W&B does not start: no key; log in"):
        wandb_run.open_run('seeing', tmp_path, '')


def test_wandb_without_the_package_is_refused(monkeypatch):
    monkeypatch.setattr(wandb_run.importlib.util, 'find_spec', lambda name: None)
    wandb_run.raise_if_missing('')
    with pytest.raises(UserError, match=r"Train.wandb is 'seeing'.*vora_jax\[wandb\]"):
        wandb_run.raise_if_missing('seeing')
