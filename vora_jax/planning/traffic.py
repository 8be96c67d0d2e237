"""The least that sharded parameters cost."""
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from vora_jax.planning.memory import Held

ROWS = ('data', 'fsdp')  # the axes whose devices compute different rows with the same weights


class Least(NamedTuple):
    """Bytes of a step for one device: gathered weights, gradients that are scattered, gradients that are summed over
    replicas; and what of it goes over the wire in a ring."""

    gather: float
    scatter: float
    reduce: float
    wire: float


def least_traffic(arrays: Iterable[Held], mesh: Mapping[str, int], itemsize: int, accumulation: int) -> Least:
    """The least traffic with weights, gradients and optimizer cut as they are, each gathered whenever it is used.

    Each micro-batch gathers a weight once for the forward pass and once more for the backward pass, where that is needed
    for what lies below, and scatters its gradient. The embedding table is looked up where it lies; the head and what
    lies below all trained parts are used once. Sums over replicas come once a step.

    itemsize: bytes of an activation, which weights and gradients are cast to.
    """
    parameters = [array for array in arrays if array.part != 'optimizer']
    trained = {_block(array.path) for array in parameters if array.part == 'trainable'}
    gather = scatter = reduce = wire = 0.0
    for array in parameters:
        cut = [axis for axis in array.cut_over if axis in ROWS and mesh[axis] > 1]
        ways = 1
        for axis in cut:
            ways *= mesh[axis]
        others = 1
        for axis in ROWS:
            others *= mesh[axis] if axis not in cut else 1
        shard = array.shard_bytes(mesh) / array.itemsize * min(array.itemsize, itemsize)
        whole = shard * ways
        sent = (ways - 1) / ways
        gathered = whole * _uses(array, trained) * accumulation if ways > 1 else 0.0
        gather, wire = gather + gathered, wire + gathered * sent
        if array.part == 'trainable':
            scattered = whole * accumulation if ways > 1 else 0.0
            summed = shard if others > 1 else 0.0
            scatter, reduce = scatter + scattered, reduce + summed
            wire += scattered * sent + 2 * summed * (others - 1) / others
    return Least(gather, scatter, reduce, wire)


def _block(path: str) -> str:
    """The first two names of a path: `frontend/encoder`."""
    return '/'.join(path.split('/')[:2])


def _uses(array: Held, trained: set[str]) -> int:
    block = _block(array.path)
    if block == 'decoder/embedding':
        return 0
    if array.part == 'teacher' or block == 'decoder/lm_head':
        return 1
    return 2 if block.startswith('decoder/') or block in trained else 1
