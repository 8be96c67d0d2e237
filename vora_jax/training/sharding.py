"""Mesh, axis rules, and sharded attention.

The only file that knows mesh axes. The model names the dimensions of its parameters ('vocab', 'embed', ...);
`RULES` says which mesh axes each name is cut over.
"""
import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from vora_jax.ops.attention import attention
from vora_jax.params import flatten
from vora_jax.training import config as config_lib
from vora_jax.types import Array, KeyRange, Params, UserError

AXES = ('data', 'fsdp', 'tensor')
ROWS = ('data', 'fsdp')  # mesh axes the rows of a batch are cut over

# Logical name -> mesh axes. A mesh axis is used once per parameter and the first rule wins, so 'vocab' takes
# 'fsdp' from 'embed': cutting the embedding table's width over 'fsdp' makes XLA gather the whole table in
# each step.
RULES = (
    ('batch', ROWS),
    ('vocab', ('fsdp', 'tensor')),
    ('heads', 'tensor'),
    ('kv', 'tensor'),
    ('mlp', 'tensor'),
    ('embed', 'fsdp'),
    ('vision', None),
    ('pixels', None),
    ('layers', None),
    ('rank', None),
    ('slots', None),
    ('head_dim', None),
)


def make_mesh(config: config_lib.Mesh, devices: list[Any] | None = None) -> jax.sharding.Mesh:
    """The device mesh with axes ('data', 'fsdp', 'tensor').

    Raises:
        UserError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, config.fsdp, config.tensor]
    told = f'Mesh.data = {config.data}, Mesh.fsdp = {config.fsdp}, Mesh.tensor = {config.tensor}'
    if any(size == 0 or size < -1 for size in sizes) or sizes.count(-1) > 1:
        raise UserError(f'{told}: each must be positive, or -1 (what is left) for one of them.')
    known = math.prod(size for size in sizes if size != -1)
    sizes = [len(devices) // known if size == -1 else size for size in sizes]
    if math.prod(sizes) != len(devices):
        raise UserError(f'{told} does not fit {len(devices)} devices; their product must be that number.')
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3, devices=devices)


@contextlib.contextmanager
def use(mesh: jax.sharding.Mesh) -> Iterator[None]:
    """Makes the mesh and the rules ambient, for Linen's logical constraints and `shard_map`."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        yield


def check_rows(config: config_lib.Train, mesh: jax.sharding.Mesh) -> None:
    """Raises UserError unless the rows of a micro-batch divide over the mesh."""
    rows, parts = config.batch_rows // config.accumulation, mesh.shape['data'] * mesh.shape['fsdp']
    if rows % parts:
        raise UserError(
            f'Train.batch_rows / Train.accumulation is {rows} rows, which the {parts} devices of the mesh '
            'axes data '
            f'({mesh.shape["data"]}) and fsdp ({mesh.shape["fsdp"]}) do not divide; choose a multiple of '
            f'{parts}.'
        )


def param_shardings(boxed: Params, mesh: jax.sharding.Mesh) -> Params:
    """Shardings of a tree of boxed shapes (`jax.eval_shape` of `model.init`), by the logical names in the
    boxes.

    Raises:
        UserError: a dimension that its mesh axes do not divide.
    """
    shardings = nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, RULES)
    shapes = flatten(unbox(boxed))
    for path, sharding in flatten(shardings).items():
        for dim, axes in enumerate(sharding.spec):
            axes = (axes,) if isinstance(axes, str) else tuple(axes or ())
            parts = math.prod(mesh.shape[axis] for axis in axes)
            if shapes[path].shape[dim] % parts:
                raise UserError(
                    f'Mesh: dimension {dim} of {path} has size {shapes[path].shape[dim]}, which the {parts} '
                    'devices '
                    f'of {" x ".join(axes)} do not divide; choose a smaller mesh axis.'
                )
    return shardings


def unbox(boxed: Params) -> Params:
    """The tree without its boxes. (`nn.unbox` also constrains shardings, which shapes cannot bear.)"""
    return jax.tree.map(lambda x: x.value if _is_box(x) else x, boxed, is_leaf=_is_box)


def num_stacked(boxed: Params) -> Params:
    """How many dimensions of each parameter stack layers."""
    return jax.tree.map(lambda x: x.names.count('layers') if _is_box(x) else 0, boxed, is_leaf=_is_box)


def _is_box(node: Any) -> bool:
    return isinstance(node, nn.Partitioned)


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """On every device the whole array."""
    return NamedSharding(mesh, P())


def rows(mesh: jax.sharding.Mesh) -> NamedSharding:
    """The first dimension (rows of a batch) cut over data and fsdp."""
    return NamedSharding(mesh, P(ROWS))


def like_params(tree: Any, params: Params, shardings: Params, mesh: jax.sharding.Mesh) -> Any:
    """Shardings of an optimizer state: copies of the parameters like these, the rest replicated."""
    structure = jax.tree.structure(params)

    def is_copy(node: Any) -> bool:
        return jax.tree.structure(node) == structure

    return jax.tree.map(
        lambda node: shardings if is_copy(node) else jax.tree.map(lambda _: replicated(mesh), node),
        tree,
        is_leaf=is_copy,
    )


def to_device(tree: Any, sharding: NamedSharding) -> Any:
    """Device arrays of this process's rows of a batch (NumPy leaves)."""
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), tree)


def make_attend(mesh: jax.sharding.Mesh) -> Callable[..., Array]:
    """`ops.attention.attention`, cut over rows (data, fsdp) and heads (tensor) where the mesh has several
    devices.

    Attention mixes slots of one row and one head only, so no shard needs anything of another.

    Raises (when called):
        UserError: the key/value heads do not divide over the tensor axis.
    """
    if mesh.size == 1:
        return attention

    def attend(q: Array, k: Array, v: Array, keys: KeyRange, **options: Any) -> Array:
        tensor = mesh.shape['tensor']
        if k.shape[2] % tensor:
            raise UserError(f'Mesh.tensor = {tensor} does not divide the {k.shape[2]} key/value heads.')
        heads, slots = P(ROWS, None, 'tensor', None), P(ROWS, None)
        cut = jax.shard_map(
            functools.partial(attention, **options),
            mesh=mesh,
            in_specs=(heads, heads, heads, KeyRange(slots, slots)),
            out_specs=heads,
        )
        return cut(q, k, v, keys)

    return attend
