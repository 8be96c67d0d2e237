"""Attention over key ranges when the slots of a row lie on several devices (ring attention, arXiv 2310.01889).

Each shard keeps its queries; the keys and values go round a ring, and each shard attends to those that visit it. Ranges
stay contiguous: of the keys `start <= s < stop`, a shard holds its own slots from number `#(own slots < start)` up to
`#(own slots < stop)`, for any split that keeps the order of slots. The outputs of the visits are merged by their
log-sum-exp. Two shards of 8 slots, "a [img img img img]" followed by "b c d":

    contiguous   shard 0: slots 0 1 2 3   shard 1: slots 4 5 6 7
    zigzag       shard 0: slots 0 1 6 7   shard 1: slots 2 3 4 5

                           contiguous               zigzag
    query   start stop     of shard 0  of shard 1   of shard 0  of shard 1
    a         0    1         0 1         0 0          0 1         0 0
    img       0    5         0 4         0 1          0 2         0 3
    b         5    6         4 4         1 2          2 2         3 4
    d         5    8         4 4         1 4          2 4         3 4

A visit that no query of the shard looks at costs no computation. Contiguous is the default: arrays of the model are cut as
they are, and packed rows of samples shorter than a shard look at their own shard and the two beside it, no further. One
causal sample that fills the row is what zigzag is for: contiguously the last shard computes all n visits, in zigzag each
shard computes half of each, so a walk takes about half as long. Its slots must be laid out by `slot_order` when rows are
made, or moved by an all-to-all before and after attention, which pays once attention is most of a layer's time.
"""
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from vora_jax.ops.attention import Implementation, Kernels, check_soft_cap, kernels, named, resolve, softmax_delta
from vora_jax.ops.key_range import sum_dtype
from vora_jax.types import KeyRange

Split = Literal['contiguous', 'zigzag']


def slot_order(split: Split, num_shards: int, num_slots: int) -> np.ndarray:
    """i32[S]: the slots of shard 0, then those of shard 1, ...: `x[:, order]` cut evenly gives each shard its own.

    slot_order('zigzag', 2, 8) is [0, 1, 6, 7, 2, 3, 4, 5].
    """
    chunks = [chunk for shard in range(num_shards) for chunk in _chunks(split, shard, num_shards)]
    if num_slots % len(chunks):
        raise ValueError(f'slot_order: {num_slots} slots cannot be cut into the {len(chunks)} chunks of {split}.')
    return np.arange(num_slots, dtype=np.int32).reshape(len(chunks), -1)[chunks].reshape(-1)


def shard_range(key_range: KeyRange, split: Split, shard, num_shards: int, num_slots: int) -> KeyRange:
    """The part of each range that lies on a shard (int or i32[]) of `num_slots` slots, in the shard's own numbers."""
    chunks = _chunks(split, shard, num_shards)
    if num_slots % len(chunks):
        raise ValueError(f'shard_range: the {num_slots} slots of a shard are not {len(chunks)} chunks of {split}.')
    size = num_slots // len(chunks)

    def below(slot):
        return sum(jnp.clip(slot - chunk * size, 0, size) for chunk in chunks)

    return KeyRange(below(key_range.start), below(key_range.stop))


def ring_attention(q, k, v, key_range: KeyRange, *, axis: str, split: Split = 'contiguous',
                   implementation: Implementation | Kernels = 'auto', soft_cap: float | None = None):
    """f[B, T, N, H]: what `ops.attention.attention` gives, of a shard's own queries.

    To be called inside `shard_map` (with `check_vma=False`) over the mesh axis `axis`. B, T, N, S and K are the shard's.

    Args:
        q: f[B, T, N, H] queries of this shard.
        k, v: f[B, S, K, H] keys and values of this shard's slots; every shard has as many.
        key_range: i32[B, T] twice, ranges of this shard's queries in slot numbers of the whole row.
        axis: the mesh axis that the slots are cut over.
        split: which slots a shard holds.
        implementation, soft_cap: as in `ops.attention.attention`. Half precision: each visit's result is rounded to it.
    """
    check_soft_cap(soft_cap)
    implementation = resolve(q, k, v, implementation).implementation
    return _ring(q, k, v, key_range, axis, split, implementation, soft_cap)


def _chunks(split: Split, shard, num_shards: int) -> tuple:
    """Numbers of the equal chunks of a row that a shard holds, increasing."""
    if split == 'contiguous':
        return (shard,)
    if split == 'zigzag':
        return shard, 2 * num_shards - 1 - shard
    raise ValueError(f'ring_attention: no split {split!r}; choose contiguous or zigzag.')


def _pass_on(tree, axis: str):
    """The arrays of the neighbour before, round the ring."""
    size = jax.lax.axis_size(axis)
    return jax.lax.ppermute(tree, axis, [(shard, (shard + 1) % size) for shard in range(size)])


def _visiting(key_range: KeyRange, step, num_keys: int, axis: str, split: Split):
    """(key range within the shard that visits in this step, whether any query sees any of it)."""
    size = jax.lax.axis_size(axis)
    local = shard_range(key_range, split, (jax.lax.axis_index(axis) - step) % size, size, num_keys)
    return local, jnp.any(local.stop > local.start)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def _ring(q, k, v, key_range, axis, split, implementation, soft_cap):
    return _forward(q, k, v, key_range, axis, split, implementation, soft_cap)[0]


def _forward(q, k, v, key_range, axis, split, implementation, soft_cap):
    attend, wide = kernels(implementation).forward, sum_dtype(q)

    def visit(step, k, v, merged):
        local, seen = _visiting(key_range, step, k.shape[1], axis, split)
        return jax.lax.cond(seen, lambda: _merge(merged, attend(q, k, v, local, soft_cap)), lambda: merged)

    def body(carry, step):
        # The next keys are on their way while these are attended to: neither needs the other.
        (k, v), merged = carry
        return (_pass_on((k, v), axis), visit(step, k, v, merged)), None

    out, log_sum = attend(q, k, v, _visiting(key_range, 0, k.shape[1], axis, split)[0], soft_cap)
    visitor, merged = _pass_on((k, v), axis), (out.astype(wide), log_sum)
    last = jax.lax.axis_size(axis) - 1
    if last:
        (visitor, merged), _ = jax.lax.scan(body, (visitor, merged), jnp.arange(1, last, dtype=jnp.int32))
        merged = visit(last, *visitor, merged)
    out, log_sum = merged
    out, log_sum = named(out.astype(q.dtype), log_sum)
    return out, (q, k, v, key_range, out, log_sum)


def _backward(axis, split, implementation, soft_cap, residuals, d_out):
    q, k, v, key_range, out, log_sum = residuals
    attend_back, wide, delta = kernels(implementation).backward, sum_dtype(q), softmax_delta(out, d_out)

    def visit(step, k, v):
        """(d_q, d_k, d_v) of the pairs of this shard's queries and a visitor's keys."""
        local, seen = _visiting(key_range, step, k.shape[1], axis, split)
        gradients = jax.lax.cond(
            seen, lambda: attend_back(q, k, v, local, log_sum, delta, d_out, soft_cap),
            lambda: tuple(jnp.zeros_like(x) for x in (q, k, v)))
        return [x.astype(wide) for x in gradients]

    def body(carry, step):
        # Sums of key gradients follow their keys, one step behind: they arrive while this visit is computed.
        (k, v), d_q, (d_k, d_v) = carry
        visitor, (d_k, d_v) = _pass_on((k, v), axis), _pass_on((d_k, d_v), axis)
        more_q, more_k, more_v = visit(step, k, v)
        return (visitor, d_q + more_q, (d_k + more_k, d_v + more_v)), None

    d_q, d_k, d_v = visit(0, k, v)
    carry = _pass_on((k, v), axis), d_q, (d_k, d_v)
    (_, d_q, sums), _ = jax.lax.scan(body, carry, jnp.arange(1, jax.lax.axis_size(axis), dtype=jnp.int32))
    d_k, d_v = _pass_on(sums, axis)  # home
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), KeyRange(None, None)


_ring.defvjp(_forward, _backward)


def _merge(one, other):
    """(out, log_sum) of the keys of both: outputs weighted by the share of their sums. Two MASKED ones give 0, MASKED."""
    (out, log_sum), (other_out, other_sum) = one, other
    peak = jnp.maximum(log_sum, other_sum)
    weight, other_weight = jnp.exp(log_sum - peak), jnp.exp(other_sum - peak)
    total = weight + other_weight

    def share(x):
        return (x / total).swapaxes(1, 2)[..., None].astype(out.dtype)

    merged = out * share(weight) + other_out.astype(out.dtype) * share(other_weight)
    return merged, peak + jnp.log(total)
