"""How a tensor lies on both sides."""
import dataclasses
from collections.abc import Callable

from vora_jax.types import Array

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one tensor lies in memory here and in a foreign file. Takes NumPy arrays and JAX arrays, also traced ones.

    export: our array -> theirs.    restore: (their array, our shape) -> ours.    shape: our shape -> theirs.
    axis: of their array, along which several of our parameters may lie one after another (fused qkv).
    """

    export: Callable[[Array], Array]
    restore: Callable[[Array, Shape], Array]
    shape: Callable[[Shape], Shape]
    axis: int = 0


def _leading(count: int) -> Layout:
    """Ours [C], theirs with leading dimensions of 1: [1, C] or [1, 1, C], pieces along the last of these."""
    return Layout(lambda x: x.reshape((1,) * count + x.shape), lambda x, shape: x.reshape(shape),
                  lambda shape: (1,) * count + shape, axis=count - 1)


def _patch_side(patch_dim: int) -> int:
    return round((patch_dim // 3) ** 0.5)


SAME = Layout(lambda x: x, lambda x, _: x, lambda shape: shape)
# Kernels: ours [in, out], theirs [out, in].
TRANSPOSED = Layout(lambda x: x.T, lambda x, _: x.T, lambda shape: shape[::-1])
# Patch kernel: ours [p * p * 3, C] in (row, column, channel) order, theirs [C, 3, p, p] as a convolution.
CONVOLUTION = Layout(
    lambda x: x.reshape(_patch_side(len(x)), _patch_side(len(x)), 3, -1).transpose(3, 2, 0, 1),
    lambda x, shape: x.transpose(2, 3, 1, 0).reshape(shape),
    lambda shape: (shape[1], 3, _patch_side(shape[0]), _patch_side(shape[0])))
# Position table: ours [R, K, C], theirs [R * K, C] or [1, R * K, C].
TABLE = Layout(lambda x: x.reshape(-1, x.shape[-1]), lambda x, shape: x.reshape(shape),
               lambda shape: (shape[0] * shape[1], shape[2]))
BATCHED_TABLE = Layout(lambda x: x.reshape(1, -1, x.shape[-1]), lambda x, shape: x.reshape(shape),
                       lambda shape: (1, shape[0] * shape[1], shape[2]), axis=1)
LEADING_1, LEADING_2 = _leading(1), _leading(2)
# Kernels that others hold as a convolution over slots of width 1: ours [in, out], theirs [out, in, 1].
POINTWISE = Layout(lambda x: x.T[..., None], lambda x, _: x[..., 0].T, lambda shape: (*shape[::-1], 1))
# The same in groups, each of which reads its own part of the input: ours [G, in / G, out / G], theirs [out, in / G, 1].
GROUPED_POINTWISE = Layout(
    lambda x: x.transpose(0, 2, 1).reshape(-1, x.shape[1], 1),
    lambda x, shape: x.reshape(shape[0], shape[2], shape[1]).transpose(0, 2, 1),
    lambda shape: (shape[0] * shape[2], shape[1], 1))
