"""Every configuration file builds and takes a step at debug size."""
import pathlib

import jax
import numpy as np
import pytest

from vora_jax.cli import gin_config
from vora_jax.data.fake import fake_batch
from vora_jax.training import sharding
from vora_jax.training import state as state_lib
from vora_jax.training.config import Mesh, validate
from vora_jax.training.optimizer import schedule
from vora_jax.training.step import compile_step, make_step

CONFIGS = pathlib.Path(__file__).parent.parent / 'configs'
STAGES = sorted(path for path in CONFIGS.rglob('*.gin') if 'Train.stage' in path.read_text())
SMALL_LANGUAGE = ('LanguageModel.width=16', 'LanguageModel.mlp_width=24', 'LanguageModel.head_dim=8')
SMALL_VISION = ('PatchEmbed.width=8', 'PatchEmbed.patch_size=2', 'Vit.mlp_width=12')


def test_there_are_stages():
    assert len(STAGES) >= 4


@pytest.mark.parametrize('path', STAGES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_stage_takes_a_step(path):
    text = path.read_text()
    small = SMALL_LANGUAGE * ('language.gin' in text) + SMALL_VISION * ('vision.gin' in text)
    config, resolved = gin_config.load('Train', [str(path)], list(small))
    assert gin_config.load('Train', texts=[resolved])[0] == config
    validate(config)
    stage, rule = config.method.stage(config.stage), config.method.vision_tokens
    batch = fake_batch(rows=2, slots=24, patches=12, patch_size=rule.patch_size if rule else 2, vocab_size=448,
                       max_images=config.data.max_images, seed=0, text_only=rule is None)
    mesh = sharding.make_mesh(Mesh(), devices=jax.devices()[:1])
    with sharding.use(mesh):
        plan = state_lib.plan(stage, config.optimizer, batch, mesh, config.frozen_dtype)
        state, frozen = state_lib.create(plan, config.seed, {})
        before = jax.tree.map(np.asarray, state.trainable)
        step = compile_step(make_step(plan.model, plan.optimizer, schedule(config.optimizer), stage.distill_weight,
                                      config.accumulation, config.seed),
                            plan.state_shardings, plan.frozen_shardings, mesh)
        for _ in range(2):  # the first step of a warm-up has a learning rate of 0
            state, metrics = step(state, frozen, jax.tree.map(jax.numpy.asarray, batch))
    assert np.isfinite(metrics['loss'])
    assert any((np.asarray(new) != old).any() for new, old in
               zip(jax.tree.leaves(state.trainable), jax.tree.leaves(before), strict=True))
