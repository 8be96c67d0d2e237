"""Cross-entropy, cut over a mesh."""
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from vora_jax.ops.cross_entropy import cross_entropy_sum
from vora_jax.training.config import HowToGather
from vora_jax.training.mesh.sharding import ROWS
from vora_jax.types import Array

SLOTS = (*ROWS, 'context')  # mesh axes the slots of a batch are cut over


def make_cross_entropy(mesh: jax.sharding.Mesh, how: HowToGather = 'compiler') -> Callable[..., Array]:
    """`ops.cross_entropy.cross_entropy_sum`, each device on its own slots.

    Its loop then needs no other device: the gradient of a trained head is summed over devices once and not in each chunk.
    The vocabulary stays cut over tensor, by XLA. With 'two_hop' gathers the call is within a `shard_map` already.
    """
    if mesh.size == 1 or how == 'two_hop':
        return cross_entropy_sum

    def local(*arrays):
        return cross_entropy_sum(*arrays)[None]

    slots = P(ROWS, 'context')
    cut = jax.shard_map(local, mesh=mesh, in_specs=(slots, P(), slots, slots), out_specs=P(SLOTS), axis_names={*SLOTS},
                        check_vma=False)
    return lambda hidden, unembedding, targets, mask: jnp.sum(cut(hidden, unembedding, targets, mask))
