"""What a run tells of its time, and what it traces."""

import json

import pytest
import tiny_run

from vora_jax.cli import gin_config
from vora_jax.training import loop
from vora_jax.training.checkpoints.checksum import SIDECAR
from vora_jax.training.flops import chips
from vora_jax.training.log import json_lines, yardstick
from vora_jax.training.log.clock import Split


def run(gin_file, workdir, *bindings):
    config, text = gin_config.load('Train', [str(gin_file)], bindings)
    return loop.train(config, text, str(workdir), lambda text: gin_config.load('Train', texts=[text])[0])


def test_time_goodput_and_a_trace_of_a_run_that_repeats_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(yardstick, 'chip_of', lambda kind: chips.CHIPS[0])  # a CPU has no peak
    gin_file, workdir = tiny_run.write_text_run(tmp_path, **{'Train.batch_rows': 8}), tmp_path / 'run'
    assert run(gin_file, workdir, 'Train.steps=10', 'Train.profile_steps=(3, 4)', 'Mesh.data=8', 'Mesh.fsdp=1')
    assert len(list((workdir / 'profile').rglob('*.xplane.pb'))) == 1
    rows = json_lines.read_rows(workdir / 'metrics.jsonl')
    assert [row['num_timed_steps'] for row in rows] == [4, 5]  # the first step compiles
    for row in rows:
        parts = [row[f'{name}_seconds'] for name in Split._fields]
        assert min(parts) >= 0 and sum(parts) == pytest.approx(row['seconds_per_step'])
        assert 0 < row['mfu'] < row['hfu'] < 1e-3
        assert row['tokens_per_second'] == pytest.approx(8 * row['text_tokens_per_second_per_chip'])
    last = rows[1]['seconds_per_step'] * 5
    before = json.loads((workdir / 'summary.json').read_text())
    assert 0 < before['goodput'] < 1 and before['lost_seconds']['start'] > 0 == before['lost_seconds']['repeated']

    # The last checkpoint is damaged: the run goes on from step 5, and the steps until 10 were in vain.
    (workdir / 'steps' / '10' / SIDECAR).write_text('{"trainable/manifest.ocdbt": "0"}')
    assert run(gin_file, workdir, 'Train.steps=10', 'Mesh.data=8', 'Mesh.fsdp=1')
    after = json.loads((workdir / 'summary.json').read_text())
    assert after['lost_seconds']['repeated'] == pytest.approx(last)
    assert after['wall_seconds'] > before['wall_seconds']
    productive, lost = after['goodput'] * after['wall_seconds'], sum(after['lost_seconds'].values())
    assert productive + lost == pytest.approx(after['wall_seconds'])
