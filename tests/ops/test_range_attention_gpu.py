"""The GPU kernels, interpreted: what random layouts of small heads do not reach (tests/ops/test_attention_layouts.py)."""
import functools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
from attention_layouts import both_ways, brute_force_mask, dense, relative_error, row_ranges
from tiny_model import quick_jit, strict  # noqa: F401

from vora_jax.ops import range_attention_gpu
from vora_jax.ops.attention import attention
from vora_jax.ops.key_range import MASKED
from vora_jax.ops.range_attention_gpu import Axis, Problem
from vora_jax.ops.tile_walk import Tile
from vora_jax.types import KeyRange

RUNS = ('segment', 3), ('text', 20), ('image', 37), ('text', 9), ('image', 25), ('gap', 5)


class Case(NamedTuple):
    num_queries: int
    num_keys: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str = 'bfloat16'
    soft_cap: float | None = None
    tile: Tile | None = None  # the default: larger than most of these


CASES = (Case(70, 200, 4, 1, 80), Case(90, 50, 8, 1, 96, 'float32'), Case(160, 160, 4, 1, 128, soft_cap=2.0),
         Case(33, 70, 1, 1, 256, 'float16'), Case(96, 96, 8, 2, 16, 'float32', tile=Tile(16, 32)))
GROUPED = CASES[4]


def layout(num_queries, num_keys, rows=3):
    """Packed rows: causal with images, images that see themselves alone (columns with holes), nothing; the last queries."""
    start, stop = np.zeros((2, rows, num_keys), np.int32)
    start[0], stop[0] = row_ranges(RUNS, num_keys)
    start[1], stop[1] = row_ranges(RUNS[1:], num_keys, own_only=True)
    padded = np.zeros((rows, max(0, num_queries - num_keys)), np.int32)
    return KeyRange(*(np.concatenate([x[:, -num_queries:], padded], axis=1) for x in (start, stop)))


def tensors(case, rows=3):
    rng = np.random.default_rng(0)
    sizes = [(case.num_queries, case.num_heads), *[(case.num_keys, case.num_kv_heads)] * 2,
             (case.num_queries, case.num_heads)]
    return [jnp.asarray(rng.normal(size=(rows, *size, case.head_dim)), case.dtype) for size in sizes]


@functools.partial(quick_jit, static_argnums=(0, 6))
def run(options, q, k, v, d_out, key_range, soft_cap):
    return both_ways(range_attention_gpu, options, options)(q, k, v, d_out, key_range, soft_cap)


def errors(case, tile):
    """Relative errors of (out, d_q, d_k, d_v), and whether all that nothing sees or that sees nothing is 0."""
    q, k, v, d_out = tensors(case)
    key_range = layout(case.num_queries, case.num_keys)
    mask = brute_force_mask(key_range, case.num_keys)
    out, gradients = run((('tile', tile), ('interpret', True)), q, k, v, d_out, key_range, case.soft_cap)
    assert {x.dtype for x in (out, *gradients)} == {jnp.dtype(case.dtype)}
    expected, expected_gradients = dense(q, k, v, d_out, mask, case.soft_cap)
    blind, unseen = ~mask.any(2), ~mask.any(1)
    zeros = [out[blind], gradients[0][blind], gradients[1][unseen], gradients[2][unseen]]
    return ([relative_error(a, b) for a, b in zip((out, *gradients), (expected, *expected_gradients))],
            all((np.asarray(x) == 0).all() for x in zeros))


@pytest.mark.parametrize('case', CASES, ids=lambda case: ' '.join(map(str, case)))
def test_outputs_and_gradients_equal_the_definition(case):
    found, zeros = errors(case, case.tile)
    assert max(found) <= (1e-5 if case.dtype == 'float32' else 1e-2), found
    assert zeros


def test_a_partial_tile_taken_for_full_is_caught(monkeypatch):
    visits = range_attention_gpu._visits
    monkeypatch.setattr(range_attention_gpu, '_visits', lambda *arguments: visits(*arguments).at[..., 0].set(0))
    found, _ = errors(GROUPED, Tile(32, 32))  # a tile of its own: nothing compiled with another list is reused
    assert min(found) > 0.01


def test_log_sum():
    case = GROUPED
    q, k, v, _ = tensors(case)
    key_range = layout(case.num_queries, case.num_keys)
    _, log_sum = range_attention_gpu.forward(q, k, v, key_range, tile=case.tile, interpret=True)
    mask = brute_force_mask(key_range, case.num_keys)[:, None]
    scores = np.einsum('btnh,bsnh->bnts', *(np.asarray(x, np.float64) for x in (q, np.repeat(k, 4, axis=2)))) / 4
    with np.errstate(divide='ignore'):
        expected = np.log(np.where(mask, np.exp(scores), 0).sum(-1))
    np.testing.assert_allclose(log_sum, np.where(np.isneginf(expected), np.float32(MASKED), expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('by_key', [False, True])
def test_visits_are_the_tiles_that_are_seen(by_key):
    num_queries, num_keys, tile = 96, 75, Tile(16, 8)
    key_range = layout(num_queries, num_keys)
    mask = np.zeros((3, num_queries, 80), bool)
    mask[..., :num_keys] = brute_force_mask(key_range, num_keys)
    tiles = mask.reshape(3, 6, 16, 10, 8).transpose(0, 1, 3, 2, 4).reshape(3, 6, 10, -1)
    some, every = tiles.any(-1), tiles.all(-1)
    assert every.any() and (some & ~every).any() and not some.all()
    problem = Problem(Axis(num_queries, tile.queries), Axis(num_keys, tile.keys), 1, 16, None)
    visits = np.asarray(range_attention_gpu._visits(key_range, problem, by_key))
    if by_key:
        some, every = some.swapaxes(1, 2), every.swapaxes(1, 2)
    for row, own in np.ndindex(*some.shape[:2]):
        masked, visited, *others = visits[row, own]
        assert others[:masked] == list(np.flatnonzero(some[row, own] & ~every[row, own]))
        assert others[masked:visited] == list(np.flatnonzero(every[row, own]))


@pytest.mark.parametrize('change, reason', [
    ({'head_dim': 512}, 'a head dim of 512 leaves too few registers'),
    ({'dtype': 'int8'}, 'it takes float32, bfloat16 and float16, not int8')])
def test_what_cannot_be_served_is_refused(change, reason):
    q, k, v, _ = tensors(CASES[0]._replace(**change))
    with pytest.raises(ValueError, match=f'pallas_gpu cannot serve this: {reason}'):
        attention(q, k, v, layout(70, 200), implementation='pallas_gpu')


def test_mixed_dtypes_are_refused():
    q, k, v, _ = tensors(CASES[0])
    assert range_attention_gpu.refuses(q, k, v) == ''
    assert 'one dtype, not bfloat16, float32' in range_attention_gpu.refuses(q, k.astype('float32'), v)
