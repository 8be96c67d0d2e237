"""A residual adapter that mixes paths by modality."""
import dataclasses
import math
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from vora_jax.nn.cache import write_cache
from vora_jax.nn.slots import SlotContext
from vora_jax.ops.linear import linear
from vora_jax.types import UserError

# Where in a block it stands: on the normed input of attention or of the MLP.
Site = Literal['attention', 'mlp']


@dataclasses.dataclass(frozen=True)
class ModalityMixture:
    """`z + scale * sum_e w_e * up_e(down(z))` with routed weights w (Luo et al. 2023, arXiv 2305.15023, MM-Adapter).

    `down` is shared; `up_e` is cut into groups, each of which reads its own part of the inner width;
    `w = softmax((z_r @ router + bias) / temperature)` of the slot r that routes.

    rank: inner width R.    num_groups: of each `up`; divides rank and the layer's width.
    scale: factor of the sum.    temperature: of the router.    dropout: rate on `down`'s output while training.
    num_experts: paths E; with one there is nothing to route, and w = 1.
    route_by: `slot` takes r from `SlotContext.route_slot` (the segment's ROUTE slot, the image's [cls] slot); `own` is
        each slot itself; `first_row` the same place in the batch's first row, a quirk of LaVIN's released vision tower,
        which mixes examples of a batch. (Where that row has no picture, empty places route here; there a zero picture does.)
    """

    rank: int = 8
    num_groups: int = 2
    scale: float = 1.0
    temperature: float = 10.0
    dropout: float = 0.1
    num_experts: int = 2
    route_by: Literal['slot', 'own', 'first_row'] = 'slot'

    def __post_init__(self):
        if self.rank % self.num_groups or min(self.rank, self.num_groups, self.num_experts) < 1:
            raise UserError(f'ModalityMixture: rank {self.rank} must be a multiple of num_groups {self.num_groups}, and '
                            f'num_experts {self.num_experts} at least 1.')
        if not (self.temperature > 0 and 0 <= self.dropout < 1):
            raise UserError(f'ModalityMixture: temperature {self.temperature} must be above 0, and dropout {self.dropout} '
                            'at least 0 and below 1.')


# Which mixtures stand in a block: ((site, mixture), ...).
MixtureTable = tuple[tuple[Site, ModalityMixture], ...]


class MixtureBranch(nn.Module):
    """The sum of a `ModalityMixture`; down is Xavier-uniform, every up is zero, so it changes nothing at first."""

    mixture: ModalityMixture
    deterministic: bool = True

    @nn.compact
    def __call__(self, z: jax.Array, context: SlotContext, routes: jax.Array | None = None):
        """(f[B, T, C] new z, f32[B, S, E] routes with those of z written), for z: f[B, T, C].

        routes: the routing weights that each cache slot gives; None without a cache.
        """
        mixture, width = self.mixture, z.shape[-1]
        if width % mixture.num_groups:
            raise UserError(f'ModalityMixture.num_groups = {mixture.num_groups} does not divide the layer\'s width {width}.')
        down = self.weight('down_kernel', nn.initializers.xavier_uniform(), ('embed', 'rank'), (width, mixture.rank))
        inner = linear(z, down) + self.weight('down_bias', nn.initializers.zeros, ('rank',), (mixture.rank,), z.dtype)
        inner = nn.Dropout(mixture.dropout, deterministic=self.deterministic)(inner)
        inner = inner.reshape(*z.shape[:2], mixture.num_groups, -1)
        weights, routes = self.route(z, context, routes)
        total = jnp.zeros_like(z)
        for expert in range(mixture.num_experts):
            shape = mixture.num_groups, mixture.rank // mixture.num_groups, width // mixture.num_groups
            up = self.weight(f'up_{expert}_kernel', nn.initializers.zeros, (None, 'rank', 'embed'), shape)
            path = jnp.einsum('btgr,grc->btgc', inner, up.astype(z.dtype)).reshape(z.shape)
            path = path + self.weight(f'up_{expert}_bias', nn.initializers.zeros, ('embed',), (width,), z.dtype)
            total = total + weights[..., expert:expert + 1].astype(z.dtype) * path
        changed = z + jnp.asarray(mixture.scale, z.dtype) * total
        if context.adapters_on is not None:
            changed = jnp.where(context.adapters_on.reshape(-1, 1, 1), changed, z)
        return changed, routes

    def route(self, z: jax.Array, context: SlotContext, routes: jax.Array | None):
        """(f32[B, T, E] weight of each path at each slot, the routes)."""
        mixture, width = self.mixture, z.shape[-1]
        if mixture.num_experts == 1:
            return jnp.ones((*z.shape[:2], 1), jnp.float32), routes
        uniform = _uniform(1.0 / math.sqrt(width))
        kernel = self.weight('router_kernel', uniform, ('embed', None), (width, mixture.num_experts))
        bias = self.weight('router_bias', uniform, (None,), (mixture.num_experts,), jnp.float32)
        weights = nn.softmax((linear(z.astype(jnp.float32), kernel) + bias) / jnp.float32(mixture.temperature), axis=-1)
        if mixture.route_by == 'own':
            return weights, routes
        if mixture.route_by == 'first_row':
            return jnp.broadcast_to(weights[:1], weights.shape), routes
        if routes is not None:
            weights = routes = write_cache(routes, weights, context.write_slot)
        return jnp.take_along_axis(weights, context.route_slot[..., None], axis=1), routes

    def weight(self, name: str, init, axes: tuple, shape: tuple, dtype: jnp.dtype | None = None) -> jax.Array:
        """The parameter of this name; with a dtype cast and broadcastable to [B, T, ...]."""
        value = self.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)
        return value if dtype is None else value.astype(dtype)[None, None]


def _uniform(bound: float):
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)
