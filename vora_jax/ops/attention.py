"""Attention over key ranges: the only switch.

Query t of a row sees the keys `start[t] <= s < stop[t]`. A packed row of two samples, "a [img img] b" and
"[img img] [img img] c":

    query   start stop   keys 0 1 2 3 4 5 6 7 8
    a         0    1          x . . . . . . . .
    img       0    3          x x x . . . . . .
    img       0    3          x x x . . . . . .
    b         0    4          x x x x . . . . .
    img       4    6          . . . . x x . . .
    img       4    6          . . . . x x . . .
    img       4    8          . . . . x x x x .
    img       4    8          . . . . x x x x .
    c         4    9          . . . . x x x x x

In tiles of 3 queries x 3 keys that is `/ . .`, `/ / .`, `. / /` (`.` empty, `/` partial, `#` full; longer rows have full
ones): implementations visit no empty tile and mask no full one. Masks are data: one compilation serves any of a shape.

To add an implementation: a module with `forward`, `backward` and `refuses` (see `Kernels`), its name in `Implementation`,
a line in `kernels` (and in PLATFORM_KERNELS, if `auto` is to take it), and one in IMPLEMENTATIONS of
tests/ops/test_attention_layouts.py, which holds it to float64.
"""
import functools
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from vora_jax.ops.key_range import sum_dtype
from vora_jax.types import KeyRange

Implementation = Literal['auto', 'reference', 'xla', 'pallas_tpu', 'pallas_gpu']

# Up to so many keys, one dense tile beats blocks. Forward and backward on 2 CPU cores, 8 packed rows, 4-8 heads of 32-64:
# `reference` took 0.8-1.2 times the time of `xla` at 128 keys, 0.5-0.8 at 160, 1.0-1.4 at 192, 1.2-2.5 at 256.
MAX_DENSE_KEYS = 160
# Fewer queries (decoding) would leave most of an accelerator's tile empty.
MIN_TILE_QUERIES = 16
PLATFORM_KERNELS = {'tpu': 'pallas_tpu', 'gpu': 'pallas_gpu', 'cuda': 'pallas_gpu'}


class Kernels(NamedTuple):
    """An implementation. Gradients are written out, so that shards can share one log-sum-exp (`ops.ring_attention`).

    forward: (q, k, v, key_range, soft_cap) -> (out f[B, T, N, H] in q's dtype, log_sum f32[B, N, T]), the log of the sum
        of exponentials of a query's scores; MASKED where it sees nothing, and out is 0.
    backward: (q, k, v, key_range, log_sum, delta, d_out, soft_cap) -> (d_q, d_k, d_v) in the dtypes of q, k and v, where
        delta f32[B, N, T] is `sum(d_out * out)` over H. A query that sees nothing adds nothing to any of them.
    refuses: (q, k, v) -> why these shapes and dtypes cannot be served, '' where they can.
    """

    forward: Callable
    backward: Callable
    refuses: Callable


class Choice(NamedTuple):
    """The implementation that `auto` takes, and why."""

    implementation: Implementation
    reason: str


def attention(q, k, v, key_range: KeyRange, *, implementation: Implementation | Kernels = 'auto',
              soft_cap: float | None = None):
    """f[B, T, N, H]: softmax attention in which query t sees the keys `key_range.start[t] <= s < key_range.stop[t]`.

    Args:
        q: f[B, T, N, H] queries, unscaled; the scale is `H ** -0.5`. T and S may differ.
        k, v: f[B, S, K, H] keys and values; N is a multiple of K and each group of N / K query heads shares one.
        key_range: i32[B, T] twice. A query with an empty range gives 0 and has zero gradients.
        implementation: `reference` (dense), `xla` (blocked, never `[T, S]` for all blocks), `pallas_tpu` and `pallas_gpu`
            (tiles in one kernel), `auto`: what `choose` says for the platform and the shape, or `Kernels` of one's own.
        soft_cap: bounds scores, `cap * tanh(score / cap)` (Gemma 2); None: no bound.

    All values must be finite, also those of slots that nobody sees. In float32 the Pallas kernels multiply in full, the
    others as `jax_default_matmul_precision` says. Without `jax_enable_x64`, except for `reference`.

    Raises:
        ValueError: an unknown implementation, heads that do not divide, or a request that it cannot serve.
    """
    check_soft_cap(soft_cap)
    implementation = resolve(q, k, v, implementation).implementation
    key_range = KeyRange(jnp.maximum(key_range.start, 0), jnp.minimum(key_range.stop, k.shape[1]))
    return _attention(q, k, v, key_range, implementation, soft_cap)


def resolve(q, k, v, implementation: Implementation | Kernels, platform: str | None = None) -> Choice:
    """What serves arrays (or `jax.ShapeDtypeStruct`s) like these, and why: `implementation`, or what `auto` takes.

    Raises:
        ValueError: as `attention` has it; with a platform also a kernel made for another one.
    """
    if q.shape[2] % k.shape[2]:
        raise ValueError(f'attention: {q.shape[2]} query heads cannot share {k.shape[2]} key/value heads evenly.')
    if implementation == 'auto':
        return choose(q, k, v, platform)
    if platform and implementation in {*PLATFORM_KERNELS.values()} - {PLATFORM_KERNELS.get(platform)}:
        reason = f'the devices are of platform {platform}'
    else:
        reason = kernels(implementation).refuses(q, k, v)
    if reason:
        raise ValueError(f'attention: {implementation} cannot serve this: {reason}. Choose auto.')
    return Choice(implementation, 'asked for')


def check_soft_cap(soft_cap: float | None) -> None:
    """Raises ValueError for a cap that bounds nothing."""
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f'attention: soft_cap is {soft_cap}; it must be above 0, or None for no bound.')


def choose(q, k, v, platform: str | None = None) -> Choice:
    """What `auto` takes for arrays (or `jax.ShapeDtypeStruct`s) of these shapes; platform: JAX's default if None."""
    platform = jax.default_backend() if platform is None else platform
    if k.shape[1] <= MAX_DENSE_KEYS:
        return Choice('reference', f'{k.shape[1]} keys are one tile')
    if q.dtype == jnp.float64:
        return Choice('reference', 'only it computes in float64')
    kernel = PLATFORM_KERNELS.get(platform)
    if kernel is None:
        return Choice('xla', f'{platform} has no kernel of its own')
    if q.shape[1] < MIN_TILE_QUERIES:
        return Choice('reference', f'{q.shape[1]} queries do not fill a tile')
    reason = kernels(kernel).refuses(q, k, v)
    return Choice('xla', f'{kernel} cannot: {reason}') if reason else Choice(kernel, platform)


def kernels(implementation: Implementation | Kernels) -> Kernels:
    """The functions of an implementation. Pallas is imported for those that need it: it takes a second."""
    if isinstance(implementation, Kernels):
        return implementation
    if implementation == 'reference':
        from vora_jax.ops import reference_attention as module
    elif implementation == 'xla':
        from vora_jax.ops import blocked_attention as module
    elif implementation == 'pallas_tpu':
        from vora_jax.ops import range_attention_tpu as module
    elif implementation == 'pallas_gpu':
        from vora_jax.ops import range_attention_gpu as module
    else:
        raise ValueError(f'attention: no implementation {implementation!r}; choose one of '
                         f'{", ".join(get_args(Implementation))}.')
    return Kernels(module.forward, module.backward, module.refuses)


def softmax_delta(out, d_out):
    """f32[B, N, T]: `sum(d_out * out)` over H, the softmax's own term of the backward pass."""
    dtype = sum_dtype(out)
    return jnp.sum(d_out.astype(dtype) * out.astype(dtype), axis=-1).swapaxes(1, 2)


def named(out, log_sum):
    """Both under the names that rematerialisation (`nn.remat`) may keep. Named within the forward rule: naming what the
    call returns would not spare the kernel's second run."""
    return checkpoint_name(out, 'attention_out'), checkpoint_name(log_sum, 'attention_log_sum')


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attention(q, k, v, key_range, implementation, soft_cap):
    return kernels(implementation).forward(q, k, v, key_range, soft_cap)[0]


def _forward(q, k, v, key_range, implementation, soft_cap):
    out, log_sum = named(*kernels(implementation).forward(q, k, v, key_range, soft_cap))
    return out, (q, k, v, key_range, out, log_sum)


def _backward(implementation, soft_cap, residuals, d_out):
    q, k, v, key_range, out, log_sum = residuals
    delta = softmax_delta(out, d_out)
    gradients = kernels(implementation).backward(q, k, v, key_range, log_sum, delta, d_out, soft_cap)
    return *gradients, KeyRange(None, None)


_attention.defvjp(_forward, _backward)
