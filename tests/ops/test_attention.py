"""Attention against float64, forward and gradient."""
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_layouts import both_ways, brute_force_mask, dense, in_blocks
from tiny_model import batch, quick_jit, strict  # noqa: F401

from vora_jax.ops import blocked_attention, reference_attention
from vora_jax.ops.attention import attention, choose
from vora_jax.ops.key_range import causal, dense_mask
from vora_jax.types import KeyRange

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8


# Blocks that do not fill a row; tests/ops/test_attention_layouts.py has larger ones and the kernels.
IMPLEMENTATIONS = {'reference': both_ways(reference_attention), 'blocked 8 16': in_blocks(8, 16),
                   'blocked 16 8': in_blocks(16, 8)}


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
    assert not square(in_blocks(8, 16))


@pytest.mark.parametrize('module, growth', [(reference_attention, 8), (blocked_attention, 4)])
def test_memory_of_blocked_attention_grows_with_the_keys(module, growth):
    def temporary(num_keys):
        shape = jax.ShapeDtypeStruct((1, num_keys, HEADS, HEAD_DIM), jnp.float32)
        slots = jax.ShapeDtypeStruct((1, num_keys), jnp.int32)
        compiled = run.lower(both_ways(module), *[shape] * 4, KeyRange(slots, slots)).compile()
        return compiled.memory_analysis().temp_size_in_bytes
    ratio = temporary(4096) / temporary(1024)
    assert ratio > growth if module is reference_attention else ratio < growth, ratio


def test_mistakes_raise():
    key_range = causal(1, 4)
    q, k, v, _ = tensors(0, key_range, 4)
    with pytest.raises(ValueError, match="no implementation 'flash'"):
        attention(q, k, v, key_range, implementation='flash')
    with pytest.raises(ValueError, match='3 query heads cannot share 2'):
        attention(q[:, :, :3], k, v, key_range)
    for cap in (0.0, -1.0):
        with pytest.raises(ValueError, match='it must be above 0'):
            attention(q, k, v, key_range, soft_cap=cap)


def test_a_range_ends_where_the_keys_do():
    """Whatever is beyond them is not there; `reference` needs no clamp to know."""
    key_range, num_keys = packed(0, 200)
    q, k, v, _ = tensors(0, key_range, num_keys)
    start, stop = (np.array(x) for x in key_range)
    beyond = KeyRange(np.where(start == 0, -70, start), np.where(stop == stop.max(), stop + 70, stop))
    kept = KeyRange(np.maximum(beyond.start, 0), np.minimum(beyond.stop, num_keys))
    assert (beyond.stop > num_keys).any()
    for implementation in ('reference', 'xla'):
        attend = quick_jit(functools.partial(attention, implementation=implementation))
        np.testing.assert_array_equal(attend(q, k, v, beyond), attend(q, k, v, kept))


@pytest.mark.parametrize('platform, queries, keys, dtype, head_dim, chosen, reason', [
    ('cpu', 161, 161, 'float32', 64, 'xla', 'cpu has no kernel of its own'),
    ('cpu', 160, 160, 'float32', 64, 'reference', '160 keys are one tile'),
    ('tpu', 512, 512, 'bfloat16', 64, 'pallas_tpu', 'tpu'),
    ('gpu', 512, 512, 'bfloat16', 64, 'pallas_gpu', 'gpu'),
    ('tpu', 1, 512, 'bfloat16', 64, 'reference', '1 queries do not fill a tile'),
    ('gpu', 15, 512, 'bfloat16', 64, 'reference', '15 queries do not fill a tile'),
    ('tpu', 512, 512, 'float16', 64, 'xla', 'pallas_tpu cannot: .* all float32 or all bfloat16'),
    ('tpu', 512, 512, 'float32', 300, 'xla', 'pallas_tpu cannot: head_dim is 300'),
    ('gpu', 512, 512, 'float32', 300, 'xla', 'pallas_gpu cannot: a head dim of 300'),
    ('tpu', 512, 512, 'float64', 64, 'reference', 'only it computes in float64')])
def test_auto_goes_by_platform_and_shape(platform, queries, keys, dtype, head_dim, chosen, reason):
    q, k = (jax.ShapeDtypeStruct((1, slots, heads, head_dim), np.dtype('float32')) for slots, heads in
            ((queries, 4), (keys, 2)))
    q, k = (x.update(dtype=jnp.dtype(dtype)) for x in (q, k))
    choice = choose(q, k, k, platform)
    assert choice.implementation == chosen and re.search(reason, choice.reason)
