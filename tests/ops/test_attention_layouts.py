"""Every implementation of attention on random layouts, against float64."""
import functools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
from attention_layouts import both_ways, brute_force_mask, dense, in_blocks, layouts, relative_error
from hypothesis import HealthCheck, given, settings, strategies
from tiny_model import quick_jit, strict  # noqa: F401

from vora_jax.ops import range_attention_gpu, range_attention_tpu, reference_attention
from vora_jax.ops.key_range import causal
from vora_jax.ops.tile_walk import Tile

LAYOUTS_EACH = 40  # of each shape: 200 in all for each implementation


class Shape(NamedTuple):
    rows: int
    num_queries: int
    num_keys: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    soft_cap: float | None = None


SHAPES = {
    'tiles fit': Shape(1, 384, 384, 2, 2, 16, 'float32'),
    'group and rest': Shape(2, 200, 200, 4, 2, 24, 'float32'),
    'fewer queries, soft cap': Shape(1, 70, 300, 4, 1, 16, 'float32', soft_cap=1.5),
    'more queries': Shape(1, 300, 130, 2, 1, 64, 'float32'),
    'bfloat16': Shape(1, 260, 260, 4, 2, 32, 'bfloat16'),
}


def on_tpu(resident):
    options = {'tile': Tile(128, 256), 'interpret': True}
    return both_ways(range_attention_tpu, options, options | {'resident': resident})


GPU = {'tile': Tile(64, 32), 'interpret': True}
IMPLEMENTATIONS = {'reference': both_ways(reference_attention), 'xla': in_blocks(64, 32), 'pallas_tpu': on_tpu(True),
                   'pallas_gpu': both_ways(range_attention_gpu, GPU, GPU)}
WALKED = {'pallas_tpu walked': on_tpu(False)}  # the same but for d_q: on some shapes


@functools.partial(quick_jit, static_argnums=(0, 6))
def run(implementation, q, k, v, d_out, key_range, soft_cap):
    return implementation(q, k, v, d_out, key_range, soft_cap)


@pytest.mark.parametrize('shape', SHAPES)
def test_outputs_and_gradients_equal_the_definition(shape):
    shape = SHAPES[shape]
    tolerance = {'float32': 1e-5, 'bfloat16': 1e-2}[shape.dtype]
    implementations = IMPLEMENTATIONS | (WALKED if shape.dtype == 'bfloat16' or shape.soft_cap else {})
    errors = {name: [] for name in implementations}

    @settings(max_examples=LAYOUTS_EACH, deadline=None, derandomize=True, database=None,
              suppress_health_check=list(HealthCheck))
    @given(layouts(shape.rows, shape.num_queries, shape.num_keys), strategies.integers(0, 2**31))
    def check(key_range, seed):
        rng = np.random.default_rng(seed)
        q, k, v, d_out = (
            jnp.asarray(rng.normal(size=(shape.rows, slots, heads, shape.head_dim)), shape.dtype)
            for slots, heads in [(shape.num_queries, shape.num_heads), (shape.num_keys, shape.num_kv_heads),
                                 (shape.num_keys, shape.num_kv_heads), (shape.num_queries, shape.num_heads)])
        mask = brute_force_mask(key_range, shape.num_keys)
        expected, expected_gradients = dense(q, k, v, d_out, mask, shape.soft_cap)
        # Where no query sees two keys, d_q and d_k are 0: differences of equal numbers of about 1.
        least = 0.0 if mask.sum(-1).max() > 1 else 1.0
        blind, unseen = ~mask.any(2), ~mask.any(1)
        for name, implementation in implementations.items():
            out, gradients = run(implementation, q, k, v, d_out, key_range, shape.soft_cap)
            found = [relative_error(a, b, least) for a, b in zip((out, *gradients), (expected, *expected_gradients))]
            assert max(found) <= tolerance, (name, found)
            errors[name].append(found)
            # Exactly 0 where nothing is seen, and where nobody looks.
            assert (np.asarray(out)[blind] == 0).all() and (np.asarray(gradients[0])[blind] == 0).all(), name
            assert all((np.asarray(gradient)[unseen] == 0).all() for gradient in gradients[1:]), name

    check()
    for name, found in errors.items():
        assert len(found) >= LAYOUTS_EACH
        print(f'{name}: {len(found)} layouts, largest errors of out, d_q, d_k, d_v:',
              ' '.join(f'{error:.1e}' for error in np.max(found, 0)))


@pytest.mark.parametrize('scale', [1e2, 1e4])
@pytest.mark.parametrize('name', IMPLEMENTATIONS | WALKED)
def test_huge_scores_give_finite_gradients(name, scale):
    """Weights are at most 1 in the backward pass too, however scores of 1e4 and 1e8 are rounded; one key takes all."""
    rng = np.random.default_rng(0)
    q, k, v, d_out = (jnp.asarray(rng.normal(size=(1, 256, heads, 16)), jnp.float32) for heads in (2, 1, 1, 2))
    key_range = causal(1, 256)
    out, gradients = run(IMPLEMENTATIONS.get(name) or WALKED[name], q * scale, k * scale, v, d_out, key_range, None)
    expected, (*_, d_v) = dense(q * scale, k * scale, v, d_out, brute_force_mask(key_range, 256))
    assert all(np.isfinite(x).all() for x in gradients)
    assert relative_error(out, expected) <= (1e-2 if scale < 1e3 else 1.0)
    assert relative_error(gradients[2], d_v) <= (1e-2 if scale < 1e3 else 1.0)
