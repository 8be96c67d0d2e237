"""Vision transformer on packed patches."""
import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from vora_jax.batch import Patches
from vora_jax.nn.block import BlockShape
from vora_jax.nn.norms import RMSNorm
from vora_jax.nn.slots import SlotContext
from vora_jax.nn.stack import LayerGroup, Stack, Tap
from vora_jax.ops.attention import attention
from vora_jax.types import UserError
from vora_jax.vision.patch_embed import PatchEmbed, PatchEmbedding


@dataclasses.dataclass(frozen=True)
class Vit:
    """A vision transformer of AIMv2's kind: RMSNorm, gated SiLU MLP, no biases, no [cls], learned positions.

    width must equal patch_embed.width. Defaults: AIMv2-huge, patch 14, 448 pixels (El-Nouby et al. 2024).
    """

    patch_embed: PatchEmbed = PatchEmbed()
    num_layers: int = 24
    mlp_width: int = 4096
    num_heads: int = 12
    norm_eps: float = 1e-5

    def __post_init__(self):
        if self.width % self.num_heads:
            raise UserError(f'Vit.num_heads = {self.num_heads} does not divide PatchEmbed.width = {self.width}.')

    @property
    def width(self) -> int:
        return self.patch_embed.width

    @property
    def block_shape(self) -> BlockShape:
        return BlockShape(self.width, self.mlp_width, self.num_heads, self.num_heads, self.width // self.num_heads,
                          self.norm_eps)


class VisionTransformer(nn.Module):
    """(f[B, P, C] normed output, f[L, B, P, C] unnormed output of every block) of packed patches.

    Each image sees itself only, so packed images give the same features as single ones.
    """

    config: Vit
    attend: Callable = attention
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, patches: Patches) -> tuple[jax.Array, jax.Array]:
        config = self.config
        x = PatchEmbedding(config.patch_embed, self.dtype, name='patch_embed')(patches)
        groups = (LayerGroup(config.num_layers, side=True),)
        stack = Stack(config.block_shape, groups, Tap, self.attend, name='blocks')
        x, _, taps = stack(x, SlotContext(patches.key_range), side_scanned=())
        return RMSNorm(config.norm_eps, name='norm')(x), taps
