"""Mesh, axis rules, where parameters and rows lie.

The model names the dimensions of its parameters and activations ('vocab', 'embed', ...) and knows no mesh; this file says
which mesh axes each name is cut over, `training.mesh.gather` how cut parameters are made whole where they are used, and
`training.mesh.attend` how attention is cut.
"""
import contextlib
import math
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
from jax.experimental import mesh_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from vora_jax.params import flatten, unflatten
from vora_jax.training import config as config_lib
from vora_jax.types import Params, UserError

AXES = ('data', 'fsdp', 'context', 'tensor')
ROWS = ('data', 'fsdp')  # mesh axes the rows of a batch are cut over

# Logical name -> mesh axes.
RULES = (
    # Parameters: a layer's work is cut over heads, MLP and vocabulary.
    ('vocab', 'tensor'),
    ('heads', 'tensor'),
    ('kv', 'tensor'),
    ('mlp', 'tensor'),
    # Activations: rows and slots.
    ('batch', ROWS),
    ('slots', 'context'),
    ('patches', None),
    ('width', None),
    # Rows of an embedding table are looked up by the devices that hold a slice of its width, for the rows of all of them:
    # the table is never gathered.
    ('rows_of_all', 'data'),
    ('slice', 'fsdp'),
)
# Besides, 'fsdp' cuts each matrix over the first of these dimensions that it divides. Vectors are whole everywhere, and so
# is a matrix with a dimension of no name: too small to be worth gathering.
CUT_FIRST = ('embed', 'vision', 'rank', 'vocab', 'mlp', 'heads', 'kv')
MAX_WHOLE = 2**22  # elements of a matrix that may stay uncut where no dimension divides


def make_mesh(config: config_lib.Mesh, devices: list[Any] | None = None) -> jax.sharding.Mesh:
    """The device mesh with axes `AXES`.

    Raises:
        UserError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(config, axis) for axis in AXES]
    told = ', '.join(f'Mesh.{axis} = {size}' for axis, size in zip(AXES, sizes, strict=True))
    if any(size == 0 or size < -1 for size in sizes) or sizes.count(-1) > 1:
        raise UserError(f'{told}: each must be positive, or -1 (what is left) for one of them.')
    known = math.prod(size for size in sizes if size != -1)
    sizes = [len(devices) // known if size == -1 else size for size in sizes]
    if math.prod(sizes) != len(devices):
        raise UserError(f'{told} does not fit {len(devices)} devices; their product must be that number.')
    if config.gather == 'two_hop' and sizes[2] * sizes[3] > 1:
        raise UserError(f"Mesh.gather = 'two_hop' is for rows and parameters alone; set Mesh.context = {sizes[2]} and "
                        f'Mesh.tensor = {sizes[3]} to 1, or leave Mesh.gather out.')
    types = (jax.sharding.AxisType.Auto,) * len(AXES)
    # GPUs have slice numbers, too, one for each host or NVLink domain: there fsdp may span them.
    slices = len({device.slice_index for device in devices if device.platform == 'tpu' and hasattr(device, 'slice_index')})
    if slices <= 1:
        placed = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
        return jax.sharding.Mesh(placed, AXES, axis_types=types)
    # Between slices lies the slow network: only replicas, which exchange gradients alone, may be that far apart.
    if sizes[0] % slices:
        raise UserError(f'Mesh.data = {sizes[0]} is cut over {slices} slices; choose a multiple of {slices}.')
    placed = mesh_utils.create_hybrid_device_mesh((sizes[0] // slices, *sizes[1:]), (slices, 1, 1, 1), devices,
                                                  allow_split_physical_axes=True)
    return jax.sharding.Mesh(placed, AXES, axis_types=types)


@contextlib.contextmanager
def use(mesh: jax.sharding.Mesh) -> Iterator[None]:
    """Makes the mesh and the rules ambient, for Linen's logical constraints and `shard_map`."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        yield


def check_slots(config: config_lib.Train, mesh: jax.sharding.Mesh) -> None:
    """Raises UserError unless the slots of a row divide over the mesh."""
    slots, parts = config.data.max_slots, mesh.shape['context']
    if slots % parts:
        raise UserError(f'Data.max_slots is {slots}, which the {parts} devices of the mesh axis context do not divide; '
                        f'choose a multiple of {parts}.')


def param_shardings(boxed: Params, mesh: jax.sharding.Mesh, cut: tuple[str, ...] = ('fsdp',)) -> Params:
    """Shardings of a tree of boxed shapes (`jax.eval_shape` of `model.init`), by the logical names in the boxes.

    Args:
        cut: the mesh axes that, as one, cut matrices into shards.

    Raises:
        UserError: a dimension that Mesh.tensor does not divide, or a large matrix that `cut` does not.
    """
    specs = flatten(nn.logical_to_mesh(nn.get_partition_spec(boxed), RULES))
    shapes = flatten(unbox(boxed))
    names = {path: _names(leaf) for path, leaf in flatten(boxed).items()}
    return unflatten({path: NamedSharding(mesh, _spec(path, shape.shape, names[path], specs[path], mesh, cut))
                      for path, shape in shapes.items()})


def _names(leaf: Any) -> tuple[str | None, ...]:
    return leaf.names if _is_box(leaf) else ()


def _spec(path: str, shape: tuple[int, ...], names: tuple[str | None, ...], spec: P, mesh: jax.sharding.Mesh,
          cut: tuple[str, ...]) -> P:
    """The dimension of one parameter that each mesh axis cuts."""
    axes = [axis if axis and mesh.shape[axis] > 1 else None for axis in spec] + [None] * (len(shape) - len(spec))
    for dim, axis in enumerate(axes):
        if axis and shape[dim] % mesh.shape[axis]:
            raise UserError(f'Mesh.{axis} = {mesh.shape[axis]} does not divide dimension {dim} of {path}, of size '
                            f'{shape[dim]}; choose a smaller one.')
    parts = math.prod(mesh.shape[axis] for axis in cut)
    own = [name for name in names if name != 'layers']
    if parts == 1 or len(own) < 2 or None in own:
        return P(*axes)
    for name in CUT_FIRST:
        dim = names.index(name) if name in names else None
        if dim is not None and axes[dim] is None and shape[dim] % parts == 0:
            axes[dim] = cut if len(cut) > 1 else cut[0]
            return P(*axes)
    if math.prod(shape) > MAX_WHOLE:
        raise UserError(f'Mesh: none of the dimensions of {path}, {" x ".join(map(str, shape))}, divides by the {parts} '
                        f'devices of {" x ".join(cut)}; choose a smaller mesh axis.')
    return P(*axes)


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
