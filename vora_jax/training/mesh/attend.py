"""Attention, cut over a mesh."""
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from vora_jax.batch import Batch
from vora_jax.ops.attention import Choice, Implementation, attention, resolve
from vora_jax.ops.ring_attention import ring_attention
from vora_jax.training.config import HowToGather
from vora_jax.training.mesh.sharding import ROWS
from vora_jax.types import Array, KeyRange, UserError


class AttentionCut(NamedTuple):
    """How one call of attention lies on a mesh: specs of f[B, T, N, H] and f[B, S, K, H], whether keys go round a ring,
    and what computes each shard."""

    queries: P
    keys: P
    ring: bool
    choice: Choice


def cut_attention(mesh: jax.sharding.Mesh, q: Array, k: Array, v: Array, implementation: Implementation) -> AttentionCut:
    """How a call with arrays (or shapes) like these lies on the mesh.

    Rows are cut over data and fsdp, heads over tensor: no shard needs anything of another. Slots are cut over context:
    those of queries and keys alike, with a ring, where both are as many (a row attends to itself); otherwise (a cache,
    prompts, one query per image) each shard holds all keys. Queries that do not divide are whole on each shard too.

    Raises:
        UserError: the key/value heads do not divide, or a shard cannot be served by the implementation.
    """
    tensor, context = mesh.shape['tensor'], mesh.shape['context']
    if k.shape[2] % tensor:
        raise UserError(f'Mesh.tensor = {tensor} does not divide the {k.shape[2]} key/value heads.')
    query_slots = None if q.shape[1] % context else 'context'
    ring = context > 1 and query_slots is not None and q.shape[1] == k.shape[1]
    queries, keys = P(ROWS, query_slots, 'tensor', None), P(ROWS, 'context' if ring else None, 'tensor', None)
    shards = [jax.ShapeDtypeStruct(NamedSharding(mesh, spec).shard_shape(x.shape), x.dtype)
              for x, spec in zip((q, k, v), (queries, keys, keys))]
    try:
        choice = resolve(*shards, implementation, mesh.devices.flat[0].platform)
    except ValueError as error:
        raise UserError(f'Train.attention = {implementation!r}: {error}') from error
    return AttentionCut(queries, keys, ring, choice)


def make_attend(mesh: jax.sharding.Mesh, implementation: Implementation = 'auto',
                how: HowToGather = 'compiler') -> Callable[..., Array]:
    """`ops.attention.attention`, cut over the mesh by `cut_attention`; `implementation` is what its `auto` stands for.

    `auto` itself is resolved for the mesh's devices, which may not be those of this process. With 'two_hop' gathers the
    call is within a `shard_map` already.
    """
    own = implementation

    def attend(q: Array, k: Array, v: Array, key_range: KeyRange, *, implementation: Implementation = 'auto',
               soft_cap: float | None = None) -> Array:
        asked = own if implementation == 'auto' else implementation
        if how == 'two_hop':
            choice = resolve(q, k, v, asked, mesh.devices.flat[0].platform)
            return attention(q, k, v, key_range, implementation=choice.implementation, soft_cap=soft_cap)
        cut = cut_attention(mesh, q, k, v, asked)
        compute = functools.partial(ring_attention, axis='context') if cut.ring else attention
        compute = functools.partial(compute, implementation=cut.choice.implementation, soft_cap=soft_cap)
        if mesh.size == 1:
            return compute(q, k, v, key_range)
        slots = P(*cut.queries[:2])
        # Unchecked: kernels do not tell which axes their results vary over.
        shards = jax.shard_map(compute, mesh=mesh, in_specs=(cut.queries, cut.keys, cut.keys, KeyRange(slots, slots)),
                               out_specs=cut.queries, check_vma=False)
        return shards(q, k, v, key_range)

    return attend


def language_attention(model: Any, batch: Batch, mesh: jax.sharding.Mesh, implementation: Implementation) -> str:
    """What computes the language model's attention and why, such as `xla (cpu has no kernel of its own)`; '' for a model
    without one.

    Raises:
        UserError: as `cut_attention` has it.
    """
    llm = getattr(model, 'llm', None)
    if llm is None:
        return ''
    q, k = (jax.ShapeDtypeStruct((*batch.tokens.shape, heads, llm.head_dim), llm.dtype)
            for heads in (llm.num_heads, llm.num_kv_heads))
    cut = cut_attention(mesh, q, k, k, implementation)
    told = f'{cut.choice.implementation} ({cut.choice.reason})'
    return told + f', keys in a ring of {mesh.shape["context"]} devices' if cut.ring else told
