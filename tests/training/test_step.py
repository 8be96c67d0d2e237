"""Gradients, accumulation, freezing, meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_run

from vora_jax.params import flatten


def host(tree):
    return {path: np.asarray(leaf) for path, leaf in flatten(tree).items()}


@pytest.fixture(scope='module')
def pretrain():
    """(state, frozen, step) of the pretraining stage, compiled once; a step takes a copy of the state."""
    stage = tiny_run.vora(dropout=0.5).stage('pretrain')
    _, state, frozen, step = tiny_run.start(stage, tiny_run.batch())
    return state, frozen, lambda batch, now=state: step(jax.tree.map(jnp.copy, now), frozen, batch)


def test_frozen_leaves_have_no_state_and_do_not_change(pretrain):
    state, frozen, step = pretrain
    trainable, before = host(state.trainable), host(frozen)
    assert trainable.keys().isdisjoint(before) and any(path.startswith('teacher/') for path in before)
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert sum(leaf.size for leaf in moments) == 2 * sum(leaf.size for leaf in trainable.values())
    state, _ = step(tiny_run.batch(2))
    after = host(state.trainable)
    assert all((after[path] != trainable[path]).any() for path in after)
    assert all((value == before[path]).all() for path, value in host(frozen).items())
    assert int(state.step) == 1


def test_a_batch_without_pictures_has_no_distillation_loss_and_no_nan(pretrain):
    batch = tiny_run.batch(3)
    patches = jax.tree.map(np.zeros_like, batch.patches)
    patches = patches._replace(
        **{name: np.full_like(getattr(patches, name), -1) for name in ('row', 'col', 'image_id')}
    )
    text = tiny_run.batch(3, text_only=True)
    empty = np.full_like(batch.vision_slot, -1)
    batch = text._replace(patches=patches, vision_slot=empty, vision_source=np.zeros_like(empty))
    state, metrics = pretrain[2](batch)
    assert metrics['distill_loss'] == 0 and metrics['num_vision_tokens'] == 0
    assert metrics['distill_layers'].shape == (2,)
    assert np.isfinite(metrics['loss']) and metrics['loss'] == metrics['lm_loss']
    assert all(np.isfinite(leaf).all() for leaf in host(state.trainable).values())


def test_metrics_count_what_the_batch_holds(pretrain):
    batch = tiny_run.batch(4)
    _, metrics = pretrain[2](batch)
    assert metrics['num_vision_tokens'] == (batch.modality == 2).sum()
    assert metrics['num_text_tokens'] == (batch.modality == 1).sum()
    assert metrics['num_target_tokens'] == (batch.loss_mask > 0).sum()
    assert metrics['num_samples'] == batch.segment_id.max(axis=1).sum()
    np.testing.assert_allclose(metrics['pad_fraction'], (batch.segment_id == 0).mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics['loss'], metrics['lm_loss'] + metrics['distill_loss'], rtol=1e-6)
    np.testing.assert_allclose(metrics['distill_layers'].mean(), metrics['distill_loss'], rtol=1e-6)


def test_dropout_differs_between_steps_and_repeats_for_a_step(pretrain):
    state, _, step = pretrain
    later = state._replace(step=state.step + 1)
    losses = [float(step(tiny_run.batch(5), now)[1]['loss']) for now in (state, later, state, later)]
    assert losses[:2] == losses[2:] and losses[0] != losses[1]


def run_two_steps(sizes, accumulation=1):
    """(metrics, parameters) before and after two steps of plain gradient descent: they show the gradients."""
    batch = tiny_run.batch(6)
    # Uneven masks: some rows have many targets, most have none at all.
    mask = batch.loss_mask * (np.arange(8) % 3 == 0)[:, None]
    batch = batch._replace(loss_mask=mask.astype(np.float32))
    stage = tiny_run.vora().stage('pretrain')
    _, state, frozen, step = tiny_run.start(stage, batch, sizes, accumulation, optimizer=optax.sgd(1.0))
    steps = [({}, host(state.trainable))]
    for _ in range(2):
        state, metrics = step(state, frozen, batch)
        steps.append((jax.device_get(metrics), host(state.trainable)))
    return steps


@pytest.fixture(scope='module')
def on_one_device():
    return run_two_steps((1, 1, 1))


def test_accumulation_gives_the_gradient_of_the_whole_batch(on_one_device):
    steps = run_two_steps((1, 1, 1), accumulation=4)
    before = steps[0][1]
    after = steps[1][1], on_one_device[1][1]
    gradients, expected = ({path: now[path] - before[path] for path in before} for now in after)
    assert any(np.abs(gradient).max() > 1e-3 for gradient in expected.values())
    for path, gradient in gradients.items():
        np.testing.assert_allclose(gradient, expected[path], atol=1e-6, err_msg=path)
    for name, value in steps[1][0].items():
        np.testing.assert_allclose(value, on_one_device[1][0][name], rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize('sizes', [
    (8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 2, 2),
    *(pytest.param(sizes, marks=pytest.mark.slow) for sizes in ((1, 1, 1, 2), (1, 1, 1, 4)))], ids=str)
def test_every_mesh_gives_the_same_losses(sizes, on_one_device):
    for (metrics, params), (expected, whole) in zip(run_two_steps(sizes), on_one_device, strict=True):
        for name, value in expected.items():
            np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-5, err_msg=name)
        for path, value in whole.items():
            np.testing.assert_allclose(params[path], value, atol=1e-5, err_msg=path)
