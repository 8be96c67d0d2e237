"""Attention over key ranges: the only switch."""
from typing import Literal

import jax
import jax.numpy as jnp

from vora_jax.ops.blocked_attention import blocked_attention
from vora_jax.ops.key_range import dense_mask
from vora_jax.types import KeyRange

Implementation = Literal['auto', 'reference', 'xla']

# Below this many keys one dense tile is cheaper than the bookkeeping of blocks (measured on 2 CPU cores).
MAX_DENSE_KEYS = 256


def attention(q, k, v, key_range: KeyRange, *, implementation: Implementation = 'auto'):
    """f[B, T, N, H]: softmax attention in which query t sees the keys `key_range.start[t] <= s < key_range.stop[t]`.

    Args:
        q: f[B, T, N, H] queries, unscaled; the scale is `H ** -0.5`.
        k, v: f[B, S, K, H] keys and values; N is a multiple of K and each group of N / K query heads shares one.
        key_range: i32[B, T] twice. A query with an empty range gives 0 and has zero gradients.
        implementation: `reference` (dense mask), `xla` (blocked, online softmax, never `[T, S]` for all blocks), or
            `auto`: dense for at most MAX_DENSE_KEYS keys, else `xla`.

    Raises:
        ValueError: an unknown implementation, or heads that do not divide.
    """
    if q.shape[2] % k.shape[2]:
        raise ValueError(f'attention: {q.shape[2]} query heads cannot share {k.shape[2]} key/value heads evenly.')
    if implementation == 'auto':
        implementation = 'reference' if k.shape[1] <= MAX_DENSE_KEYS else 'xla'
    if implementation == 'reference':
        return reference_attention(q, k, v, key_range)
    if implementation == 'xla':
        return blocked_attention(q, k, v, key_range.start, key_range.stop)
    raise ValueError(f'attention: no implementation {implementation!r}; choose auto, reference or xla.')


def reference_attention(q, k, v, key_range: KeyRange):
    """The definition of `attention`, with a dense mask; scores and softmax in f32 (f64 for f64 inputs)."""
    batch, num_queries, num_heads, head_dim = q.shape
    num_kv_heads, num_keys = k.shape[2], k.shape[1]
    dtype = jnp.float64 if q.dtype == jnp.float64 else jnp.float32
    # Heads first and a group's queries as rows, [B, K, G * T, H]: plain batched matmuls, which CPUs run twice as fast.
    grouped = q.reshape(batch, num_queries, num_kv_heads, -1, head_dim).transpose(0, 2, 3, 1, 4)
    rows = grouped.reshape(batch, num_kv_heads, -1, head_dim)
    keys, values = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)
    scores = jnp.matmul(rows, keys, preferred_element_type=dtype) * (head_dim**-0.5)
    scores = scores.reshape(batch, num_kv_heads, -1, num_queries, num_keys)
    scores = jnp.where(dense_mask(key_range, num_keys)[:, None, None], scores, -jnp.inf)
    # An empty range has no maximum: 0 keeps exp(-inf) = 0 and the sum guards the division.
    peak = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.exp(scores - jnp.where(jnp.isfinite(peak), peak, 0.0))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = (weights / jnp.where(total > 0, total, 1.0)).astype(v.dtype)
    out = jnp.matmul(weights.reshape(batch, num_kv_heads, -1, num_keys), values, preferred_element_type=dtype)
    out = out.reshape(grouped.shape).transpose(0, 3, 1, 2, 4)
    return out.reshape(q.shape).astype(q.dtype)
