"""Image patches to vectors with positions."""
import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from vora_jax.batch import Patches
from vora_jax.nn.norms import RMSNorm
from vora_jax.ops.patches import sample_position_table
from vora_jax.types import UserError

# Mean and standard deviation of CLIP's training images, per channel of values in [0, 1]; AIMv2 uses them too.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class PatchEmbed:
    """Patch embedding of AIMv2: convolution as a matmul, RMSNorm, learned 2-D positions.

    patch_size: side of a patch, pixels.
    width: output width C.
    table_rows, table_cols: grid of the position table; other grids are interpolated.
    norm_eps: epsilon of the norm.
    mean, std: normalisation of byte pixels divided by 255.
    """

    patch_size: int = 14
    width: int = 1536
    table_rows: int = 32
    table_cols: int = 32
    norm_eps: float = 1e-6
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD


class PatchEmbedding(nn.Module):
    """f[B, P, C] of packed patches: norm(pixels @ kernel + bias) + position."""

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
        bias = self.param('bias', nn.with_logical_partitioning(nn.initializers.zeros, ('vision',)), (config.width,),
                          jnp.float32)
        # Small random positions: a table of unit scale (2-D sines) trained a small encoder markedly slower.
        table = self.param('positions',
                           nn.with_logical_partitioning(nn.initializers.normal(0.02), (None, None, 'vision')),
                           (config.table_rows, config.table_cols, config.width), jnp.float32)
        pixels = normalise(patches.pixels, config).astype(self.dtype)
        x = jnp.dot(pixels, kernel.astype(self.dtype)) + bias.astype(self.dtype)[None, None]
        x = RMSNorm(config.norm_eps, axis='vision', name='norm')(x)
        image = jnp.maximum(patches.image_id, 0)
        grid = jnp.take_along_axis(patches.grid, image[..., None], axis=1)
        return x + sample_position_table(table, patches.row, patches.col, grid).astype(self.dtype)


def normalise(pixels: jax.Array, config: PatchEmbed) -> jax.Array:
    """f32[B, P, patch_dim]: bytes become `(x / 255 - mean) / std` by channel; floats are already normalised."""
    if pixels.dtype != jnp.uint8:
        return pixels
    mean = jnp.tile(jnp.asarray(config.mean, jnp.float32), config.patch_size**2)[None, None]
    std = jnp.tile(jnp.asarray(config.std, jnp.float32), config.patch_size**2)[None, None]
    return (pixels.astype(jnp.float32) / 255.0 - mean) / std
