"""Lower ViT levels sampled into a higher one."""
import dataclasses
import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from vora_jax.batch import Patches
from vora_jax.nn.adapted_dense import AdaptedDense
from vora_jax.nn.norms import LayerNorm
from vora_jax.nn.slots import SlotContext
from vora_jax.ops.deformable import deformable_sample
from vora_jax.types import UserError
from vora_jax.vision.packed import patch_grid


@dataclasses.dataclass(frozen=True)
class CueEnhancer:
    """`norm(f + deformable_attention(norm(f), all levels))` of the anchor level f (arXiv 2411.12787, VCE).

    Each patch looks at a few learned places around itself in every level.

    num_heads: heads N of the sampling; divides the encoder's width.
    num_points: places K for each head and level.
    anchor: which of the front end's taps is f. The released code takes the last one it lists, its lowest level; the
        paper the highest.
    final_norm: the outer norm, which the released code computes and drops.
    norm_eps: of the three layer norms.
    """

    num_heads: int = 16
    num_points: int = 4
    anchor: int = 0
    final_norm: bool = True
    norm_eps: float = 1e-6

    def __post_init__(self):
        if min(self.num_heads, self.num_points) < 1:
            raise UserError(f'CueEnhancer: num_heads {self.num_heads} and num_points {self.num_points} must be at least 1.')


class CueEnhancerModule(nn.Module):
    """f[B, P, C] from the levels, each f[B, P, C], of packed patches; [cls] slots are neither read nor meaningful."""

    config: CueEnhancer

    @nn.compact
    def __call__(self, levels: Sequence[jax.Array], patches: Patches) -> jax.Array:
        config, anchor = self.config, levels[self.config.anchor]
        heads, points = config.num_heads, config.num_points
        batch, places, width = anchor.shape

        def linear(name, x, features, kernel_init=nn.initializers.zeros, bias_init=nn.initializers.zeros, cut='width'):
            dense = AdaptedDense(features, ('vision', cut), use_bias=True, kernel_init=kernel_init, bias_init=bias_init,
                                 name=name)
            return dense(x, SlotContext(patches.key_range))

        query = LayerNorm(config.norm_eps, axis='vision', name='norm_query')(anchor)
        values = LayerNorm(config.norm_eps, axis='vision', name='norm_levels')(jnp.concatenate(levels, axis=1))
        values = linear('value_proj', values, width, nn.initializers.xavier_uniform())
        values = jnp.moveaxis(values.reshape(batch, len(levels), places, heads, -1), 1, 0)
        shape = batch, places, heads, len(levels), points
        # Places of a few patches would lose their fractions in bfloat16, and so would cut kernels, which are gathered in it.
        query = query.astype(jnp.float32)
        offsets = linear('offset_proj', query, math.prod(shape[2:]) * 2, bias_init=_spread(*shape[2:]), cut=None)
        offsets = offsets.reshape(*shape, 2)
        weights = linear('weight_proj', query, math.prod(shape[2:]), cut=None).reshape(*shape[:3], -1)
        weights = nn.softmax(weights, axis=-1).reshape(shape)

        grid = patch_grid(patches)
        start = patches.key_stop - grid[..., 0] * grid[..., 1]  # behind the [cls] slot, where there is one
        col, row = (place.astype(jnp.float32)[..., None, None, None] for place in (patches.col, patches.row))
        cues = deformable_sample(values, start, grid, col + offsets[..., 0], row + offsets[..., 1], weights)
        cues = linear('out_proj', cues.reshape(anchor.shape), width, nn.initializers.xavier_uniform())
        out = anchor + cues
        return LayerNorm(config.norm_eps, axis='vision', name='norm_out')(out) if config.final_norm else out


def _spread(heads: int, levels: int, points: int):
    """Initial offsets f32[N * L * K * 2] in (x, y): point k of head n lies k + 1 patches away in the head's direction."""
    def init(key, shape, dtype):
        angle = jnp.arange(heads, dtype=jnp.float32) * (2.0 * math.pi / heads)
        direction = jnp.stack([jnp.cos(angle), jnp.sin(angle)], -1)
        direction = direction / jnp.max(jnp.abs(direction), axis=-1, keepdims=True)
        distance = jnp.arange(1, points + 1, dtype=jnp.float32)
        offsets = direction[:, None, None] * distance[None, None, :, None]
        return jnp.broadcast_to(offsets, (heads, levels, points, 2)).reshape(shape).astype(dtype)

    return init
