"""Blocked attention over key ranges in XLA.

Queries are taken in blocks; for each, a loop whose bounds are data walks over the key blocks that any of its queries
sees, with an online softmax (Milakov & Gimelshein 2018; FlashAttention). The backward pass recomputes the weights block
by block from the saved log-sum-exp. Memory is O(S); no `[T, S]` array exists.
"""
import jax
import jax.numpy as jnp

from vora_jax.ops.key_range import MASKED
from vora_jax.types import KeyRange


def refuses(q, k, v) -> str:
    """Why these inputs cannot be served; '' where they can."""
    return 'it computes in float32, not float64' if q.dtype == jnp.float64 else ''


def _pad_to(x, multiple: int):
    """Pads dim 1 with zeros to a multiple; padded queries get empty ranges, padded keys lie beyond every range."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % multiple)) + ((0, 0),) * (x.ndim - 2))


def _split_queries(x, block: int):
    """[B, T, ...] -> [T / block, B, block, ...]."""
    return jnp.moveaxis(x.reshape(x.shape[0], -1, block, *x.shape[2:]), 1, 0)


def _join_queries(x, length: int):
    return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])[:, :length]


def _key_block_bounds(start, stop, key_block: int, num_keys: int):
    """First and one-past-last key block that any query of the block (any row) sees."""
    seen = stop > start
    first = jnp.min(jnp.where(seen, start, num_keys)) // key_block
    last = (jnp.max(jnp.where(seen, stop, 0)) + key_block - 1) // key_block
    return first, last


def _slice(x, index, block: int):
    return jax.lax.dynamic_slice_in_dim(x, index * block, block, axis=1)


def _scores(q, k, start, stop, first_key, soft_cap):
    """f32[B, K, G, t, s] scaled scores of one tile, MASKED outside the ranges, the tile's mask, the cap's derivative."""
    keys = (first_key + jnp.arange(k.shape[1], dtype=jnp.int32))[None, None]
    mask = (keys >= start[..., None]) & (keys < stop[..., None])
    scores = jnp.einsum('btkgh,bskh->bkgts', q, k, preferred_element_type=jnp.float32) * (q.shape[-1] ** -0.5)
    slope = 1.0
    if soft_cap is not None:
        bent = jnp.tanh(scores / soft_cap)
        scores, slope = bent * soft_cap, 1 - bent * bent
    return jnp.where(mask[:, None, None], scores, MASKED), mask[:, None, None], slope


def _prepare(q, k, v, start, stop, query_block, key_block):
    num_kv_heads = k.shape[2]
    query_block, key_block = min(query_block, q.shape[1]), min(key_block, k.shape[1])
    grouped = q.reshape(*q.shape[:2], num_kv_heads, -1, q.shape[-1])
    queries, starts, stops = (_split_queries(_pad_to(x, query_block), query_block) for x in (grouped, start, stop))
    return queries, _pad_to(k, key_block), _pad_to(v, key_block), starts, stops, query_block, key_block


def forward(q, k, v, key_range: KeyRange, soft_cap: float | None = None, *, query_block: int = 256, key_block: int = 256):
    """(out, log_sum), as `ops.attention.Kernels.forward` has it."""
    start, stop = key_range
    queries, keys, values, starts, stops, query_block, key_block = _prepare(
        q, k, v, start, stop, query_block, key_block)

    def one_block(block):
        q_block, start, stop = block
        batch, length, num_kv_heads, group, head_dim = q_block.shape

        def body(index, carry):
            peak, total, out = carry
            v_block = _slice(values, index, key_block)
            scores, mask, _ = _scores(q_block, _slice(keys, index, key_block), start, stop, index * key_block, soft_cap)
            new_peak = jnp.maximum(peak, scores.max(-1))
            weights = jnp.where(mask, jnp.exp(scores - new_peak[..., None]), 0.0)
            shrink = jnp.exp(peak - new_peak)
            update = jnp.einsum('bkgts,bskh->bkgth', weights.astype(v_block.dtype), v_block,
                                preferred_element_type=jnp.float32)
            return new_peak, total * shrink + weights.sum(-1), out * shrink[..., None] + update

        shape = (batch, num_kv_heads, group, length)
        zero = (jnp.full(shape, MASKED, jnp.float32), jnp.zeros(shape, jnp.float32),
                jnp.zeros((*shape, head_dim), jnp.float32))
        first, last = _key_block_bounds(start, stop, key_block, keys.shape[1])
        peak, total, out = jax.lax.fori_loop(first, last, body, zero)
        safe = jnp.where(total > 0, total, 1.0)
        out = jnp.moveaxis(out / safe[..., None], 3, 1).astype(q.dtype)
        return out, peak + jnp.log(safe)

    out, log_sum = jax.lax.map(one_block, (queries, starts, stops))
    out = _join_queries(out, q.shape[1]).reshape(q.shape)
    # [T / block, B, K, G, block] -> [B, N, T]
    log_sum = log_sum.transpose(1, 2, 3, 0, 4).reshape(q.shape[0], q.shape[2], -1)[..., :q.shape[1]]
    return out, log_sum


def backward(q, k, v, key_range: KeyRange, log_sum, delta, d_out, soft_cap: float | None = None, *, query_block: int = 256,
             key_block: int = 256):
    """(d_q, d_k, d_v), as `ops.attention.Kernels.backward` has it."""
    start, stop = key_range
    queries, keys, values, starts, stops, query_block, key_block = _prepare(
        q, k, v, start, stop, query_block, key_block)
    grouped_shape = (*q.shape[:2], k.shape[2], -1, q.shape[-1])
    d_outs = _split_queries(_pad_to(d_out.reshape(grouped_shape), query_block), query_block)
    log_sums, deltas = (_split_queries(_pad_to(x.swapaxes(1, 2), query_block), query_block) for x in (log_sum, delta))

    def one_block(carry, block):
        q_block, d_block, delta, start, stop, log_sum = block
        batch, length, num_kv_heads, group, head_dim = q_block.shape
        scale = head_dim**-0.5
        log_sum, delta = (x.swapaxes(1, 2).reshape(batch, num_kv_heads, group, length) for x in (log_sum, delta))

        def body(index, carry):
            d_q, d_k, d_v = carry
            k_block, v_block = _slice(keys, index, key_block), _slice(values, index, key_block)
            scores, mask, slope = _scores(q_block, k_block, start, stop, index * key_block, soft_cap)
            weights = jnp.where(mask, jnp.exp(scores - log_sum[..., None]), 0.0)
            d_weights = jnp.einsum('btkgh,bskh->bkgts', d_block, v_block, preferred_element_type=jnp.float32)
            d_scores = (weights * (d_weights - delta[..., None]) * slope * scale).astype(q.dtype)
            d_q = d_q + jnp.einsum('bkgts,bskh->btkgh', d_scores, k_block, preferred_element_type=jnp.float32)
            tile_d_k = jnp.einsum('bkgts,btkgh->bskh', d_scores, q_block, preferred_element_type=jnp.float32)
            tile_d_v = jnp.einsum('bkgts,btkgh->bskh', weights.astype(q.dtype), d_block,
                                  preferred_element_type=jnp.float32)
            place = (0, index * key_block, 0, 0)
            d_k = jax.lax.dynamic_update_slice(d_k, _slice(d_k, index, key_block) + tile_d_k, place)
            d_v = jax.lax.dynamic_update_slice(d_v, _slice(d_v, index, key_block) + tile_d_v, place)
            return d_q, d_k, d_v

        first, last = _key_block_bounds(start, stop, key_block, keys.shape[1])
        d_q, *carry = jax.lax.fori_loop(first, last, body, (jnp.zeros(q_block.shape, jnp.float32), *carry))
        return tuple(carry), d_q

    zeros = (jnp.zeros(keys.shape, jnp.float32), jnp.zeros(values.shape, jnp.float32))
    (d_k, d_v), d_q = jax.lax.scan(one_block, zeros, (queries, d_outs, deltas, starts, stops, log_sums))
    d_q = _join_queries(d_q, q.shape[1]).reshape(q.shape).astype(q.dtype)
    return d_q, d_k[:, :k.shape[1]].astype(k.dtype), d_v[:, :v.shape[1]].astype(v.dtype)
