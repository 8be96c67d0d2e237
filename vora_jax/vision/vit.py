"""Vision transformer on packed patches."""
import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from vora_jax.batch import Patches
from vora_jax.nn.block import Activation, BlockShape
from vora_jax.nn.modality_mixture import MixtureTable
from vora_jax.nn.norms import Norm, norm
from vora_jax.nn.slots import SlotContext
from vora_jax.nn.stack import Gather, LayerGroup, Stack, Tap
from vora_jax.ops.attention import attention
from vora_jax.types import Array, UserError
from vora_jax.vision.attention_pool import AttentionPool, Pool
from vora_jax.vision.patch_embed import PatchEmbed, PatchEmbedding


@dataclasses.dataclass(frozen=True)
class Vit:
    """A pre-norm vision transformer; its width is that of the patch embedding.

    The defaults are AIMv2-huge's, patch 14, 448 pixels (El-Nouby et al. 2024): RMSNorm, gated SiLU MLP, no biases.

    norm, activation, biases, layer_scale: of its blocks, see `BlockShape`.
    pre_norm: a norm before the first block (CLIP).
    pool: the head that makes one vector of an image; 'none' for none.
    """

    patch_embed: PatchEmbed = PatchEmbed()
    num_layers: int = 24
    mlp_width: int = 4096
    num_heads: int = 12
    norm_eps: float = 1e-5
    norm: Norm = 'rms'
    activation: Activation = 'silu_gated'
    biases: tuple[str, ...] = ()
    layer_scale: bool = False
    pre_norm: bool = False
    pool: Pool = 'none'

    def __post_init__(self):
        if self.width % self.num_heads:
            raise UserError(f'Vit.num_heads = {self.num_heads} does not divide PatchEmbed.width = {self.width}.')

    @property
    def width(self) -> int:
        return self.patch_embed.width

    @property
    def block_shape(self) -> BlockShape:
        return BlockShape(self.width, self.mlp_width, self.num_heads, self.num_heads, self.width // self.num_heads,
                          self.norm_eps, self.norm, self.activation, self.biases, layer_scale=self.layer_scale)


class Features(NamedTuple):
    """What an encoder computes of packed patches.

    output: f[B, P, C] the last block's output, normed.    blocks: f[L, B, P, C] every block's output, unnormed.
    pooled: f[B, M, C] one vector for each image, from `output`; None without `Vit.pool`.
    """

    output: jax.Array
    blocks: jax.Array
    pooled: jax.Array | None = None


class VisionTransformer(nn.Module):
    """`Features` of packed patches. Each image sees itself only, so packed images give the same features as single ones.

    mixtures: of every block; what routes by slot is routed by the image's first place, its [cls].
    """

    config: Vit
    attend: Callable = attention
    gather: Gather | None = None
    dtype: jnp.dtype = jnp.float32
    mixtures: MixtureTable = ()
    deterministic: bool = True

    @nn.compact
    def __call__(self, patches: Patches, adapters_on: Array | None = None) -> Features:
        config = self.config
        x = PatchEmbedding(config.patch_embed, self.dtype, name='patch_embed')(patches)
        if config.pre_norm:
            x = norm(config.norm, config.norm_eps, 'pre_norm')(x)
        groups = (LayerGroup(config.num_layers, side=True, mixtures=self.mixtures),)
        stack = Stack(config.block_shape, groups, Tap, self.attend, self.gather, deterministic=self.deterministic,
                      states=('batch', 'patches', 'width'), name='blocks')
        context = SlotContext(patches.key_range, adapters_on=adapters_on, route_slot=patches.key_start)
        x, _, blocks = stack(x, context, side_scanned=())
        x = norm(config.norm, config.norm_eps, 'norm')(x)
        pooled = None
        if config.pool != 'none':
            pooled = AttentionPool(config.pool, config.block_shape, self.attend, name='pool')(x, patches)
        return Features(x, blocks, pooled)
