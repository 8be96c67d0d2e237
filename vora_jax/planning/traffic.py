"""The least that sharded parameters cost."""
import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from vora_jax.planning.memory import Held

ROWS = ('data', 'fsdp')  # the axes whose devices compute different rows with the same weights


class Least(NamedTuple):
    """Bytes of a step for one device: gathered weights, gradients that are scattered, gradients that are summed over
    replicas and parts of rows; and what of it goes over the wire in rings: in all, and by the devices of a ring."""

    gather: float
    scatter: float
    reduce: float
    wire: float
    groups: Mapping[int, float]


def least_traffic(arrays: Iterable[Held], mesh: Mapping[str, int], itemsize: int, accumulation: int) -> Least:
    """The least traffic with weights, gradients and optimizer cut as they are, each gathered whenever it is used.

    Each micro-batch gathers a weight once for the forward pass and once more for the backward pass, where that is needed
    for what lies below, and scatters its gradient. The embedding table is looked up where it lies; as a tied head, and as
    an own one, it is used once. Sums over replicas, and over devices with other slots of the same rows (context), come
    once a step. A lower bound: rows of the table, activations cut over context or tensor, and padding are left out. It is
    none for a program that keeps gathered weights for the backward pass, or sums gradients whole.

    itemsize: bytes of an activation, which weights and gradients are cast to.
    """
    parameters = [array for array in arrays if array.part != 'optimizer']
    trained = frozenset(array.path for array in parameters if array.part == 'trainable')
    tied = not any(array.path.startswith('decoder/lm_head') for array in parameters)
    gather = scatter = reduce = wire = 0.0
    groups: dict[int, float] = {}
    for array in parameters:
        cut = [axis for axis in array.cut_over if axis in ROWS and mesh[axis] > 1]
        ways = math.prod(mesh[axis] for axis in cut)
        others = math.prod(mesh[axis] for axis in (*ROWS, 'context') if axis not in cut)
        shard = array.shard_bytes(mesh) / array.itemsize * min(array.itemsize, itemsize)
        whole = shard * ways
        gathered = whole * uses(array, trained, tied) * accumulation if ways > 1 else 0.0
        scattered = whole * accumulation if ways > 1 and array.part == 'trainable' else 0.0
        summed = shard if others > 1 and array.part == 'trainable' else 0.0
        gather, scatter, reduce = gather + gathered, scatter + scattered, reduce + summed
        for group, moved in ((ways, gathered + scattered), (others, 2 * summed)):
            sent = moved * (group - 1) / group
            wire += sent
            if sent:
                groups[group] = groups.get(group, 0.0) + sent
    return Least(gather, scatter, reduce, wire, groups)


def uses(array: Held, trained: frozenset[str], tied: bool) -> int:
    """How often a pass over a micro-batch multiplies with a weight: forward, and backward for what lies below it.

    tied: the embedding table is the head, too.
    """
    names = array.path.split('/')
    block = '/'.join(names[:2])
    if block == 'decoder/embedding':
        return int(tied)
    if block == 'frontend/encoder':
        return 2 if any(path.startswith(block + '/') for path in trained) else 1
    if block != 'decoder/layers':
        return 1 if array.part == 'teacher' or block == 'decoder/lm_head' or not _below(trained, math.inf) else 2
    return 2 if _below(trained, int(names[2].removeprefix('group_'))) else 1


def _below(trained: Iterable[str], group: float) -> bool:
    """True where something is trained in the layers of the decoder's groups up to this one, or below them."""
    for path in trained:
        names = path.split('/')
        if names[:2] != ['decoder', 'layers']:
            if names[:2] == ['decoder', 'embedding'] or names[0] in ('frontend', 'modality_embedding'):
                return True
        elif int(names[2].removeprefix('group_')) <= group and names[3] != 'side':
            return True
    return False
