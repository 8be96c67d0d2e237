"""Parameters that are computed layer by layer.

A parameter of an export may be an array or one of these: `shape` and `dtype` as an array, and `leaf[layer]` computes one
layer (`whole(leaf)` the one array of a parameter without layers). So a merge never holds a second copy of the model.
"""
import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from vora_jax.nn.adapters import LowRank
from vora_jax.types import Array

F32 = jnp.dtype('float32')


@dataclasses.dataclass(frozen=True)
class Computed:
    """A parameter that `make(layer)` computes; layer None: it is not stacked."""

    shape: tuple[int, ...]
    dtype: jnp.dtype
    make: Callable[[int | None], Array]

    def __getitem__(self, layer: int) -> Array:
        return self.make(layer)


@dataclasses.dataclass(frozen=True)
class FoldedKernel:
    """f32[L, D_in, D_out]: kernels plus the products of their adapters.

    kernel: [L, D_in, D_out].    branches: (adapter, {'a': [L, D_in, R], 'b': [L, R, D_out]}) in order.
    """

    kernel: Array
    branches: tuple[tuple[LowRank, dict[str, Array]], ...]
    dtype: jnp.dtype = F32

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.kernel.shape)

    def __getitem__(self, layer: int) -> jax.Array:
        """f32[D_in, D_out], exactly as `merge` computes it."""
        kernel = self.kernel[layer]
        for adapter, branch in self.branches:
            kernel = _fold(adapter, kernel, {side: leaf[layer] for side, leaf in branch.items()})
        return kernel


@functools.partial(jax.jit, static_argnums=0)
def _fold(adapter: LowRank, kernel: jax.Array, branch: dict[str, jax.Array]) -> jax.Array:
    return adapter.fold(kernel, branch)


def zeros(shape: tuple[int, ...], dtype: jnp.dtype) -> Computed:
    """A stacked parameter of zeros."""
    return Computed(tuple(shape), jnp.dtype(dtype), lambda layer: jnp.zeros(shape if layer is None else shape[1:], dtype))


def scaled(leaf: Array, factor: float) -> Array | Computed:
    """The stacked parameter times a number."""
    if factor == 1:
        return leaf
    dtype = jnp.dtype(leaf.dtype)
    return Computed(tuple(leaf.shape), dtype, lambda layer: jnp.asarray(leaf[layer]) * jnp.asarray(factor, dtype))


def extended(leaf: Array, num_rows: int, axis: int) -> Array | Computed:
    """The array with `num_rows` more entries along `axis`, each the mean of those that are there (taken in f32)."""
    if not num_rows:
        return leaf
    shape = tuple(size + num_rows * (i == axis) for i, size in enumerate(leaf.shape))
    return Computed(shape, jnp.dtype(leaf.dtype), lambda _: _with_means(leaf, num_rows, axis))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _with_means(x: jax.Array, num_rows: int, axis: int) -> jax.Array:
    mean = jnp.mean(x.astype(jnp.float32), axis=axis, keepdims=True).astype(x.dtype)
    return jnp.concatenate([x, jnp.repeat(mean, num_rows, axis=axis)], axis=axis)


def part(leaf: Array | Computed | FoldedKernel, layer: int | None) -> Array:
    """One layer of a parameter, or all of one that has no layers."""
    if layer is not None:
        return leaf[layer]
    return leaf.make(None) if isinstance(leaf, Computed) else leaf
