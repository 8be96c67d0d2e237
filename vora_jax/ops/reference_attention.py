"""Attention over key ranges by its definition.

Dense: the scores of all queries and keys exist at once. Exact in any float dtype (float64 too), and the quickest for few
keys.
"""
import jax.numpy as jnp

from vora_jax.ops.key_range import MASKED, dense_mask, soft_capped, sum_dtype
from vora_jax.types import KeyRange


def refuses(q, k, v) -> str:
    """Nothing."""
    return ''


def forward(q, k, v, key_range: KeyRange, soft_cap: float | None = None):
    """(out, log_sum), as `ops.attention.Kernels.forward` has it; scores and softmax in f32 (f64 for f64 inputs)."""
    rows, keys, values = _heads_first(q, k.shape[2]), k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)
    scores, mask, _ = _scores(rows, keys, key_range, soft_cap)
    peak = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.where(mask, jnp.exp(scores - peak), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    safe = jnp.where(total > 0, total, 1.0)  # an empty range has none
    out = jnp.matmul(_rows(weights / safe).astype(v.dtype), values, preferred_element_type=scores.dtype)
    log_sum = (peak + jnp.log(safe))[..., 0].reshape(q.shape[0], q.shape[2], q.shape[1])
    return _heads_last(out, q.shape).astype(q.dtype), log_sum


def backward(q, k, v, key_range: KeyRange, log_sum, delta, d_out, soft_cap: float | None = None):
    """(d_q, d_k, d_v), as `ops.attention.Kernels.backward` has it."""
    num_kv_heads, scale = k.shape[2], q.shape[-1] ** -0.5
    rows, d_rows = _heads_first(q, num_kv_heads), _heads_first(d_out, num_kv_heads)
    keys, values = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 3, 1)
    scores, mask, slope = _scores(rows, keys, key_range, soft_cap)
    log_sum, delta = (x.reshape(*scores.shape[:-1], 1) for x in (log_sum, delta))
    weights = jnp.where(mask, jnp.exp(scores - log_sum), 0.0)
    d_weights = jnp.matmul(d_rows, values, preferred_element_type=scores.dtype).reshape(scores.shape)
    d_scores = _rows(weights * (d_weights - delta) * slope * scale).astype(q.dtype)
    d_q = jnp.matmul(d_scores, keys.swapaxes(2, 3), preferred_element_type=scores.dtype)
    d_k = jnp.matmul(d_scores.swapaxes(2, 3), rows, preferred_element_type=scores.dtype)
    d_v = jnp.matmul(_rows(weights).astype(q.dtype).swapaxes(2, 3), d_rows, preferred_element_type=scores.dtype)
    d_k, d_v = (x.transpose(0, 2, 1, 3) for x in (d_k, d_v))
    return _heads_last(d_q, q.shape).astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype)


def _heads_first(x, num_kv_heads: int):
    """[B, T, N, H] -> [B, K, G * T, H]: a group's queries as rows of plain batched matmuls, twice as fast on CPUs."""
    batch, num_queries, _, head_dim = x.shape
    grouped = x.reshape(batch, num_queries, num_kv_heads, -1, head_dim).transpose(0, 2, 3, 1, 4)
    return grouped.reshape(batch, num_kv_heads, -1, head_dim)


def _heads_last(x, shape):
    """[B, K, G * T, H] -> [B, T, N, H]."""
    batch, num_queries, num_heads, head_dim = shape
    return x.reshape(batch, num_heads, num_queries, head_dim).transpose(0, 2, 1, 3)


def _rows(x):
    """[B, K, G, T, S] -> [B, K, G * T, S]."""
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _scores(rows, keys, key_range: KeyRange, soft_cap: float | None):
    """Scaled scores f[B, K, G, T, S], their mask, and the derivative of the soft cap."""
    dtype = sum_dtype(rows)
    batch, num_kv_heads, _, head_dim = rows.shape
    scores = jnp.matmul(rows, keys, preferred_element_type=dtype) * (head_dim**-0.5)
    scores = scores.reshape(batch, num_kv_heads, -1, key_range.start.shape[1], keys.shape[-1])
    scores, slope = soft_capped(scores, soft_cap)
    mask = dense_mask(key_range, keys.shape[-1])[:, None, None]
    return jnp.where(mask, scores, MASKED), mask, slope
