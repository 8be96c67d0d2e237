"""Blocked attention over key ranges in XLA.

Query tiles of all rows are taken one after another; for each, a loop whose bounds are data walks over the key tiles that
any of its queries sees. Forward keeps an online softmax (Milakov & Gimelshein 2018; FlashAttention); backward makes the
weights of a tile again from the saved log-sum-exp. Memory is O(S); no `[T, S]` array exists. Sums have one order: results
are deterministic.

Made for CPUs, correct everywhere. What measured faster there: heads first and a group's queries as rows, so that products
are plain batched matmuls; f32 throughout, bf16 being widened tile by tile; d_k and d_v transposed, as a product that
contracts the rows of both factors is slow; a mask on every tile, as a branch costs as much.
"""
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vora_jax.ops.key_range import MASKED, soft_capped
from vora_jax.types import KeyRange

BLOCK = 128  # sides of a tile, in slots
# No score is as low; exp(MASKED - HALF_MASKED) is 0, also for a query whose peak or log-sum-exp is itself MASKED.
HALF_MASKED = MASKED / 2


class Limits(NamedTuple):
    """row: i32[] row of a query tile. start, stop: i32[t, 1] key ranges of its queries."""

    row: jax.Array
    start: jax.Array
    stop: jax.Array


def refuses(q, k, v) -> str:
    """Why these inputs cannot be served; '' where they can."""
    return 'it computes in float32, not float64' if jnp.float64 in (q.dtype, k.dtype, v.dtype) else ''


def forward(q, k, v, key_range: KeyRange, soft_cap: float | None = None, *, query_block: int = BLOCK,
            key_block: int = BLOCK):
    """(out, log_sum), as `ops.attention.Kernels.forward` has it."""
    query_block, key_block = min(query_block, q.shape[1]), min(key_block, k.shape[1])
    queries, limits = _split(q, k.shape[2], query_block), _limits(key_range, query_block)
    keys, values = _pad(k, key_block), _pad(v, key_block)

    def query_tile(tile):
        query, limits = tile
        query = query.astype(jnp.float32)

        def key_tile(index, sums):
            peak, total, out = sums
            scores, _ = _scores(query, _load(keys, limits.row, index, key_block), limits, index * key_block, soft_cap)
            new_peak = jnp.maximum(peak, scores.max(-1, keepdims=True))
            weights = jnp.exp(scores - jnp.maximum(new_peak, HALF_MASKED))
            shrink = jnp.exp(peak - new_peak)
            update = jnp.matmul(weights, _load(values, limits.row, index, key_block))
            return new_peak, total * shrink + weights.sum(-1, keepdims=True), out * shrink + update

        narrow = (*query.shape[:-1], 1)
        sums = (jnp.full(narrow, MASKED, jnp.float32), jnp.zeros(narrow, jnp.float32), jnp.zeros_like(query))
        peak, total, out = jax.lax.fori_loop(*_key_tiles(limits, key_block, k.shape[1]), key_tile, sums)
        safe = jnp.where(total > 0, total, 1.0)  # an empty range has none
        return (out / safe).astype(q.dtype), peak + jnp.log(safe)

    out, log_sum = jax.lax.map(query_tile, (queries, limits))
    log_sum = _join(log_sum, (*q.shape[:-1], 1), query_block)
    return _join(out, q.shape, query_block), log_sum[..., 0].swapaxes(1, 2)


def backward(q, k, v, key_range: KeyRange, log_sum, delta, d_out, soft_cap: float | None = None, *, query_block: int = BLOCK,
             key_block: int = BLOCK):
    """(d_q, d_k, d_v), as `ops.attention.Kernels.backward` has it."""
    query_block, key_block = min(query_block, q.shape[1]), min(key_block, k.shape[1])
    log_sum, delta = (x.swapaxes(1, 2)[..., None] for x in (log_sum, delta))
    queries = [_split(x, k.shape[2], query_block) for x in (q, d_out, log_sum, delta)]
    keys, values = _pad(k, key_block), _pad(v, key_block)
    scale = q.shape[-1] ** -0.5

    def query_tile(sums, tile):
        limits, *tile = tile
        query, d_out, log_sum, delta = (x.astype(jnp.float32) for x in tile)
        turned_query, turned_d_out = query.swapaxes(1, 2), d_out.swapaxes(1, 2)

        def key_tile(index, sums):
            d_q, d_k, d_v = sums
            key, value = (_load(x, limits.row, index, key_block) for x in (keys, values))
            scores, slope = _scores(query, key, limits, index * key_block, soft_cap)
            weights = jnp.exp(scores - jnp.maximum(log_sum, HALF_MASKED))
            d_scores = weights * (_matmul_turned(d_out, value) - delta) * slope
            d_q = d_q + jnp.matmul(d_scores, key)
            place = limits.row * (keys.shape[1] // key_block) + index
            d_k = _add(d_k, jnp.matmul(turned_query, d_scores), place)
            return d_q, d_k, _add(d_v, jnp.matmul(turned_d_out, weights), place)

        first, last = _key_tiles(limits, key_block, k.shape[1])
        d_q, *sums = jax.lax.fori_loop(first, last, key_tile, (jnp.zeros_like(query), *sums))
        return tuple(sums), (d_q * scale).astype(q.dtype)

    batch, num_slots, num_kv_heads, head_dim = keys.shape
    zeros = (jnp.zeros((batch * num_slots // key_block, num_kv_heads, head_dim, key_block), jnp.float32),) * 2
    (d_k, d_v), d_q = jax.lax.scan(query_tile, zeros, (_limits(key_range, query_block), *queries))
    d_k, d_v = _join(d_k.swapaxes(2, 3) * scale, k.shape, key_block), _join(d_v.swapaxes(2, 3), v.shape, key_block)
    return _join(d_q, q.shape, query_block), d_k.astype(k.dtype), d_v.astype(v.dtype)


def _pad(x, multiple: int):
    """Pads dim 1 with zeros to a multiple; padded queries get empty ranges, padded keys lie beyond every range."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % multiple)) + ((0, 0),) * (x.ndim - 2))


def _split(x, num_kv_heads: int, block: int):
    """[B, T, N, H] -> [B * tiles, K, G * block, H]."""
    x = _pad(x, block)
    x = x.reshape(x.shape[0], -1, block, num_kv_heads, x.shape[2] // num_kv_heads, x.shape[3])
    x = x.transpose(0, 1, 3, 4, 2, 5)
    return x.reshape(-1, num_kv_heads, x.shape[3] * block, x.shape[5])


def _join(x, shape, block: int):
    """[B * tiles, K, G * block, H] -> [B, T, N, H], which is `shape`."""
    batch, length, num_heads, head_dim = shape
    x = x.reshape(batch, -1, x.shape[1], num_heads // x.shape[1], block, head_dim).transpose(0, 1, 4, 2, 3, 5)
    return x.reshape(batch, -1, num_heads, head_dim)[:, :length]


def _limits(key_range: KeyRange, block: int) -> Limits:
    """Those of every query tile, stacked."""
    start, stop = (_pad(x, block).reshape(-1, block, 1) for x in key_range)
    batch = key_range.start.shape[0]
    return Limits(jnp.repeat(jnp.arange(batch, dtype=jnp.int32), start.shape[0] // batch), start, stop)


def _key_tiles(limits: Limits, block: int, num_keys: int):
    """The first, and one past the last, key tile that any query of the tile sees."""
    seen = limits.stop > limits.start
    first = jnp.min(jnp.where(seen, limits.start, num_keys)) // block
    last = (jnp.max(jnp.where(seen, limits.stop, 0)) + block - 1) // block
    return first, last


def _load(x, row, index, block: int):
    """f32[K, block, H]: one key tile of [B, S, K, H]. Turning all of them first would cost a decoding step its time."""
    tile = jax.lax.dynamic_slice(x, (row, index * block, 0, 0), (1, block, *x.shape[2:]))
    return tile[0].swapaxes(0, 1).astype(jnp.float32)


def _add(x, tile, index):
    """x with a tile added to one of its own; XLA does it in place."""
    return jax.lax.dynamic_update_index_in_dim(x, x[index] + tile, index, 0)


def _scores(query, key, limits: Limits, first_key, soft_cap: float | None):
    """(scaled scores f32[K, G * t, s], MASKED outside of the ranges, the derivative of the soft cap)."""
    scores, slope = soft_capped(_matmul_turned(query, key) * (query.shape[-1] ** -0.5), soft_cap)
    slots = first_key + jnp.arange(key.shape[1], dtype=jnp.int32)[None]
    mask = (slots >= limits.start) & (slots < limits.stop)
    grouped = scores.reshape(scores.shape[0], -1, *mask.shape)
    return jnp.where(mask[None, None], grouped, MASKED).reshape(scores.shape), slope


def _matmul_turned(left, right):
    """[K, t, H], [K, s, H] -> [K, t, s]."""
    return jax.lax.dot_general(left, right, (((2,), (2,)), ((0,), (0,))))
