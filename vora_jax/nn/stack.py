"""Groups of equal layers, one scan each."""
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vora_jax.nn.block import AdapterTable, Block, BlockShape
from vora_jax.nn.cache import Cache
from vora_jax.nn.gated_prompts import GatedPrompts
from vora_jax.nn.modality_mixture import MixtureTable
from vora_jax.nn.remat import Remat, save_policy
from vora_jax.nn.slots import SlotContext
from vora_jax.ops.attention import attention
from vora_jax.types import Params

Gather = Callable[[str, Params], Params]


@dataclasses.dataclass(frozen=True)
class LayerGroup:
    """Consecutive layers that are alike: same adapters, biases, mixtures and prompts, all or none with the side module.

    Compile time grows with the number of groups, not of layers.
    biases: linears that have one beyond those of the block's shape.
    """

    num_layers: int
    adapters: AdapterTable = ()
    side: bool = False
    biases: tuple[str, ...] = ()
    mixtures: MixtureTable = ()
    prompts: GatedPrompts | None = None


def join_groups(groups: Iterable[LayerGroup]) -> tuple[LayerGroup, ...]:
    """The same layers in as few groups as possible:
    join_groups([LayerGroup(1, a), LayerGroup(2, a), LayerGroup(1)]) gives (LayerGroup(3, a), LayerGroup(1))."""
    runs = itertools.groupby(groups, lambda group: dataclasses.replace(group, num_layers=1))
    return tuple(dataclasses.replace(kind, num_layers=sum(group.num_layers for group in run)) for kind, run in runs)


class Stack(nn.Module):
    """Layer groups in order, each an `nn.scan` over stacked parameters [L, ...] with rematerialisation.

    gather: makes a layer's parameters whole where it is computed, (path, tree) -> tree; `training.mesh` has one.
    states: logical names of the dimensions of the states between layers: all that cuts them on a mesh.
    side: makes a module that is called in the scan body of groups with `side=True`, with (state entering the layer,
        state leaving it, its scanned input, its shared input); its results are stacked over those layers.
    """

    shape: BlockShape
    groups: tuple[LayerGroup, ...]
    side: Callable[[], nn.Module] | None = None
    attend: Callable = attention
    gather: Gather | None = None
    remat: Remat = 'none'
    deterministic: bool = True
    states: tuple[str, ...] = ('batch', 'slots', 'width')

    @nn.compact
    def __call__(self, x: jax.Array, context: SlotContext, cache: Cache | None = None, side_scanned: Any = None,
                 side_shared: Any = None):
        """(f[B, T, D], cache, side results): runs all layers on x: f[B, T, D].

        cache: of all layers, with a leading axis L.
        side_scanned: a tree of [L_side, ...] arrays, one slice for each layer with a side module; None calls none.
        side_shared: a tree given whole to each side module.
        """
        layer, side_layer, caches, side_results = 0, 0, [], []
        for index, group in enumerate(self.groups):
            side = self.side if group.side and side_scanned is not None else None
            body, cut = ScannedLayer, self.gather is not None and not self.is_initializing()
            if cut:
                whole = functools.partial(self.gather, f'{"/".join(self.path)}/group_{index}')
                body = nn.map_variables(body, 'params', trans_in_fn=whole)
            if cut or self.remat != 'none':
                body = nn.remat(body, prevent_cse=False, policy=save_policy(self.remat))
            scan = nn.scan(body, variable_axes={'params': 0}, split_rngs={'params': True, 'dropout': True},
                           in_axes=(nn.broadcast, 0, 0, nn.broadcast), length=group.num_layers,
                           metadata_params={nn.PARTITION_NAME: 'layers'})
            module = scan(self.shape, group.adapters, group.biases, group.mixtures, group.prompts, side, self.attend,
                          self.states, self.deterministic, name=f'group_{index}')
            part = slice(layer, layer + group.num_layers)
            group_cache = jax.tree.map(lambda c: c[part], cache)
            scanned = None
            if side is not None:
                scanned = jax.tree.map(lambda s: s[side_layer:side_layer + group.num_layers], side_scanned)
                side_layer += group.num_layers
            x, (group_cache, result) = module(x, context, group_cache, scanned, side_shared)
            layer += group.num_layers
            caches.append(group_cache)
            if side is not None:
                side_results.append(result)
        if cache is not None:
            cache = _concatenate(caches)
        return x, cache, _concatenate(side_results) if side_results else None


class ScannedLayer(nn.Module):
    """The scan body: a block, then the side module on its input and output."""

    shape: BlockShape
    adapters: AdapterTable
    biases: tuple[str, ...]
    mixtures: MixtureTable
    prompts: GatedPrompts | None
    side: Callable[[], nn.Module] | None
    attend: Callable
    states: tuple[str, ...]
    deterministic: bool

    @nn.compact
    def __call__(self, x, context: SlotContext, cache, side_scanned, side_shared):
        block = Block(self.shape, self.adapters, self.biases, self.mixtures, self.prompts, self.attend, self.deterministic,
                      name='block')
        leaving, cache = block(nn.with_logical_constraint(x, self.states), context, cache)
        leaving = nn.with_logical_constraint(leaving, self.states)
        result = None
        if self.side is not None:
            result = self.side()(x, leaving, side_scanned, side_shared)
        return leaving, (cache, result)


class Tap(nn.Module):
    """Side module that returns the state leaving its layer: f[L, B, T, D] once stacked."""

    @nn.compact
    def __call__(self, entering, leaving, scanned, shared):
        return leaving


def _concatenate(trees):
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=0), *trees)
