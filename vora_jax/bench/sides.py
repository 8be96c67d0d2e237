"""What `vora bench attention` times: our implementations, and what else computes attention.

Each function below gives a `Side`, or raises an error that says why it cannot run here.
"""
import functools
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vora_jax.ops.attention import attention
from vora_jax.ops.key_range import dense_mask
from vora_jax.types import Array, KeyRange

MAX_DENSE_BYTES = 8 * 2**30


class Case(NamedTuple):
    """The call to time. q, d_out: f[B, S, N, H]; k, v: f[B, S, K, H]; segment_id: i32[B, S]."""

    q: Array
    k: Array
    v: Array
    d_out: Array
    key_range: KeyRange
    segment_id: Array
    soft_cap: float | None = None


class Side(NamedTuple):
    """forward() -> out; both() -> (out, d_q, d_k, d_v), in any layout; computed(out) -> f32[B, S, N, H] NumPy.

    same_mask: it computes what the others do.
    """

    forward: Callable[[], Any]
    both: Callable[[], Any]
    computed: Callable[[Any], np.ndarray] = functools.partial(np.asarray, dtype=np.float32)
    same_mask: bool = True


def random_case(key_range: KeyRange, segment_id, num_heads: int, num_kv_heads: int, head_dim: int, dtype: str, seed: int,
                soft_cap: float | None = None) -> Case:
    """Normal queries, keys, values and cotangents for a mask, on JAX's default device."""
    rng = np.random.default_rng(seed)
    shapes = [(*key_range.start.shape, heads, head_dim) for heads in (num_heads, num_kv_heads, num_kv_heads, num_heads)]
    tensors = [jnp.asarray(rng.standard_normal(shape, np.float32), dtype) for shape in shapes]
    return Case(*tensors, KeyRange(*map(jnp.asarray, key_range)), jnp.asarray(segment_id), soft_cap)


def range_attention(case: Case, implementation: str) -> Side:
    """`ops.attention.attention` as a training step calls it."""
    attend = functools.partial(attention, implementation=implementation, soft_cap=case.soft_cap)
    return _jax_side(attend, (case.q, case.k, case.v), case.d_out, case.key_range)


def dot_product_attention(case: Case) -> Side:
    """`jax.nn.dot_product_attention` with the boolean mask, which is made beforehand."""
    if case.soft_cap is not None:
        raise ValueError('it has no soft cap')
    batch, slots, num_heads, _ = case.q.shape
    needed = 3 * 4 * batch * num_heads * slots**2  # scores, weights and their gradient in float32
    if needed > MAX_DENSE_BYTES:
        raise ValueError(f'its scores would take about {needed / 2**30:,.0f} GiB, the limit is '
                         f'{MAX_DENSE_BYTES / 2**30:.0f}')
    mask = jax.jit(dense_mask, static_argnums=1)(case.key_range, slots)[:, None]
    return _jax_side(lambda q, k, v, mask: jax.nn.dot_product_attention(q, k, v, mask=mask),
                     (case.q, case.k, case.v), case.d_out, mask)


def splash_attention(case: Case, interpret: bool = False) -> Side:
    """JAX's splash attention with a causal mask and segment ids: images are causal too, it has no other way.

    interpret: runs the kernel's Python, for tests without a TPU.
    """
    if jax.default_backend() != 'tpu' and not interpret:
        raise ValueError('it needs a TPU')
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # late: Pallas takes a second to import
    _, slots, num_heads, head_dim = case.q.shape
    block = next((size for size in (512, 256, 128) if slots % size == 0), None)
    if block is None:
        raise ValueError(f'its blocks do not divide {slots} slots')
    names = ('block_q', 'block_kv', 'block_kv_compute', 'block_q_dkv', 'block_kv_dkv', 'block_kv_dkv_compute',
             'block_q_dq', 'block_kv_dq')
    causal = splash.MultiHeadMask([splash.CausalMask((slots, slots))] * num_heads)
    kernel = splash.make_splash_mha_single_device(
        causal, block_sizes=splash.BlockSizes(**dict.fromkeys(names, block)), attn_logits_soft_cap=case.soft_cap,
        interpret=interpret)

    def attend(q, k, v, segment_id):
        ids = splash.SegmentIds(segment_id, segment_id)
        return jax.vmap(kernel)(q, k, v, ids)
    q, k, v, d_out = (jnp.swapaxes(x, 1, 2) for x in (case.q * head_dim**-0.5, case.k, case.v, case.d_out))
    side = _jax_side(attend, (q, k, v), d_out, case.segment_id)
    return side._replace(computed=lambda out: np.asarray(out, np.float32).swapaxes(1, 2), same_mask=False)


def torch_attention(case: Case) -> Side:
    """torch's `scaled_dot_product_attention` with the boolean mask, on the same kind of device."""
    if not importlib.util.find_spec('torch'):
        raise ValueError('torch is not installed (extra `torch`)')
    if case.soft_cap is not None:
        raise ValueError('it has no soft cap')
    from vora_jax.bench.torch_attention import masked_attention
    mask = np.array(dense_mask(case.key_range, case.k.shape[1]))
    arrays = [np.array(x, np.float32) for x in (case.q, case.k, case.v, case.d_out)]
    calls = masked_attention(*arrays, mask, str(case.q.dtype), jax.default_backend())
    return Side(*calls)


BASELINES = {'jax.nn.dot_product_attention': dot_product_attention, 'splash, causal + segments': splash_attention,
             'torch SDPA': torch_attention}


def _jax_side(attend: Callable, inputs: tuple, d_out, mask) -> Side:
    """A side of a function (q, k, v, mask) -> out; the mask is data, as it is in training."""
    @jax.jit
    def both(inputs, mask, d_out):
        out, pull = jax.vjp(lambda *inputs: attend(*inputs, mask), *inputs)
        return out, *pull(d_out)
    forward = jax.jit(lambda inputs, mask: attend(*inputs, mask))
    return Side(functools.partial(forward, inputs, mask), functools.partial(both, inputs, mask, d_out))
