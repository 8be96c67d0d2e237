"""Every configuration file builds and takes a step at debug size."""
import functools
import os
import pathlib
import re

import jax
import numpy as np
import pytest
from tiny_model import quick_jit

from vora_jax.cli import gin_config
from vora_jax.data.packing import Budgets, Picture, Text, layout, stack
from vora_jax.training import state as state_lib
from vora_jax.training.config import Mesh, validate
from vora_jax.training.mesh import sharding
from vora_jax.training.optimizer import multipliers, schedule
from vora_jax.training.step import make_step

CONFIGS = pathlib.Path(__file__).parent.parent / 'configs'

# Widths of a model that computes in no time. Layers stay as many as they are: which of them are tapped, adapted and
# distilled is then the file's own, and a scan over 24 layers compiles as quickly as one over 2.
SMALL = {
    'LanguageModel.vocab_size': 61, 'LanguageModel.width': 8, 'LanguageModel.mlp_width': 8, 'LanguageModel.num_heads': 2,
    'LanguageModel.num_kv_heads': 1, 'LanguageModel.head_dim': 4, 'Vit.mlp_width': 8, 'Vit.num_heads': 2,
    'PatchEmbed.width': 8, 'PatchEmbed.patch_size': 2, 'PatchEmbed.table_rows': 2, 'PatchEmbed.table_cols': 2,
    'Projector.hidden_width': 4, 'CueEnhancer.num_heads': 2, 'CueEnhancer.num_points': 2, 'LowRank.rank': 2,
    'DualLowRank.rank': 2, 'vora.rank': 2, 'image_tagger.vocab_size': 61,
}


def includes(path):
    return [path.parent / name for name in re.findall(r"^include '([^']*)'", path.read_text(), re.MULTILINE)]


def written(path):
    """The text of a file and of those that it includes."""
    return path.read_text() + ''.join(map(written, includes(path)))


FILES = {str(path.relative_to(CONFIGS)): path for path in sorted(CONFIGS.rglob('*.gin'))}
STAGES = [name for name, path in FILES.items() if 'Train.stage' in written(path)]
PODS = [name for name in FILES if name.startswith('pods/')]  # added to the file of a stage


@functools.cache
def load(name, *bindings):
    return gin_config.load('Train', [str(FILES[name])], list(bindings))


def small(name):
    """The bindings of `SMALL` that this configuration has."""
    used = {line.split(' = ')[0].rpartition('/')[2] for line in load(name)[1].splitlines()}
    return [f'{key}={value}' for key, value in SMALL.items() if key in used]


def quickly(names):
    """The debug files, and one file of each method's stage that has none: what compiles in every run of the tests."""
    chosen = {}
    for name in sorted(names, key=lambda name: not name.endswith('debug.gin')):
        config, _ = load(name)
        chosen.setdefault((config.method.name, config.stage), name)
    return {*chosen.values(), *(name for name in names if name.endswith('debug.gin'))}


QUICK = quickly(STAGES)


def test_every_method_has_its_stages():
    assert {'vora/pretrain_7b.gin', 'vora/finetune_7b.gin', 'llava/pretrain_7b.gin', 'llava/finetune_7b.gin',
            'llava/lora_7b.gin', 'lavin/science_qa_7b.gin', 'lavin/science_qa_13b.gin', 'lavin/chat_13b.gin',
            'llavit/pretrain_7b.gin', 'llavit/finetune_7b.gin', 'vce_dual_lora/pretrain_7b.gin',
            'vce_dual_lora/finetune_7b.gin'} <= set(STAGES)
    assert sum(name.endswith('debug.gin') for name in STAGES) == 7


def test_no_file_is_left_over():
    included = {os.path.normpath(part) for path in FILES.values() for part in includes(path)}
    evaluations = {name for name, path in FILES.items() if 'Eval.' in path.read_text()}
    assert {name for name, path in FILES.items() if str(path) not in included} <= {*STAGES, *evaluations, *PODS}


@pytest.mark.parametrize('pod', PODS)
def test_stages_fit_a_pod(pod):
    """64 devices, for all batches but those of 32 rows."""
    for name in STAGES:
        if '7b' in name and not name.startswith('lavin'):
            config = gin_config.load('Train', [str(CONFIGS / name), str(CONFIGS / pod)])[0]
            assert config.mesh.data * config.mesh.fsdp == 64 and config.batch_rows % (64 * config.accumulation) == 0
            assert config.method.stage(config.stage).model.llm.remat != 'none'


@pytest.mark.parametrize('name', STAGES)
def test_file_is_a_valid_run_and_its_resolved_text_is_the_same(name):
    config, resolved = load(name)
    validate(config)
    assert gin_config.load('Train', texts=[resolved])[0] == config
    rule, policy = config.method.vision_tokens, config.data.image_policy
    if rule is not None and policy.kind != 'native':  # a picture fits a row
        side = policy.side // rule.patch_size
        assert policy.side % rule.patch_size == 0 and config.data.max_images == 1
        assert rule.num_places(side, side) == config.data.max_patches
        assert rule.num_tokens(side, side) < config.data.max_slots


# {file: (optimizer steps, samples a step, warm-up steps, weight decay, clipping, {parameter of a group: peak rate})}, the
# papers' (and where they are silent our) numbers. One sample a row, so rows are samples.
PROJECTOR, HEAD = 'frontend/projector_0/kernel', 'decoder/lm_head'
ADAPTER, ENHANCER = 'decoder/layers/group_0/q_proj/adapter_0/a', 'frontend/enhancer/out_proj/kernel'
RECIPES = {
    'vora/pretrain_7b.gin': (143360, 256, 100, 0.0, 0.0, {ADAPTER: 2e-4, 'frontend/patch_embed/kernel': 2e-4}),
    'vora/finetune_7b.gin': (5198, 128, 20, 0.0, 0.0, {HEAD: 2e-5, 'frontend/patch_embed/kernel': 2e-5}),
    'llava/pretrain_7b.gin': (2180, 256, 66, 0.0, 1.0, {PROJECTOR: 1e-3}),
    'llava/finetune_7b.gin': (5198, 128, 156, 0.0, 1.0, {PROJECTOR: 2e-5, HEAD: 2e-5}),
    'llava/lora_7b.gin': (5198, 128, 156, 0.0, 1.0, {PROJECTOR: 2e-5, ADAPTER: 2e-4}),
    'lavin/science_qa_7b.gin': (7940, 32, 794, 0.02, 0.0, {PROJECTOR: 1.125e-3, 'modality_embedding': 1.125e-3}),
    'lavin/science_qa_13b.gin': (7940, 32, 794, 0.02, 0.0, {PROJECTOR: 1.125e-3, 'modality_embedding': 1.125e-3}),
    'lavin/chat_13b.gin': (98430, 32, 1312, 0.02, 0.0, {PROJECTOR: 1.125e-3, 'modality_embedding': 1.125e-3}),
    'llavit/pretrain_7b.gin': (2735, 256, 83, 0.0, 1.0, {PROJECTOR: 1e-3, ADAPTER: 5e-5}),
    'llavit/finetune_7b.gin': (5198, 128, 156, 0.0, 1.0, {PROJECTOR: 2e-5, HEAD: 2e-5, ADAPTER: 2e-5}),
    'vce_dual_lora/pretrain_7b.gin': (1954, 256, 59, 0.0, 1.0, {PROJECTOR: 1e-3, ENHANCER: 1e-3}),
    'vce_dual_lora/finetune_7b.gin': (3907, 128, 118, 0.0, 1.0, {PROJECTOR: 2e-5, ENHANCER: 2e-5, ADAPTER: 2e-4}),
    'hybrids/kernels_on_patches_7b.gin': (143360, 256, 100, 0.0, 0.0, {ADAPTER: 5e-5, 'frontend/patch_embed/kernel': 2e-4}),
    'hybrids/kernels_on_patches_finetune_7b.gin': (5198, 128, 20, 0.0, 0.0, {HEAD: 2e-5, ADAPTER: 2e-5}),
    'hybrids/dual_lora_on_llava_7b.gin': (5198, 128, 156, 0.0, 1.0, {PROJECTOR: 2e-5, ADAPTER: 2e-4}),
}


@pytest.mark.parametrize('name', [name for name in STAGES if re.search(r'_\d+b\.gin$', name)])
def test_recipe(name):
    config, _ = load(name)
    optimizer, (steps, samples, warmup, decay, clip, rates) = config.optimizer, RECIPES[name]
    assert (config.steps, config.batch_rows, config.data.pack) == (steps, samples, False)
    assert (optimizer.warmup_steps, optimizer.weight_decay, optimizer.clip_norm) == (warmup, decay, clip)
    assert optimizer.schedule == 'constant' or optimizer.decay_steps == steps
    factors = multipliers(optimizer.lr_multipliers, list(rates))
    assert {path: optimizer.learning_rate * factor for path, factor in factors.items()} == pytest.approx(rates, rel=1e-12)
    rate = schedule(optimizer)
    assert rate(0) == 0 and rate(warmup) == pytest.approx(optimizer.learning_rate, rel=1e-6)
    assert rate(steps) == pytest.approx(optimizer.learning_rate if optimizer.schedule == 'constant' else 0.0, abs=1e-12)
    assert (config.frozen_dtype, config.optimizer.b1, config.optimizer.eps) == ('bfloat16', 0.9, 1e-8)
    assert optimizer.b2 == (0.95 if config.method.name == 'lavin' else 0.999)


@pytest.mark.parametrize('name', [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in STAGES])
def test_stage_takes_a_step_at_debug_size(name):
    config, _ = load(name, *small(name))
    rule = config.method.vision_tokens
    batch = seen_and_answered(rule, 2 * config.accumulation)
    step, plan = make(config, batch)
    nothing = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), plan.state)
    state, frozen = nothing._replace(trainable=fill(plan.state.trainable)), fill(plan.frozen)
    after = state
    for _ in range(2):  # the first step of a warm-up may have a rate of 0
        after, metrics = step(after, frozen, jax.tree.map(jax.numpy.asarray, batch))
        assert np.isfinite(metrics['loss']) and metrics['loss'] > 0
    assert any((np.asarray(new) != old).any() for new, old in
               zip(jax.tree.leaves(after.trainable), jax.tree.leaves(state.trainable), strict=True))


def seen_and_answered(rule, rows):
    """A batch with an answer behind a picture in every row, so that what only pictures train has a gradient."""
    words, answer = Text([1, 2, 3]), Text([4, 5, 6], supervised=True)
    if rule is None:
        return stack([layout([[words, answer]], Budgets(24))] * rows)
    budgets = Budgets(24, 12, 2, 3 * rule.patch_size**2)
    rng = np.random.default_rng(0)
    picture = Picture(rng.integers(0, 256, (6, budgets.patch_dim)).astype(np.uint8), 2, 3)
    return stack([layout([[words, picture, answer], [words, answer]], budgets, rule=rule)] * rows)


def make(config, batch):
    """(compiled on call: the step, its plan) on one device."""
    stage, mesh = config.method.stage(config.stage), sharding.make_mesh(Mesh(), devices=jax.devices()[:1])
    with sharding.use(mesh):
        plan = state_lib.plan(stage, config.optimizer, batch, mesh, config.frozen_dtype)
    step = make_step(plan.model, plan.optimizer, schedule(config.optimizer), stage.distill_weight, config.accumulation,
                     config.seed)
    return quick_jit(step), plan


def fill(tree):
    """Small random numbers in place of shapes."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: rng.normal(0, 0.1, s.shape).astype(s.dtype), tree)
