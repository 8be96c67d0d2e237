"""Methods with something new to cut: the same loss and step on every mesh."""
import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest
import tiny_run

from vora_jax import variants
from vora_jax.data.fake import fake_batch
from vora_jax.nn.adapters import DualLowRank
from vora_jax.nn.modality_mixture import ModalityMixture
from vora_jax.params import flatten
from vora_jax.vision.cue_enhancer import CueEnhancer
from vora_jax.vision.encoder_frontend import Projector

LLM = dataclasses.replace(tiny_run.LLM, num_layers=2)
ENCODER = dataclasses.replace(tiny_run.VIT, patch_embed=dataclasses.replace(tiny_run.EMBED, cls_token=True))
# {name: (method, stage)}: kernels of vision slots, routed mixtures with [cls] tokens, sampled cues with gated ranks.
METHODS = {
    'llavit': (variants.llavit(LLM, ENCODER, Projector(), taps=(0, 1)), 'pretrain'),
    'lavin': (variants.lavin(LLM, ENCODER, Projector(activation='silu', hidden_width=6), ModalityMixture(4, dropout=0.0),
                             taps=(0, 1)), 'finetune'),
    'vce_dual_lora': (variants.vce_dual_lora(LLM, ENCODER, Projector(), CueEnhancer(2, 2), DualLowRank(4, dropout=0.0),
                                             taps=(-1, -2)), 'finetune'),
}


@functools.cache
def one_step(name, sizes):
    """(metrics, parameters after a step of plain gradient descent) on a mesh of these sizes."""
    method, stage = METHODS[name]
    batch = fake_batch(8, 32, 16, tiny_run.EMBED.patch_size, tiny_run.VOCAB, 3, 6, rule=method.vision_tokens)
    # Uneven masks: some rows have many targets, most have none at all.
    mask = batch.loss_mask * (np.arange(8) % 3 == 0)[:, None]
    batch = batch._replace(loss_mask=mask.astype(np.float32))
    _, state, frozen, step = tiny_run.start(method.stage(stage), batch, sizes, optimizer=optax.sgd(1.0))
    before = {path: np.asarray(leaf) for path, leaf in flatten(state.trainable).items()}
    state, metrics = step(state, frozen, batch)
    after = {path: np.asarray(leaf) for path, leaf in flatten(state.trainable).items()}
    assert all((after[path] != before[path]).any() for path in after), [p for p in after if (after[p] == before[p]).all()]
    return jax.device_get(metrics), after


@pytest.mark.parametrize('sizes, name', [
    # test_meshes.py has routed mixtures on other meshes.
    pytest.param(sizes, name, marks=[pytest.mark.slow] if sizes[0] == 8 or name == 'lavin' else [])
    for sizes in ((8, 1, 1), (2, 2, 2)) for name in METHODS], ids=str)
def test_every_mesh_gives_the_same_step(name, sizes):
    (metrics, params), (expected, whole) = one_step(name, sizes), one_step(name, (1, 1, 1))
    assert expected['loss'] > 0.1
    for key, value in expected.items():
        np.testing.assert_allclose(metrics[key], value, rtol=1e-5, atol=1e-5, err_msg=key)
    for path, value in whole.items():
        np.testing.assert_allclose(params[path], value, atol=1e-5, err_msg=path)
