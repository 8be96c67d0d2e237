"""A set of thousands of samples of every kind: padding, counters, and what a run reports of them."""
import dataclasses
import itertools
import json
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest
from generated_set import RULE, mixed

from vora_jax.cli import gin_config
from vora_jax.data.config import ImagePolicy
from vora_jax.data.loader import batches
from vora_jax.training import loop
from vora_jax.training.losses import counts

COUNT = 1700  # rows of each of three sources
MOST_SLOT_PADDING, MOST_PATCH_PADDING = 0.03, 0.15


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """5,100 samples: one picture (icons of 64 x 64, photographs, strips), several, none; up to 4 turns."""
    folder = tmp_path_factory.mktemp('mixed')
    return mixed(folder, COUNT, (1.0, 1.0, 1.0), 200, 140, max_slots=2048, max_patches=2048, max_images=60,
                 image=ImagePolicy(max_patches=120), cache=str(folder / 'cache'))


@pytest.fixture(scope='module')
def fitting(data):
    """The same with the budget of patches that the loader proposes."""
    loader = batches(data, RULE, 4, seed=0)
    loose, hint = loader.padding, loader.max_patches_hint
    loader.close()
    assert loose.patches > MOST_PATCH_PADDING and hint < data.max_patches
    return dataclasses.replace(data, max_patches=hint)


def test_an_epoch_of_the_mixed_set_is_full_and_counted(fitting):
    loader = batches(fitting, RULE, 1, seed=0)
    planned, slots, patches, tally = loader.padding, [], [], np.zeros((3, 3), np.int64)
    for batch in itertools.islice(loader, loader.num_rows):
        slots.append((batch.segment_id == 0).mean())
        patches.append((batch.patches.image_id < 0).mean())
        tally += batch.tally[0]
        assert batch.segment_id.max() == batch.tally[..., 0].sum()
    print(f'{loader.num_samples} samples in {loader.num_rows} rows of {fitting.max_slots} slots and {fitting.max_patches} '
          f'patches: padding {np.mean(slots):.2%} of slots, {np.mean(patches):.2%} of patches')
    loader.close()
    assert loader.num_samples >= 5000 and tally[:, :2].tolist() == [[COUNT, 0]] * 3
    np.testing.assert_allclose((np.mean(slots), np.mean(patches)), planned, atol=1e-12)
    assert planned.slots <= MOST_SLOT_PADDING and planned.patches <= MOST_PATCH_PADDING


def test_later_epochs_are_as_full(fitting):
    for seed in (1, 2):
        loader = batches(fitting, RULE, 1, seed)
        assert loader.padding.slots <= MOST_SLOT_PADDING and loader.padding.patches <= MOST_PATCH_PADDING
        loader.close()


TRAIN = {
    'Train.stage': "'pretrain'", 'Train.batch_rows': 8, 'Mesh.data': 8, 'Mesh.fsdp': 1, 'Checkpoint.every_steps': 20,
    'PatchEmbed.patch_size': 8, 'PatchEmbed.width': 12, 'PatchEmbed.table_rows': 2, 'PatchEmbed.table_cols': 2,
    'Vit.num_layers': 1, 'Vit.mlp_width': 16, 'Vit.num_heads': 2,
}
TAGGER = {'Train.method': '@image_tagger()', 'image_tagger.vocab_size': 320}  # compiles quickly
VORA = {
    'Train.method': '@vora()', 'vora.rank': 2, 'vora.num_adapted_layers': 1, 'LanguageModel.vocab_size': 320,
    'LanguageModel.num_layers': 2, 'LanguageModel.width': 16, 'LanguageModel.mlp_width': 24, 'LanguageModel.num_heads': 2,
    'LanguageModel.num_kv_heads': 1, 'LanguageModel.head_dim': 8,
}


def bindings(data, **settings):
    """The data as lines of a .gin file."""
    lines = [f'{name} = {value}' for name, value in (TRAIN | settings).items()]
    for source in data.sources:
        name = pathlib.Path(source.path).stem
        lines += [f'{name}/Source.{field} = {value!r}' for field, value in dataclasses.asdict(source).items()]
    lines.append(f'Data.sources = ({", ".join(f"@{pathlib.Path(source.path).stem}/Source()" for source in data.sources)},)')
    fields = 'tokenizer', 'max_slots', 'max_patches', 'max_images', 'cache', 'max_bad_fraction'
    lines += [f'Data.{field} = {getattr(data, field)!r}' for field in fields]
    return '\n'.join([*lines, f'ImagePolicy.max_patches = {data.image.max_patches}', ''])


def train(data, workdir, **settings):
    def parse(text):
        return gin_config.load('Train', texts=[text])[0]

    config, text = gin_config.load('Train', texts=[bindings(data, **settings)])
    assert config.data == data
    assert loop.train(config, text, str(workdir), parse)
    rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    return json.loads((workdir / 'summary.json').read_text()), rows


def assert_reported(data, summary, rows, seed=0):
    """The run's own numbers are those of its batches."""
    steps = summary['steps']
    loader = batches(data, RULE, 8, seed)
    expected = [{name: np.asarray(value) for name, value in counts(next(loader)).items()} for _ in range(steps)]
    assert summary['epochs'] == loader.epoch(loader.get_state())
    names = loader.source_names
    loader.close()
    for name in ('pad_fraction', 'patch_pad_fraction'):
        np.testing.assert_allclose(summary[name], np.mean([step[name] for step in expected]), rtol=1e-5)
        sizes = np.diff([0, *(row['step'] for row in rows)])
        np.testing.assert_allclose(summary[name], np.average([row[name] for row in rows], weights=sizes), rtol=1e-5)
    for name in ('num_samples', 'bad_samples'):
        assert summary[name] == sum(row[name] for row in rows) == sum(int(step[name]) for step in expected)
    for name in ('good_samples_by_source', 'bad_samples_by_source', 'dropped_turns_by_source'):
        totals = np.sum([row[name] for row in rows], 0).tolist()
        assert summary[name] == dict(zip(names, totals)) and totals == np.sum([step[name] for step in expected], 0).tolist()
    kinds = (summary['good_samples_by_source'], summary['bad_samples_by_source'])
    assert sum(sum(kind.values()) for kind in kinds) == summary['num_samples']


def test_a_run_reports_padding_and_sources(tmp_path):
    data = mixed(tmp_path / 'set', 24, (1.0, 0.5, 2.0), most=50, cache=str(tmp_path / 'cache'))
    rows = pathlib.Path(data.sources[0].path)
    rows.write_text(rows.read_text().replace('"frames"', '"image"', 1).replace('"conversations"', '"conversation"', 1))
    data = dataclasses.replace(data, max_bad_fraction=0.05, max_slots=160)
    summary, logged = train(data, tmp_path / 'run', **TAGGER, **{'Train.steps': 8, 'Train.log_every': 3})
    assert_reported(data, summary, logged)
    assert summary['bad_samples_by_source']['one.jsonl'] > 0 == summary['bad_samples_by_source']['none.jsonl']
    assert sum(summary['dropped_turns_by_source'].values()) > 0 and list(summary['good_samples_by_source']) == [
        'one.jsonl', 'several.jsonl', 'none.jsonl']


@pytest.mark.slow
def test_a_run_of_an_epoch_of_the_mixed_set(fitting, tmp_path):
    loader = batches(fitting, RULE, 8, seed=0)
    steps = -(-loader.num_rows // 8)
    loader.close()
    start = time.perf_counter()
    summary, logged = train(fitting, tmp_path, **VORA, **{'Train.steps': steps, 'Train.log_every': 7})
    print(f'{steps} steps in {time.perf_counter() - start:.0f} s: {summary}')
    assert_reported(fitting, summary, logged)
    assert summary['num_samples'] >= 3 * COUNT and summary['bad_samples'] == 0
    assert summary['pad_fraction'] <= MOST_SLOT_PADDING and summary['patch_pad_fraction'] <= MOST_PATCH_PADDING


PLAN = r"""
import pathlib, re, sys, time
import numpy as np
from vora_jax.data import lengths
from vora_jax.data.epochs import Epochs
from vora_jax.data.packing import Budgets

def megabytes():
    return int(re.search(r'VmHWM:\s*(\d+) kB', pathlib.Path('/proc/self/status').read_text())[1]) / 1024  # the most so far

folder, count, before = pathlib.Path(sys.argv[1]), 2_000_000, megabytes()
budgets = Budgets(4096, 2904, 32, 588)
if sys.argv[2] == 'fit':
    rng = np.random.default_rng(0)
    sizes, kind = np.zeros((count, 3), np.int32), rng.random(count)
    sizes[:, 1] = np.where(kind < 0.8, rng.lognormal(5.5, 0.7, count).clip(16, 1024), 0)
    sizes[:, 2] = sizes[:, 1] > 0
    sizes[:, 0] = sizes[:, 1] + rng.lognormal(4.5, 0.8, count).clip(1, 3000) + 10
    np.save(folder / 'lengths.npy', lengths.fit(lengths.Lengths(np.arange(count + 1), sizes, {}), budgets))
else:
    epochs, start = Epochs(folder, [count], [1.0], budgets, 0, True), time.perf_counter()
    padding = epochs.padding()
    print(time.perf_counter() - start, time.process_time(), megabytes(), megabytes() - before, *padding)
    start, rows = time.perf_counter(), range(0, epochs.num_rows(0), 7)
    assert sum(len(epochs[row]) for row in rows) > 100
    print((time.perf_counter() - start) / len(rows))
"""


@pytest.mark.slow
def test_a_plan_for_two_million_samples(tmp_path):
    def run(what):
        command = [sys.executable, '-c', PLAN, str(tmp_path), what]
        result = subprocess.run(command, capture_output=True, text=True, timeout=400)
        assert result.returncode == 0, result.stderr
        return [[float(number) for number in line.split()] for line in result.stdout.splitlines()]

    run('fit')
    (seconds, cpu, peak, grown, slots, patches), (row,) = run('plan')
    print(f'plan: {seconds:.1f} s ({cpu:.1f} s of CPU), peak {peak:.0f} MB ({grown:.0f} MB more than before), padding '
          f'{slots:.2%} of slots, {patches:.2%} of patches; {row * 1e6:.0f} us a row afterwards')
    assert cpu <= 60 and peak <= 500 and slots <= MOST_SLOT_PADDING and row < 1e-3
