"""Mesh, axis rules, and sharded attention.

The only file that knows mesh axes. The model names the dimensions of its parameters ('vocab', 'embed', ...);
`RULES` says which mesh axes each name is cut over.
"""
import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from vora_jax.batch import Batch
from vora_jax.ops.attention import Choice, Implementation, attention, resolve
from vora_jax.ops.ring_attention import ring_attention
from vora_jax.params import flatten
from vora_jax.training import config as config_lib
from vora_jax.types import Array, KeyRange, Params, UserError

AXES = ('data', 'fsdp', 'context', 'tensor')
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
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES), devices=devices)


@contextlib.contextmanager
def use(mesh: jax.sharding.Mesh) -> Iterator[None]:
    """Makes the mesh and the rules ambient, for Linen's logical constraints and `shard_map`."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        yield


def check_rows(config: config_lib.Train, mesh: jax.sharding.Mesh) -> None:
    """Raises UserError unless the rows of a micro-batch divide over the mesh and each lies in one process."""
    rows, parts = config.batch_rows // config.accumulation, mesh.shape['data'] * mesh.shape['fsdp']
    if rows % parts:
        raise UserError(
            f'Train.batch_rows / Train.accumulation is {rows} rows, which the {parts} devices of the mesh '
            'axes data '
            f'({mesh.shape["data"]}) and fsdp ({mesh.shape["fsdp"]}) do not divide; choose a multiple of '
            f'{parts}.'
        )
    readers: dict[tuple[int, ...], set[int]] = {}
    for place, device in np.ndenumerate(mesh.devices):
        readers.setdefault(place[:len(ROWS)], set()).add(device.process_index)
    if max(map(len, readers.values())) > 1:
        raise UserError('Mesh.context x Mesh.tensor devices share their rows, but some of them belong to different '
                        'processes, which read different rows; choose a product that divides the devices of a process.')


def check_slots(config: config_lib.Train, mesh: jax.sharding.Mesh) -> None:
    """Raises UserError unless the slots of a row divide over the mesh."""
    slots, parts = config.data.max_slots, mesh.shape['context']
    if slots % parts:
        raise UserError(f'Data.max_slots is {slots}, which the {parts} devices of the mesh axis context do not divide; '
                        f'choose a multiple of {parts}.')


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


def make_attend(mesh: jax.sharding.Mesh, implementation: Implementation = 'auto') -> Callable[..., Array]:
    """`ops.attention.attention`, cut over the mesh by `cut_attention`; `implementation` is what its `auto` stands for.

    `auto` itself is resolved for the mesh's devices, which may not be those of this process.
    """
    own = implementation

    def attend(q: Array, k: Array, v: Array, key_range: KeyRange, *, implementation: Implementation = 'auto',
               soft_cap: float | None = None) -> Array:
        cut = cut_attention(mesh, q, k, v, own if implementation == 'auto' else implementation)
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
