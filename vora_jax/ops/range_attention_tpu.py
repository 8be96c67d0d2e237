"""Attention over key ranges as Pallas kernels for TPUs.

The grid is (kv heads, visits): the visits are `ops.tile_walk`'s, made on the device from the key ranges and prefetched as
scalars, so that a tile nobody sees costs neither a step nor a load, and one compilation serves any mask. The query heads of
a kv head are rows of one tile and share its keys and values. Full tiles run without a mask, and a tile of which only half
the keys are seen computes that half: area is visited in halves, memory is loaded in whole tiles.

Forward walks by query, its rows in sublanes ("q-major"): scores `[G * tile.queries, tile.keys]`, the running maximum and
sum replicated over a register's lanes. Backward walks by key, transposed ("k-major"): scores `[tile.keys, G *
tile.queries]`, so that log-sum-exp, delta and the ranges are single rows and d_k, d_v are plain products. Where d_q of a kv
head fits into VMEM it is summed in the same walk (five products a tile instead of seven); else a walk by query makes it.

Powers are of 2: the scale and log2(e) are one factor of the scores.
"""
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from vora_jax.ops.key_range import MASKED
from vora_jax.ops.tile_walk import FIRST, FULL, LAST, LOWER, UPPER, Tile, tile_walk, unpack
from vora_jax.types import KeyRange

LANES = 128
LOG2_E = math.log2(math.e)
MAX_VISITS = 2**16  # words that a walk may take of scalar memory (256 KiB)
MAX_RESIDENT_BYTES = 4 * 2**20  # of f32 d_q in VMEM
VMEM_LIMIT_BYTES = 32 * 2**20  # v4 and later have as much
MAX_TILE_BYTES = 2**20  # of queries: products of larger tiles leave VMEM


class _Sizes(NamedTuple):
    """What the kernels are compiled for."""

    group: int
    head_dim: int
    tile: Tile
    query_tiles: int
    key_tiles: int
    soft_cap: float | None
    exact: bool  # f32 products in full precision, not one bf16 pass

    @property
    def rows(self) -> int:
        return self.group * self.tile.queries

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    @property
    def precision(self):
        return lax.Precision.HIGHEST if self.exact else lax.Precision.DEFAULT


def refuses(q, k, v) -> str:
    """Why these inputs cannot be served; '' where they can."""
    if {q.dtype, k.dtype, v.dtype} not in ({jnp.dtype('float32')}, {jnp.dtype('bfloat16')}):
        return f'queries, keys and values are {q.dtype}, {k.dtype}, {v.dtype}; it takes all float32 or all bfloat16'
    if q.shape[-1] % 8 or q.shape[-1] > 256:
        return f'head_dim is {q.shape[-1]}; it takes multiples of 8 up to 256'
    tile, group = default_tile(q, k), q.shape[2] // k.shape[2]
    if not tile:
        return f'{q.shape[0]} rows of {q.shape[1]} x {k.shape[1]} slots have too many tiles'
    if group * tile.queries * q.shape[-1] * q.dtype.itemsize > MAX_TILE_BYTES:
        return f'{group} query heads of head_dim {q.shape[-1]} share a kv head, too much {q.dtype} for VMEM'
    return ''


def default_tile(q, k) -> Tile | None:
    """The tile for these shapes: 512 keys, and queries enough to give a kv head about 512 rows.

    Smaller tiles follow the mask closer; longer walks than MAX_VISITS take larger ones. None: none is large enough.
    """
    batch, num_queries, num_keys = q.shape[0], q.shape[1], k.shape[1]
    group = q.shape[2] // k.shape[2]
    tile = Tile(min(256 if group <= 2 else 128, _padded(num_queries, LANES)), min(512, _padded(num_keys, 2 * LANES)))
    while batch * -(-num_queries // tile.queries) * -(-num_keys // tile.keys) > MAX_VISITS:
        if group * tile.queries * 2 > 2048:
            return None
        tile = tile._replace(queries=tile.queries * 2)
    return tile


def forward(q, k, v, key_range: KeyRange, soft_cap: float | None = None, *, tile: Tile | None = None, interpret=False):
    """(out, log_sum), as `ops.attention.Kernels.forward` has it. `interpret`: as in `pallas_call`."""
    sizes, key_range, (queries,), (keys, values) = _prepare(q, k, v, key_range, soft_cap, tile, (q,))
    batch, num_kv_heads, group, num_queries, head_dim = queries.shape
    block = _blocks(sizes)
    out, log_sum = _call(
        functools.partial(_forward_kernel, sizes), 'range_attention_forward', sizes, key_range, False,
        [(queries, block.query), (keys, block.key), (values, block.key), (_stacked(key_range), block.ranges)],
        [(jax.ShapeDtypeStruct(queries.shape, q.dtype), block.query),
         (jax.ShapeDtypeStruct((batch, num_kv_heads, group, num_queries), jnp.float32), block.row)],
        [(sizes.rows, head_dim), (sizes.rows, LANES), (sizes.rows, LANES)], interpret)
    return _heads_last(out, q.shape), log_sum.reshape(batch, -1, num_queries)[..., :q.shape[1]]


def backward(q, k, v, key_range: KeyRange, log_sum, delta, d_out, soft_cap: float | None = None, *,
             tile: Tile | None = None, resident: bool | None = None, interpret=False):
    """(d_q, d_k, d_v), as `ops.attention.Kernels.backward` has it.

    resident: sum d_q in VMEM beside d_k and d_v; None: where it fits (MAX_RESIDENT_BYTES).
    """
    sizes, key_range, (queries, d_outs), (keys, values) = _prepare(q, k, v, key_range, soft_cap, tile, (q, d_out))
    batch, num_kv_heads, group, num_queries, head_dim = queries.shape
    if resident is None:
        resident = 4 * group * num_queries * head_dim <= MAX_RESIDENT_BYTES
    block = _blocks(sizes)
    row_sums = [jnp.pad(x, ((0, 0), (0, 0), (0, num_queries - x.shape[-1]))).reshape(queries.shape[:-1])
                for x in (log_sum * LOG2_E, delta)]
    inputs = [(queries, block.query), (keys, block.key), (values, block.key), (d_outs, block.query),
              (row_sums[0], block.row), (row_sums[1], block.row), (_stacked(key_range), block.ranges)]
    d_query = jax.ShapeDtypeStruct((batch, num_kv_heads, sizes.query_tiles, head_dim, sizes.rows), q.dtype)
    d_key, d_value = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (keys, values))
    d_query_sum = (head_dim, sizes.rows)
    if resident:
        d_k, d_v, d_q = _call(
            functools.partial(_backward_kernel, sizes), 'range_attention_backward', sizes, key_range, True, inputs,
            [(d_key, block.key), (d_value, block.key), (d_query, block.d_queries)],
            [(sizes.tile.keys, head_dim), (sizes.tile.keys, head_dim), (sizes.query_tiles, *d_query_sum)], interpret)
    else:
        d_k, d_v = _call(
            functools.partial(_d_key_kernel, sizes), 'range_attention_d_key', sizes, key_range, True, inputs,
            [(d_key, block.key), (d_value, block.key)],
            [(sizes.tile.keys, head_dim), (sizes.tile.keys, head_dim)], interpret)
        d_q, = _call(functools.partial(_d_query_kernel, sizes), 'range_attention_d_query', sizes, key_range, False, inputs,
                     [(d_query, block.d_query)], [d_query_sum], interpret)
    # [B, K, query tiles, H, (G, tile.queries)] -> [B, K, G, T, H]
    d_q = d_q.reshape(*d_q.shape[:4], group, -1).transpose(0, 1, 4, 2, 5, 3).reshape(queries.shape)
    return _heads_last(d_q, q.shape), _keys_last(d_k, k.shape), _keys_last(d_v, v.shape)


def _forward_kernel(sizes, words, q_ref, k_ref, v_ref, ranges_ref, out_ref, log_sum_ref, total_out, peak, total):
    """One visit: adds a tile of keys to the running softmax of a tile of queries."""
    word = words[pl.program_id(1)]
    _, _, key_tile = unpack(word, sizes.query_tiles, sizes.key_tiles)
    factor = sizes.scale * LOG2_E if sizes.soft_cap is None else LOG2_E

    @pl.when(word & FIRST != 0)
    def _():
        total_out[...] = jnp.zeros_like(total_out)
        peak[...] = jnp.full_like(peak, MASKED)
        total[...] = jnp.zeros_like(total)

    def visit(keys, is_full):
        queries = q_ref[0, 0].reshape(sizes.rows, sizes.head_dim)
        scores = _dot(sizes, queries, k_ref[0, 0, keys], 1, 1)
        if sizes.soft_cap is not None:
            scores = jnp.tanh(scores * (sizes.scale / sizes.soft_cap)) * sizes.soft_cap
        if not is_full:
            first_key = key_tile * sizes.tile.keys + keys.start
            start, stop = (_column(ranges_ref[0, i:i + 1] - first_key, sizes, keys.size) for i in (0, 1))
            key = lax.broadcasted_iota(jnp.int32, (sizes.tile.queries, keys.size), 1)
            seen = jnp.concatenate([(key >= start) & (key < stop)] * sizes.group, axis=0)
            scores = jnp.where(seen, scores, MASKED)
        old_peak = peak[...]
        new_peak = jnp.maximum(old_peak, jnp.max(scores, axis=1, keepdims=True))
        weights = jnp.exp2((scores - _lanes(new_peak, keys.size)) * factor)
        shrink = jnp.exp2((old_peak - new_peak) * factor)
        peak[...] = new_peak
        total[...] = total[...] * shrink + jnp.sum(weights, axis=1, keepdims=True)
        update = _dot(sizes, weights.astype(v_ref.dtype), v_ref[0, 0, keys], 1, 0)
        total_out[...] = total_out[...] * _lanes(shrink, sizes.head_dim) + update

    _visit(sizes, word, visit)

    @pl.when(word & LAST != 0)
    def _():
        # Before its first seen key a row has summed weights of masked ones, exp2(0); its first real peak shrinks them to
        # 0. A row without any keeps the peak MASKED.
        empty = peak[...] <= 0.5 * MASKED
        safe = jnp.where(empty, 1.0, total[...])
        out = total_out[...] * _lanes(jnp.where(empty, 0.0, 1.0 / safe), sizes.head_dim)
        out_ref[0, 0] = out.reshape(out_ref.shape[2:]).astype(out_ref.dtype)
        log_sum = jnp.where(empty, MASKED, peak[...] * (factor / LOG2_E) + jnp.log(safe))
        log_sum_ref[0, 0] = log_sum.T[0].reshape(sizes.group, sizes.tile.queries)


def _weights_and_d_scores(sizes, key_tile, keys, is_full, q_ref, k_ref, v_ref, d_out_ref, log_sum_ref, delta_ref,
                          ranges_ref):
    """(queries, d_outs, weights, d_scores) of these keys, transposed: f32[keys, rows]; d_scores lack the scale."""
    queries, d_outs = (ref[0, 0].reshape(sizes.rows, sizes.head_dim) for ref in (q_ref, d_out_ref))
    scores = _dot(sizes, k_ref[0, 0, keys], queries, 1, 1)
    bent = None
    if sizes.soft_cap is not None:
        bent = jnp.tanh(scores * (sizes.scale / sizes.soft_cap))
        scores = bent * (sizes.soft_cap * LOG2_E)
    else:
        scores = scores * (sizes.scale * LOG2_E)
    weights = jnp.exp2(jnp.minimum(scores - _row(log_sum_ref, sizes), 0.0))  # huge scores are rounded past their sum
    if not is_full:
        first_key = key_tile * sizes.tile.keys + keys.start
        key = first_key + lax.broadcasted_iota(jnp.int32, (keys.size, sizes.tile.queries), 0)
        seen = (key >= ranges_ref[0, 0:1]) & (key < ranges_ref[0, 1:2])
        weights = jnp.where(jnp.concatenate([seen] * sizes.group, axis=1), weights, 0.0)
    d_scores = weights * (_dot(sizes, v_ref[0, 0, keys], d_outs, 1, 1) - _row(delta_ref, sizes))
    if bent is not None:
        d_scores = d_scores * (1 - bent * bent)
    return queries, d_outs, weights, d_scores


def _add_d_key(sizes, keys, queries, d_outs, weights, d_scores, d_key, d_value):
    d_value[keys] += _dot(sizes, weights.astype(d_outs.dtype), d_outs, 1, 0)
    d_key[keys] += _dot(sizes, d_scores.astype(queries.dtype), queries, 1, 0)


def _d_key_kernel(sizes, words, *refs):
    """One visit: adds a tile of queries to the gradients of a tile of keys and values."""
    *inputs, d_key_ref, d_value_ref, d_key, d_value = refs
    word = words[pl.program_id(1)]
    _, _, key_tile = unpack(word, sizes.query_tiles, sizes.key_tiles)
    _begin(word, d_key, d_value)

    def visit(keys, is_full):
        tile = _weights_and_d_scores(sizes, key_tile, keys, is_full, *inputs)
        _add_d_key(sizes, keys, *tile, d_key, d_value)

    _visit(sizes, word, visit)
    _end_keys(sizes, word, d_key_ref, d_value_ref, d_key, d_value)


def _backward_kernel(sizes, words, *refs):
    """As `_d_key_kernel`, and adds the tile of keys to the gradient of the queries, all of which stay in VMEM."""
    *inputs, d_key_ref, d_value_ref, d_query_ref, d_key, d_value, d_query = refs
    word = words[pl.program_id(1)]
    _, query_tile, key_tile = unpack(word, sizes.query_tiles, sizes.key_tiles)
    _begin(word, d_key, d_value)

    @pl.when((word & FIRST != 0) & (key_tile == 0))
    def _():
        d_query[...] = jnp.zeros_like(d_query)

    def visit(keys, is_full):
        *tile, d_scores = _weights_and_d_scores(sizes, key_tile, keys, is_full, *inputs)
        _add_d_key(sizes, keys, *tile, d_scores, d_key, d_value)
        d_query[query_tile] += _dot(sizes, inputs[1][0, 0, keys], d_scores.astype(inputs[1].dtype), 0, 0)

    _visit(sizes, word, visit)
    _end_keys(sizes, word, d_key_ref, d_value_ref, d_key, d_value)

    @pl.when((word & LAST != 0) & (key_tile == sizes.key_tiles - 1))
    def _():
        d_query_ref[0, 0] = (d_query[...] * sizes.scale).astype(d_query_ref.dtype)


def _d_query_kernel(sizes, words, *refs):
    """One visit: adds a tile of keys to the gradient of a tile of queries, f32[H, rows]."""
    *inputs, d_query_ref, d_query = refs
    word = words[pl.program_id(1)]
    _, _, key_tile = unpack(word, sizes.query_tiles, sizes.key_tiles)
    _begin(word, d_query)

    def visit(keys, is_full):
        *_, d_scores = _weights_and_d_scores(sizes, key_tile, keys, is_full, *inputs)
        d_query[...] += _dot(sizes, inputs[1][0, 0, keys], d_scores.astype(inputs[1].dtype), 0, 0)

    _visit(sizes, word, visit)

    @pl.when(word & LAST != 0)
    def _():
        d_query_ref[0, 0, 0] = (d_query[...] * sizes.scale).astype(d_query_ref.dtype)


def _begin(word, *sums):
    @pl.when(word & FIRST != 0)
    def _():
        for ref in sums:
            ref[...] = jnp.zeros_like(ref)


def _end_keys(sizes, word, d_key_ref, d_value_ref, d_key, d_value):
    @pl.when(word & LAST != 0)
    def _():
        d_key_ref[0, 0] = (d_key[...] * sizes.scale).astype(d_key_ref.dtype)
        d_value_ref[0, 0] = d_value[...].astype(d_value_ref.dtype)


def _visit(sizes, word, visit):
    """Runs `visit(keys, is_full)` as the word says: a body each for full tiles (no mask work), partial tiles, and halves."""
    half, seen = sizes.tile.keys // 2, word & (LOWER | UPPER)

    @pl.when(word & FULL != 0)
    def _():
        visit(pl.ds(0, sizes.tile.keys), True)

    @pl.when(word & (LOWER | UPPER | FULL) == LOWER | UPPER)
    def _():
        visit(pl.ds(0, sizes.tile.keys), False)

    @pl.when((seen == LOWER) | (seen == UPPER))
    def _():
        visit(pl.ds(pl.multiple_of(jnp.where(seen == UPPER, half, 0), half), half), False)


def _dot(sizes, x, y, x_dim: int, y_dim: int):
    """f32 product over dimension `x_dim` of x and `y_dim` of y."""
    return lax.dot_general(x, y, (((x_dim,), (y_dim,)), ((), ())), precision=sizes.precision,
                           preferred_element_type=jnp.float32)


def _row(ref, sizes):
    """[1, G * tile.queries]: a block [1, 1, G, tile.queries] as one row of lanes."""
    return jnp.concatenate([ref[0, 0, g:g + 1] for g in range(sizes.group)], axis=1)


def _column(row, sizes, width: int):
    """[tile.queries, width]: a row [1, tile.queries] turned into a column and repeated along the keys."""
    return _lanes(jnp.broadcast_to(row, (LANES, sizes.tile.queries)).T, width)


def _lanes(x, width: int):
    """[rows, LANES] of equal lanes -> [rows, width]."""
    return jnp.concatenate([x] * -(-width // LANES), axis=1)[:, :width]


class _Blocks(NamedTuple):
    """The block of each kind of array that a visit works on."""

    query: pl.BlockSpec
    key: pl.BlockSpec
    row: pl.BlockSpec
    ranges: pl.BlockSpec
    d_query: pl.BlockSpec
    d_queries: pl.BlockSpec


def _blocks(sizes: _Sizes) -> _Blocks:
    group, head_dim, tile = sizes.group, sizes.head_dim, sizes.tile

    def block(shape, place):
        def index(head, visit, words):
            return place(head, *unpack(words[visit], sizes.query_tiles, sizes.key_tiles))
        return pl.BlockSpec(shape, index)

    return _Blocks(
        query=block((1, 1, group, tile.queries, head_dim), lambda h, b, i, j: (b, h, 0, i, 0)),
        key=block((1, 1, tile.keys, head_dim), lambda h, b, i, j: (b, h, j, 0)),
        row=block((1, 1, group, tile.queries), lambda h, b, i, j: (b, h, 0, i)),
        ranges=block((1, 2, tile.queries), lambda h, b, i, j: (b, 0, i)),
        d_query=block((1, 1, 1, head_dim, sizes.rows), lambda h, b, i, j: (b, h, i, 0, 0)),
        d_queries=block((1, 1, sizes.query_tiles, head_dim, sizes.rows), lambda h, b, i, j: (b, h, 0, 0, 0)))


def _call(kernel, name, sizes, key_range, by_key, inputs, outputs, scratch, interpret):
    """The kernel over the walk of the key ranges; inputs and outputs: pairs of array (shape) and block."""
    num_keys = sizes.key_tiles * sizes.tile.keys
    walk = tile_walk(key_range, num_keys, sizes.tile, by_key)
    num_kv_heads = inputs[1][0].shape[1]
    return pl.pallas_call(
        kernel, name=name,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1, grid=(num_kv_heads, walk.length), in_specs=[spec for _, spec in inputs],
            out_specs=[spec for _, spec in outputs], scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch]),
        out_shape=[shape for shape, _ in outputs],
        compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'arbitrary'),
                                             vmem_limit_bytes=VMEM_LIMIT_BYTES),
        interpret=interpret)(walk.words, *(array for array, _ in inputs))


def _prepare(q, k, v, key_range, soft_cap, tile, by_query):
    """(sizes, padded key range, arrays [B, T, N, H] as [B, K, G, T, H], k and v as [B, K, S, H]), padded to tiles."""
    tile = default_tile(q, k) if tile is None else tile
    num_kv_heads = k.shape[2]

    def padded(x, multiple):
        return jnp.pad(x, ((0, 0), (0, -x.shape[1] % multiple)) + ((0, 0),) * (x.ndim - 2))

    queries = [padded(x, tile.queries) for x in by_query]
    queries = [x.reshape(*x.shape[:2], num_kv_heads, -1, x.shape[-1]).transpose(0, 2, 3, 1, 4) for x in queries]
    keys = [padded(x, tile.keys).transpose(0, 2, 1, 3) for x in (k, v)]
    key_range = KeyRange(*(padded(x, tile.queries) for x in key_range))  # padded queries see nothing
    sizes = _Sizes(queries[0].shape[2], q.shape[-1], tile, key_range.start.shape[1] // tile.queries,
                   keys[0].shape[2] // tile.keys, soft_cap, q.dtype == jnp.float32)
    return sizes, key_range, queries, keys


def _stacked(key_range: KeyRange):
    """i32[B, 2, T]."""
    return jnp.stack(key_range, axis=1)


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _heads_last(x, shape):
    """[B, K, G, T padded, H] -> [B, T, N, H]."""
    return x.transpose(0, 3, 1, 2, 4).reshape(shape[0], -1, *shape[2:])[:, :shape[1]]


def _keys_last(x, shape):
    """[B, K, S padded, H] -> [B, S, K, H]."""
    return x.transpose(0, 2, 1, 3)[:, :shape[1]]
