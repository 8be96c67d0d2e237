"""Chunked cross-entropy against dense float64."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import quick_jit, strict  # noqa: F401

from vora_jax.ops.cross_entropy import cross_entropy_sum

ROWS, SLOTS, WIDTH, VOCAB = 3, 21, 6, 17


def example(seed, density):
    rng = np.random.default_rng(seed)
    hidden, head = rng.normal(size=(ROWS, SLOTS, WIDTH)), 2 * rng.normal(size=(WIDTH, VOCAB))
    targets = rng.integers(0, VOCAB, (ROWS, SLOTS)).astype(np.int32)
    mask = np.where(rng.random((ROWS, SLOTS)) < density, rng.uniform(0.5, 2, (ROWS, SLOTS)), 0)
    mask[1] = 0  # a row without any target
    return hidden.astype(np.float32), head.astype(np.float32), targets, mask.astype(np.float32)


def dense(hidden, head, targets, mask):
    """(loss, d_hidden, d_head) in float64."""
    hidden, head, mask = (x.astype(np.float64) for x in (hidden, head, mask))
    logits = hidden @ head
    peak = logits.max(-1, keepdims=True)
    log_z = np.log(np.exp(logits - peak).sum(-1, keepdims=True)) + peak
    one_hot = np.eye(VOCAB)[targets]
    loss = (mask * (log_z[..., 0] - (logits * one_hot).sum(-1))).sum()
    d_logits = (np.exp(logits - log_z) - one_hot) * mask[..., None]
    return loss, d_logits @ head.T, np.einsum('bsd,bsv->dv', hidden, d_logits)


@functools.partial(quick_jit, static_argnums=4)
def run(hidden, head, targets, mask, chunk):
    loss = functools.partial(cross_entropy_sum, chunk=chunk)
    # A factor of 3, so that the cotangent is not 1.
    scaled = jax.value_and_grad(lambda h, w: 3 * loss(h, w, targets, mask), argnums=(0, 1))
    return *scaled(hidden, head), loss(hidden, head, targets, mask)


@pytest.mark.parametrize('chunk', [4, 21, 32])
@pytest.mark.parametrize('density', [0.1, 0.9])
def test_value_and_gradients_equal_the_definition(chunk, density):
    arguments = example(chunk, density)
    value, (d_hidden, d_head), plain = run(*arguments, chunk)
    loss, *gradients = dense(*arguments)
    np.testing.assert_allclose([value / 3, plain], loss, rtol=1e-6)
    for actual, expected in zip((d_hidden, d_head), gradients):
        np.testing.assert_allclose(actual, 3 * expected, rtol=1e-6, atol=2e-5)  # measured 1.3e-5 of up to 50
    assert (np.asarray(d_hidden)[arguments[3] == 0] == 0).all()


def test_without_targets_everything_is_zero():
    hidden, head, targets, _ = example(0, 0.5)
    value, gradients, _ = run(hidden, head, targets, np.zeros_like(targets, np.float32), 4)
    assert value == 0 and all((np.asarray(gradient) == 0).all() for gradient in gradients)


def test_slots_without_a_target_do_not_matter():
    hidden, head, targets, mask = example(0, 0.5)
    other = np.where(mask[..., None] > 0, hidden, np.float32(1e4))
    value, (_, d_head), _ = run(other, head, np.where(mask > 0, targets, -9), mask, 4)
    expected, (_, expected_head), _ = run(hidden, head, targets, mask, 4)
    assert value == expected
    np.testing.assert_array_equal(d_head, expected_head)


def test_bfloat16_states_give_a_float32_loss():
    hidden, head, targets, mask = example(0, 0.5)
    value, (d_hidden, d_head), _ = run(jnp.asarray(hidden, jnp.bfloat16), head, targets, mask, 4)
    assert (value.dtype, d_hidden.dtype, d_head.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    loss, _, expected = dense(hidden, head, targets, mask)
    np.testing.assert_allclose(value / 3, loss, rtol=0.01)
    np.testing.assert_allclose(d_head / 3, expected, atol=0.02 * np.abs(expected).max())
