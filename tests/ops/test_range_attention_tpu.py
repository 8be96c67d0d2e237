"""The TPU kernels under an interpreter that watches memory, and what it and the references catch."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_layouts import both_ways, brute_force_mask, dense, relative_error, row_ranges
from jax.experimental.pallas import tpu as pltpu
from tiny_model import full_jit, quick_jit, strict  # noqa: F401

from vora_jax.ops import range_attention_tpu, tile_walk
from vora_jax.ops.attention import attention, choose
from vora_jax.ops.tile_walk import Tile
from vora_jax.types import KeyRange

TILE = Tile(128, 256)
RUNS = [('segment', 20), ('image', 150), ('text', 30), ('gap', 9), ('segment', 60), ('image', 40), ('image', 90)]
# Reads and writes out of bounds raise; memory nobody wrote is NaN.
WATCHED = pltpu.InterpretParams(out_of_bounds_reads='raise', uninitialized_memory='nan')


def case(num_queries, num_keys, num_heads, num_kv_heads, head_dim, own_only=False, rows=1, dtype='float32', seed=0):
    """(q, k, v, d_out, key_range) of packed rows."""
    rng = np.random.default_rng(seed)
    slots = max(num_queries, num_keys)
    ranges = [np.minimum(row_ranges(RUNS[i:] + RUNS[:i], slots, own_only), num_keys)[:, :num_queries] for i in range(rows)]
    key_range = KeyRange(*np.stack(ranges, axis=1))
    shapes = [(num_queries, num_heads), (num_keys, num_kv_heads), (num_keys, num_kv_heads), (num_queries, num_heads)]
    return *(jnp.asarray(rng.normal(size=(rows, *shape, head_dim)), dtype) for shape in shapes), key_range


def errors(inputs, interpret, soft_cap=None, **options):
    """Relative errors of out, d_q, d_k and d_v."""
    tile = {'tile': TILE, 'interpret': interpret}
    run = both_ways(range_attention_tpu, tile, tile | options)
    out, gradients = quick_jit(run, static_argnums=5)(*inputs, soft_cap)
    *arrays, key_range = inputs
    expected, wanted = dense(*arrays, brute_force_mask(key_range, arrays[1].shape[1]), soft_cap)
    return [relative_error(a, b) for a, b in zip((out, *gradients), (expected, *wanted))]


@pytest.mark.parametrize('options, soft_cap, resident', [
    ({'num_queries': 300, 'num_keys': 300, 'num_heads': 4, 'num_kv_heads': 2, 'head_dim': 64}, None, False),
    ({'num_queries': 130, 'num_keys': 600, 'num_heads': 2, 'num_kv_heads': 2, 'head_dim': 16, 'own_only': True}, 2.0, True)],
    ids=['packed', 'own image only, soft cap'])
def test_nothing_is_read_or_written_out_of_bounds(options, soft_cap, resident):
    assert max(errors(case(**options), WATCHED, soft_cap, resident=resident)) <= 1e-5


def beyond_the_end(word, query_tiles, key_tiles):
    row, query, key = tile_walk.unpack(word, query_tiles, key_tiles)
    return row, query, key + 1


def without_first(sizes, words, *refs):
    """A kernel that never zeroes its sums."""
    return _forward_kernel(sizes, _Words(words, ~tile_walk.FIRST), *refs)


def all_full(sizes, words, *refs):
    """A kernel that takes every visited tile for a full one."""
    return _forward_kernel(sizes, _Words(words, -1, tile_walk.FULL), *refs)


_forward_kernel = range_attention_tpu._forward_kernel


class _Words:
    """Words of a walk with bits taken and added."""

    def __init__(self, words, kept, added=0):
        self.words, self.kept, self.added = words, kept, added

    def __getitem__(self, index):
        return self.words[index] & self.kept | self.added


@pytest.mark.parametrize('fault', ['index', 'uninitialised', 'mask'])
def test_each_check_catches_its_fault(monkeypatch, fault):
    """A block beyond the end raises where memory is watched; sums nobody zeroed are NaN; a lost mask is a wrong number."""
    inputs = case(256, 512, 1, 1, 16)
    if fault == 'index':
        monkeypatch.setattr(range_attention_tpu, 'unpack', beyond_the_end)
        with pytest.raises(Exception, match='(?i)out.of.bounds'):
            errors(inputs, WATCHED)
    else:
        replacement = {'uninitialised': without_first, 'mask': all_full}[fault]
        monkeypatch.setattr(range_attention_tpu, '_forward_kernel', replacement)
        found = errors(inputs, WATCHED)[0]
        assert np.isnan(found) if fault == 'uninitialised' else found > 0.01


def test_one_compilation_serves_every_mask():
    """20 masks of a shape, one program, forward and backward."""
    run = full_jit(both_ways(range_attention_tpu, {'interpret': True}, {'interpret': True}))
    densities = set()
    for seed in range(20):
        q, k, v, d_out, _ = case(256, 256, 1, 1, 16, seed=seed)
        lengths = np.random.default_rng(seed).integers(5, 90, 12)
        kinds = ['segment', 'image', 'text', 'gap'] * 3
        key_range = KeyRange(*(x[None] for x in row_ranges(list(zip(kinds, lengths)), 256, own_only=seed % 2 == 1)))
        mask = brute_force_mask(key_range, 256)
        out, gradients = run(q, k, v, d_out, key_range)
        expected, wanted = dense(q, k, v, d_out, mask)
        assert max(relative_error(a, b) for a, b in zip((out, *gradients), (expected, *wanted))) <= 1e-5
        densities.add(int(mask.sum()))
    assert len(densities) == 20 and run._cache_size() == 1


def test_what_it_refuses_is_told():
    q, k, v, _, key_range = case(256, 300, 2, 1, 16)

    def refused(q, k, v):
        return range_attention_tpu.refuses(q, k, v)

    assert not refused(q, k, v)
    assert 'all float32 or all bfloat16' in refused(q, k.astype(jnp.bfloat16), v)
    assert 'head_dim is 12' in refused(*(x[..., :12] for x in (q, k, v)))
    many = jax.ShapeDtypeStruct((4096, 2**16, 1, 16), jnp.float32)
    assert 'too many tiles' in refused(many, many, many)
    with pytest.raises(ValueError, match='pallas_tpu cannot serve this: head_dim is 12'):
        attention(*(x[..., :12] for x in (q, k, v)), key_range, implementation='pallas_tpu')


@pytest.mark.parametrize('slots, group, rows', [(2048, 1, 1), (8192, 4, 2), (32768, 8, 4), (2**17, 4, 1)])
def test_the_default_tile_keeps_the_walk_short(slots, group, rows):
    q = jax.ShapeDtypeStruct((rows, slots, group, 128), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((rows, slots, 1, 128), jnp.bfloat16)
    tile = range_attention_tpu.default_tile(q, k)
    assert rows * (slots // tile.queries) * (slots // tile.keys) <= range_attention_tpu.MAX_VISITS
    assert tile.keys == 512 and group * tile.queries <= 2048
    assert choose(q, k, k, 'tpu').implementation == 'pallas_tpu'
