"""Image patches to vectors with positions."""
import dataclasses
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from vora_jax.batch import Patches
from vora_jax.nn.norms import RMSNorm
from vora_jax.ops.patches import Sampling, sample_position_table, sincos_positions
from vora_jax.types import UserError
from vora_jax.vision.packed import patch_grid

# Mean and standard deviation of CLIP's training images, per channel of values in [0, 1]; AIMv2 uses them too.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class PatchEmbed:
    """Patch embedding; the defaults are AIMv2's: convolution as a matmul, RMSNorm, learned 2-D positions.

    patch_size: side of a patch, pixels.
    width: output width C.
    table_rows, table_cols: grid of the position table.
    norm_eps: epsilon of the norm.
    mean, std: normalisation of byte pixels divided by 255.
    norm: the RMSNorm before positions are added; CLIP, SigLIP and DINOv2 have none.
    bias: of the convolution; CLIP has none.
    positions: how the table is read on other grids; 'sincos' has no table (AIMv2 native).
    cls_token: a learned vector with its own position for each image's [cls] slot.
    mask_token: DINOv2's vector of masked patches; kept with the weights, read by nothing here.
    """

    patch_size: int = 14
    width: int = 1536
    table_rows: int = 32
    table_cols: int = 32
    norm_eps: float = 1e-6
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    norm: bool = True
    bias: bool = True
    positions: Sampling | Literal['sincos'] = 'bilinear'
    cls_token: bool = False
    mask_token: bool = False


class PatchEmbedding(nn.Module):
    """f[B, P, C] of packed patches: norm(pixels @ kernel + bias) + position; the [cls] vector in [cls] slots."""

    config: PatchEmbed
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, patches: Patches) -> jax.Array:
        config = self.config
        patch_dim = config.patch_size**2 * 3
        if patches.pixels.shape[-1] != patch_dim:
            raise UserError(f'PatchEmbed.patch_size: {config.patch_size} needs {patch_dim} values a patch, but the batch '
                            f'has {patches.pixels.shape[-1]}; give data and model the same patch size.')
        kernel = self.param('kernel', nn.with_logical_partitioning(nn.initializers.lecun_normal(), ('pixels', 'vision')),
                            (patch_dim, config.width), jnp.float32)
        x = jnp.dot(normalise(patches.pixels, config).astype(self.dtype), kernel.astype(self.dtype))
        if config.bias:
            x = x + self.vector('bias', nn.initializers.zeros)
        if config.norm:
            x = RMSNorm(config.norm_eps, axis='vision', name='norm')(x)
        x = x + self.positions(patches).astype(self.dtype)
        if config.mask_token:
            self.vector('mask_token', nn.initializers.zeros)
        if config.cls_token:
            cls, position = (self.vector(name, nn.initializers.normal(0.02)) for name in ('cls', 'cls_position'))
            is_cls = (patches.image_id >= 0) & (patches.row < 0)
            x = jnp.where(is_cls[..., None], cls + position, x)
        return x

    def positions(self, patches: Patches) -> jax.Array:
        """f32[B, P, C] of each patch's place in its own image."""
        config = self.config
        if config.positions == 'sincos':
            return sincos_positions(patches.row, patches.col, config.width)
        # Small random positions: a table of unit scale (2-D sines) trained a small encoder markedly slower.
        table = self.param('positions',
                           nn.with_logical_partitioning(nn.initializers.normal(0.02), (None, None, 'vision')),
                           (config.table_rows, config.table_cols, config.width), jnp.float32)
        return sample_position_table(table, patches.row, patches.col, patch_grid(patches), config.positions)

    def vector(self, name: str, init) -> jax.Array:
        """f[1, 1, C]: the parameter of this name in the compute dtype."""
        value = self.param(name, nn.with_logical_partitioning(init, ('vision',)), (self.config.width,), jnp.float32)
        return value.astype(self.dtype)[None, None]


def normalise(pixels: jax.Array, config: PatchEmbed) -> jax.Array:
    """f32[B, P, patch_dim]: bytes become `(x / 255 - mean) / std` by channel; floats are already normalised."""
    if pixels.dtype != jnp.uint8:
        return pixels
    mean = jnp.tile(jnp.asarray(config.mean, jnp.float32), config.patch_size**2)[None, None]
    std = jnp.tile(jnp.asarray(config.std, jnp.float32), config.patch_size**2)[None, None]
    return (pixels.astype(jnp.float32) / 255.0 - mean) / std
