"""Runs on disk: resume, refusal, damage, bad samples."""

import json
import logging
import pathlib

import numpy as np
import pytest
import tiny_run

from vora_jax.cli import gin_config
from vora_jax.params import flatten
from vora_jax.training import loop
from vora_jax.training.checkpoints.checkpoint import open_checkpoint
from vora_jax.training.checkpoints.checksum import SIDECAR
from vora_jax.types import TryAgain, UserError


@pytest.fixture(autouse=True)
def told(caplog):
    caplog.set_level(logging.INFO, 'vora_jax')
    return caplog


@pytest.fixture(scope='module')
def gin_file(tmp_path_factory):
    return tiny_run.write_text_run(
        tmp_path_factory.mktemp('run'), **{'Train.batch_rows': 8, 'Mesh.data': 8, 'Mesh.fsdp': 1}
    )


def run(gin_file: pathlib.Path, workdir: pathlib.Path, *bindings: str) -> bool:
    config, text = gin_config.load('Train', [str(gin_file)], bindings)
    return loop.train(config, text, str(workdir), lambda text: gin_config.load('Train', texts=[text])[0]) == 'complete'


@pytest.fixture(scope='module')
def whole(gin_file, tmp_path_factory):
    """The workdir of an uninterrupted run of 10 steps."""
    workdir = tmp_path_factory.mktemp('whole')
    assert run(gin_file, workdir, 'Train.steps=10')
    return workdir


def same_parameters(a: pathlib.Path, b: pathlib.Path) -> bool:
    left, right = (flatten(open_checkpoint(path).params) for path in (a, b))
    return left.keys() == right.keys() and all(np.array_equal(left[path], right[path]) for path in left)


def test_a_run_leaves_what_the_others_need(gin_file, whole, told):
    opened = open_checkpoint(whole)
    assert opened.step == 10 and (pathlib.Path(opened.tokenizer_dir) / 'tokenizer.model').exists()
    assert gin_config.load('Train', texts=[opened.config_text])[0].steps == 10
    assert (whole / 'config.gin').read_text() == opened.config_text
    summary = json.loads((whole / 'summary.json').read_text())
    assert summary['steps'] == 10 and summary['trainable_params'] == summary['total_params'] > 0
    assert summary['tokens_per_second'] > 0 and 0 <= summary['pad_fraction'] < 1 and summary['seconds'] > 0
    rows = [json.loads(line) for line in (whole / 'metrics.jsonl').read_text().splitlines()]
    assert [row['step'] for row in rows] == [5, 10] and rows[1]['loss'] < rows[0]['loss']
    assert run(gin_file, whole, 'Train.steps=10') and 'is complete' in told.text


def test_more_steps_later_equal_more_steps_at_once(gin_file, whole, tmp_path, told):
    assert run(gin_file, tmp_path, 'Train.steps=5')
    assert 'attention: reference (64 keys are one tile)' in told.text
    assert run(gin_file, tmp_path, 'Train.steps=10', 'Train.log_every=3', "Train.attention='reference'")
    assert same_parameters(tmp_path, whole)
    assert 'changed since the last checkpoint: Train.steps from 5 to 10' in told.text
    assert "Train.attention from 'auto' to 'reference'" in told.text and 'attention: reference (asked for)' in told.text


def test_attention_that_the_devices_cannot_do_is_refused(gin_file, tmp_path):
    with pytest.raises(UserError, match="Train.attention = 'pallas_tpu': .* platform cpu"):
        run(gin_file, tmp_path, "Train.attention='pallas_tpu'")


def test_damage_falls_back_and_training_repeats_the_steps(gin_file, whole, tmp_path, told):
    assert run(gin_file, tmp_path, 'Train.steps=10')
    (tmp_path / 'steps' / '10' / SIDECAR).write_text('{"trainable/manifest.ocdbt": "0"}')
    assert run(gin_file, tmp_path, 'Train.steps=10')
    assert 'DAMAGED' in told.text and 'after step 5 of 10' in told.text
    assert same_parameters(tmp_path, whole)


def test_frozen_weights_are_written_once_and_found_again(gin_file, tmp_path):
    """A method with frozen weights, held in bf16, resumed after each step."""
    settings = {
        'Train.frozen_dtype': "'bfloat16'",
        'PatchEmbed.patch_size': 4,
        'PatchEmbed.width': 8,
        'Vit.num_layers': 1,
        'Vit.num_heads': 2,
        'Vit.mlp_width': 8,
        'vora.rank': 2,
        'vora.targets': ('q_proj',),
        'vora.num_adapted_layers': 1,
        'Data.max_patches': 4,
    }
    vora = gin_file.with_name('vora.gin')
    text = gin_file.read_text().replace('@language_model()', '@vora()')
    text = text.replace('LanguageModel.num_layers = 2', 'LanguageModel.num_layers = 1')  # compiles in half the time
    vora.write_text(text + ''.join(f'{name} = {value}\n' for name, value in settings.items()))
    for steps in (1, 2):
        assert run(vora, tmp_path / 'broken', f'Train.steps={steps}')
    assert run(vora, tmp_path / 'whole', 'Train.steps=2')
    assert same_parameters(tmp_path / 'broken', tmp_path / 'whole')
    assert len(list((tmp_path / 'broken' / 'frozen').iterdir())) == 1
    flat = flatten(open_checkpoint(tmp_path / 'whole').params)
    assert {str(leaf.dtype) for path, leaf in flat.items() if '/adapter_' in path} == {'float32'}
    assert flat['decoder/embedding'].dtype == 'bfloat16'


@pytest.mark.parametrize(
    'binding, words',
    [
        ('Train.seed=1', 'Train.seed was 0 there and is 1 now'),
        ('LanguageModel.width=32', r'LanguageModel\.width was 16 there and is 32 now'),
        ('Optimizer.learning_rate=0.5', r'Optimizer\.learning_rate was 0\.01'),
        ('Train.batch_rows=12', '12 rows, which the 8 devices'),
    ],
)
def test_another_run_is_refused(gin_file, whole, binding, words):
    with pytest.raises(UserError, match=words):
        run(gin_file, whole, 'Train.steps=20', binding)


def test_other_data_is_refused_although_paths_may_move(gin_file, whole, tmp_path):
    moved = tmp_path / 'moved.jsonl'
    moved.write_text('\n'.join(json.dumps(row) for row in tiny_run.questions()[::-1]))
    with pytest.raises(UserError, match=r'sources\[0\].path was .* content of samples or tokenizer is not'):
        run(gin_file, whole, 'Train.steps=20', f'Source.path={str(moved)!r}')


def test_a_merged_checkpoint_is_not_trained_in_place(gin_file, whole, tmp_path):
    from vora_jax.training.checkpoints.checkpoint import write_checkpoint

    opened = open_checkpoint(whole)
    merged = tmp_path / 'merged'
    write_checkpoint(merged, opened.params, opened.config_text, opened.tokenizer_dir)
    with pytest.raises(UserError, match='result of merge.*--init-from'):
        run(gin_file, merged)
    assert run(
        gin_file,
        tmp_path / 'next',
        'Train.steps=1',
        f'Train.init_from=({str(merged)!r},)',
        'Optimizer.learning_rate=0',
    )
    assert same_parameters(tmp_path / 'next', whole)


def test_trouble_in_the_data_stops_after_saving(gin_file, tmp_path, monkeypatch):
    real = loop.open_data

    def breaking(*args):
        loader, start = real(*args), iter(range(4))
        step = type(loader).__next__

        def read(self):
            if next(start, None) is None:
                raise UserError('rows.jsonl row 7 cannot be read; repair it.')
            return step(self)

        monkeypatch.setattr(type(loader), '__next__', read)
        return loader

    monkeypatch.setattr(loop, 'open_data', breaking)
    with pytest.raises(UserError, match='row 7 cannot be read; repair it. Step 4 is saved'):
        run(gin_file, tmp_path)
    assert open_checkpoint(tmp_path).metadata.data == {'global_next_index': 32}


def test_processes_meet_before_they_compute_together(gin_file, tmp_path, monkeypatch):
    """What takes unlike times comes before a meeting, what needs all processes after it."""
    order = []

    def noted(module, name):
        real = getattr(module, name)

        def call(*args):
            order.append(args[0] if name == '_meet' else name)
            return real(*args)

        monkeypatch.setattr(module, name, call)

    for name in ('open_mesh', 'watching', 'open_data', '_meet', 'build', 'write_summary'):
        noted(loop, name)
    noted(loop.init_from, 'take')
    noted(loop.state_lib, 'create')
    noted(loop.Writer, 'save_frozen')
    noted(loop.guard.Streak, 'read')
    assert run(gin_file, tmp_path, 'Train.steps=1')
    assert order == ['open_mesh', 'watching', 'open_data', 'the data', 'build', 'take', 'the weights', 'create',
                     'save_frozen', 'the compiled step', 'read', 'write_summary', 'the end']


def test_who_does_not_come_may_be_tried_again(monkeypatch):
    monkeypatch.setattr(loop.agree, 'collect', lambda *_: [])
    monkeypatch.setattr(loop.agree, 'announce', lambda *_: (_ for _ in ()).throw(TimeoutError('process 0 told nothing')))
    with pytest.raises(TryAgain, match='process 0 told nothing; run the same command'):
        loop._meet('the data')


def test_a_complete_run_is_not_judged_by_its_bad_samples(gin_file, tmp_path, monkeypatch, told):
    monkeypatch.setattr(loop, '_too_many_bad', lambda record, *_: UserError(f'{record.step} bad.'))
    assert run(gin_file, tmp_path, 'Train.steps=1', 'Train.log_every=1')
    assert '1 bad.' in told.text and (tmp_path / 'summary.json').exists()
    with pytest.raises(UserError, match='2 bad. Step 2 is saved'):
        run(gin_file, tmp_path, 'Train.steps=3', 'Train.log_every=1')


def test_too_many_bad_samples():
    begin, record = loop.Record(0, ''), loop.Record(1, '', num_samples=50, bad_samples=2)
    assert loop._too_many_bad(record, begin, 0.01, num_samples=1000) is None  # 2 of 50 says nothing yet
    assert '2 of 50 samples' in str(loop._too_many_bad(record, begin, 0.01, num_samples=100))
    assert loop._too_many_bad(record, record, 0.01, num_samples=100) is None  # resumed: they may be repaired
    later = loop.Record(2, '', num_samples=70, bad_samples=5)
    assert '3 of 20 samples' in str(loop._too_many_bad(later, record, 0.01, num_samples=100))
