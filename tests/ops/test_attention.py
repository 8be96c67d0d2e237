"""Attention against float64, forward and gradient."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import batch, quick_jit, strict  # noqa: F401

from vora_jax.ops import blocked_attention, reference_attention
from vora_jax.ops.attention import attention, softmax_delta
from vora_jax.ops.key_range import causal, dense_mask
from vora_jax.types import KeyRange

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8


def both_ways(module, **options):
    """(q, k, v, d_out, key_range) -> (out, (d_q, d_k, d_v)) of an implementation."""
    def run(q, k, v, d_out, key_range, soft_cap=None):
        out, log_sum = module.forward(q, k, v, key_range, soft_cap, **options)
        delta = softmax_delta(out, d_out)
        return out, module.backward(q, k, v, key_range, log_sum, delta, d_out, soft_cap, **options)
    return run


def blocked(query_block, key_block):
    return both_ways(blocked_attention, query_block=query_block, key_block=key_block)


IMPLEMENTATIONS = {'reference': both_ways(reference_attention), 'blocked 8 16': blocked(8, 16),
                   'blocked 16 8': blocked(16, 8), 'blocked 256 256': blocked(256, 256)}


def packed(seed, num_slots=45):
    """The key range of random packed rows, and as many keys."""
    example = batch(seed, rows=3, slots=num_slots, patches=30)
    return example.key_range, num_slots


def rectangular(seed, num_queries=13, num_keys=37):
    """Random ranges, some empty, of fewer queries than keys: decoding, or one shard of a long row."""
    rng = np.random.default_rng(seed)
    start = rng.integers(2, num_keys, (3, num_queries))
    stop = np.minimum(start + rng.integers(-2, 20, start.shape), num_keys)
    return KeyRange(start.astype(np.int32), stop.astype(np.int32)), num_keys


LAYOUTS = {'packed': packed, 'rectangular': rectangular}


def tensors(seed, key_range, num_keys, dtype=np.float32):
    """q, k, v and the cotangent of the output."""
    rng = np.random.default_rng(seed)
    rows, num_queries = key_range.start.shape
    shapes = [(num_queries, HEADS), (num_keys, KV_HEADS), (num_keys, KV_HEADS), (num_queries, HEADS)]
    return [jnp.asarray(rng.normal(size=(rows, *shape, HEAD_DIM)), dtype) for shape in shapes]


def brute_force_mask(key_range, num_keys):
    rows, num_queries = key_range.start.shape
    mask = np.zeros((rows, num_queries, num_keys), bool)
    for b in range(rows):
        for t in range(num_queries):
            mask[b, t, key_range.start[b, t]:key_range.stop[b, t]] = True
    return mask


def dense(q, k, v, d_out, mask):
    """(out, (d_q, d_k, d_v)) in float64 NumPy, written from the definition."""
    q, k, v, d_out = (np.asarray(x, np.float64) for x in (q, k, v, d_out))
    group = q.shape[2] // k.shape[2]
    wide_k, wide_v = (np.repeat(x, group, axis=2) for x in (k, v))
    scale = q.shape[-1] ** -0.5
    scores = np.where(mask[:, None], np.einsum('btnh,bsnh->bnts', q, wide_k) * scale, -np.inf)
    weights = np.where(mask[:, None], np.exp(scores), 0)
    weights = weights / np.maximum(weights.sum(-1, keepdims=True), 1e-300)
    out = np.einsum('bnts,bsnh->btnh', weights, wide_v)
    d_weights = np.einsum('btnh,bsnh->bnts', d_out, wide_v)
    d_scores = weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True)) * scale
    d_q = np.einsum('bnts,bsnh->btnh', d_scores, wide_k)
    d_k, d_v = np.einsum('bnts,btnh->bsnh', d_scores, q), np.einsum('bnts,btnh->bsnh', weights, d_out)
    d_k, d_v = (x.reshape(*k.shape[:3], group, -1).sum(3) for x in (d_k, d_v))
    return out, (d_q, d_k, d_v)


@functools.partial(quick_jit, static_argnums=0)
def run(implementation, q, k, v, d_out, key_range):
    return implementation(q, k, v, d_out, key_range)


def within(actual, expected, tolerance):
    error = np.abs(np.asarray(actual, np.float64) - expected).max() / max(1, np.abs(expected).max())
    assert error <= tolerance, error


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('name', IMPLEMENTATIONS)
def test_forward_and_gradients_equal_the_definition(name, layout):
    for seed in range(4):
        key_range, num_keys = LAYOUTS[layout](seed)
        q, k, v, d_out = tensors(seed, key_range, num_keys)
        mask = brute_force_mask(key_range, num_keys)
        np.testing.assert_array_equal(dense_mask(key_range, num_keys), mask)
        out, gradients = run(IMPLEMENTATIONS[name], q, k, v, d_out, key_range)
        expected, expected_gradients = dense(q, k, v, d_out, mask)
        for actual, wanted in zip((out, *gradients), (expected, *expected_gradients)):
            within(actual, wanted, 2e-6)
        blind, unseen = ~mask.any(2), ~mask.any(1)
        assert blind.any() and unseen.any()
        assert (np.asarray(out)[blind] == 0).all() and (np.asarray(gradients[0])[blind] == 0).all()
        assert all((np.asarray(gradient)[unseen] == 0).all() for gradient in gradients[1:])


@pytest.mark.parametrize('name', ['reference', 'blocked 8 16'])
def test_bfloat16_stays_close(name):
    key_range, num_keys = packed(0)
    q, k, v, d_out = tensors(0, key_range, num_keys, jnp.bfloat16)
    out, gradients = run(IMPLEMENTATIONS[name], q, k, v, d_out, key_range)
    assert {x.dtype for x in (out, *gradients)} == {jnp.dtype('bfloat16')}
    expected, expected_gradients = dense(q, k, v, d_out, brute_force_mask(key_range, num_keys))
    for actual, wanted in zip((out, *gradients), (expected, *expected_gradients)):
        within(actual, wanted, 0.02)


@pytest.mark.parametrize('name', ['reference', 'blocked 8 16'])
def test_large_scores_do_not_overflow(name):
    key_range = causal(3, 16)
    q, k, v, d_out = tensors(0, key_range, 16)
    out, gradients = run(IMPLEMENTATIONS[name], q * 1e4, k * 1e4, v, d_out, key_range)
    assert all(np.isfinite(x).all() for x in (out, *gradients))


def test_a_row_of_padding_in_every_block_is_zero():
    key_range = KeyRange(*np.zeros((2, 3, 24), np.int32))
    q, k, v, d_out = tensors(0, key_range, 24)
    out, gradients = run(IMPLEMENTATIONS['blocked 8 16'], q, k, v, d_out, key_range)
    assert all((np.asarray(x) == 0).all() for x in (out, *gradients))


def shapes(jaxpr):
    """Shapes of every intermediate of a jaxpr, nested ones included."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.shape for variable in equation.outvars)
        for parameter in equation.params.values():
            for inner in parameter if isinstance(parameter, (list, tuple)) else [parameter]:
                inner = getattr(inner, 'jaxpr', inner)
                if hasattr(inner, 'eqns'):
                    yield from shapes(inner)


def test_blocked_attention_never_holds_queries_times_keys():
    key_range, num_keys = rectangular(0, num_queries=60, num_keys=90)  # 64 and 96 once padded to blocks
    q, k, v, d_out = tensors(0, key_range, num_keys)

    def square(attend):
        jaxpr = jax.make_jaxpr(functools.partial(run.__wrapped__, attend))(q, k, v, d_out, key_range)
        return [s for s in shapes(jaxpr.jaxpr) if {60, 64} & set(s) and {90, 96} & set(s)]
    assert square(both_ways(reference_attention))  # the check sees what it looks for
    assert not square(blocked(8, 16))


def test_mistakes_raise():
    key_range = causal(1, 4)
    q, k, v, _ = tensors(0, key_range, 4)
    with pytest.raises(ValueError, match="no implementation 'flash'"):
        attention(q, k, v, key_range, implementation='flash')
    with pytest.raises(ValueError, match='3 query heads cannot share 2'):
        attention(q[:, :, :3], k, v, key_range)
