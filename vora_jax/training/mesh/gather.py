"""Cut parameters, made whole where they are used.

A matrix that `fsdp` cuts lies in shards; the layer that uses it gathers it first, in the dtype it computes in, and drops it
afterwards; its gradient goes back to the shards as a sum over the devices that share them. Without this XLA may choose to
gather activations instead, or to gather in float32.

    compiler   `jit` sees the whole program, and a gather is a constraint: XLA makes the collectives.
    two_hop    the gradient is computed in one `shard_map` and the collectives are ours: matrices are cut over data x fsdp,
               gathered over fsdp and then over data. Two short rings move what one long ring does not, see the README.
"""
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from vora_jax.nn.stack import Gather
from vora_jax.params import flatten, unflatten
from vora_jax.training.config import HowToGather
from vora_jax.training.mesh.sharding import ROWS
from vora_jax.types import Array, Params


def cut_axes(how: HowToGather) -> tuple[str, ...]:
    """The mesh axes that matrices are cut over."""
    return ROWS if how == 'two_hop' else ('fsdp',)


def make_gather(places: dict[str, NamedSharding], stacked: dict[str, int], dtype: jnp.dtype,
                how: HowToGather = 'compiler') -> Gather | None:
    """(path, tree) -> tree: the parameters of the layer at a path, whole; at '' all those that are in no stack of layers.
    None where nothing is cut.

    Args:
        places: of each parameter, by path.
        stacked: how many of its first dimensions are layers.
        dtype: in which cut matrices are gathered.
    """
    dims = {path: _cut_dim(place.spec) for path, place in places.items()}
    if not any(dim is not None for dim in dims.values()):
        return None

    def whole(path: str, value: Array) -> Array:
        dim, layers = dims[path], stacked[path]
        if dim is None or (how == 'compiler' and _is_looked_up(path, places)):
            return value
        if how == 'two_hop':
            return _two_hop(value, dim - layers, dtype)
        place = places[path]
        return _constrained(value, NamedSharding(place.mesh, P(*place.spec[layers:])), dim - layers, dtype)

    def gather(path: str, tree: Params) -> Params:
        if path:
            return {'params': unflatten({key: whole(f'{path}/{key}', value)
                                         for key, value in flatten(tree['params']).items()})}
        return unflatten({key: value if stacked[key] else whole(key, value) for key, value in flatten(tree).items()})

    return gather


def _cut_dim(spec: P) -> int | None:
    """The dimension that is cut over rows' axes."""
    for dim, axes in enumerate(spec):
        if axes and set((axes,) if isinstance(axes, str) else axes) & {*ROWS}:
            return dim
    return None


def _is_looked_up(path: str, places: dict[str, NamedSharding]) -> bool:
    """True for an embedding table that is not the head, too: `Decoder.embed` reads it where it lies."""
    return path.endswith('/embedding') and path.replace('/embedding', '/lm_head') in places


def _constrained(value: Array, place: NamedSharding, dim: int, dtype: jnp.dtype) -> Array:
    held, spec = value.dtype, P(*(None if i == dim else axes for i, axes in enumerate(place.spec)))

    def forward(value):
        # First where it lies, in the dtype that travels: XLA would as well gather and then round.
        local = lax.with_sharding_constraint(value.astype(dtype), place)
        return lax.with_sharding_constraint(local, NamedSharding(place.mesh, spec)).astype(held)

    return _gathered(value, forward, lambda gradient: lax.with_sharding_constraint(gradient, place))


def _two_hop(value: Array, dim: int, dtype: jnp.dtype) -> Array:
    held = value.dtype

    def forward(value):
        near = lax.all_gather(value.astype(dtype), 'fsdp', axis=dim, tiled=True)
        return lax.all_gather(near, 'data', axis=dim, tiled=True).astype(held)

    def backward(gradient):
        far = lax.psum_scatter(gradient, 'data', scatter_dimension=dim, tiled=True)
        return lax.psum_scatter(far, 'fsdp', scatter_dimension=dim, tiled=True)

    return _gathered(value, forward, backward)


def _gathered(value: Array, forward: Callable[[Array], Array], backward: Callable[[Array], Array]) -> Array:
    gathered = jax.custom_vjp(forward)
    gathered.defvjp(lambda value: (forward(value), None), lambda _, gradient: (backward(gradient),))
    return gathered(value)


def in_shards(gradient: Callable, trainable: Params, frozen: Params, mesh: jax.sharding.Mesh) -> Callable:
    """`gradient(trainable, frozen, batch, total, key) -> (sums, gradient)`, each device on its own rows and shards.

    Sums are added up over all devices, and so are gradients of what is not cut. Each device drops out by a key of its own.

    Args:
        gradient: of a loss that is a sum over rows, divided by counts of the whole batch (`total`).
        trainable, frozen: shardings.
    """
    cut, whole = (jax.tree.map(lambda place: place.spec, tree) for tree in (trainable, frozen))

    def local(trainable, frozen, batch, total, key):
        key = jax.random.fold_in(key, lax.axis_index(ROWS))
        with nn.logical_axis_rules(()):  # there is nothing left to constrain
            sums, gradients = gradient(trainable, frozen, batch, total, key)
        gradients = jax.tree.map(lambda one, spec: lax.psum(one, ROWS) if _cut_dim(spec) is None else one, gradients, cut)
        return lax.psum(sums, ROWS), gradients

    # Unchecked: kernels do not tell which axes their results vary over.
    return jax.shard_map(local, mesh=mesh, in_specs=(cut, whole, P(ROWS), P(), P()), out_specs=(P(), cut), check_vma=False)
