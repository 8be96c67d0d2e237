"""Where packed patches and their images stand."""
import jax
import jax.numpy as jnp

from vora_jax.batch import Patches
from vora_jax.types import KeyRange


def patch_grid(patches: Patches) -> jax.Array:
    """i32[B, P, 2]: rows and columns of each patch's own image; those of the row's first image in empty places."""
    return jnp.take_along_axis(patches.grid, jnp.maximum(patches.image_id, 0)[..., None], axis=1)


def image_range(patches: Patches) -> KeyRange:
    """i32[B, M] twice: the places of each image, from its [cls] slot on if it has one; empty where there is no image."""
    image = jnp.arange(patches.grid.shape[1], dtype=jnp.int32)[None, :, None]
    start = jnp.sum((patches.image_id[:, None] >= 0) & (patches.image_id[:, None] < image), -1, dtype=jnp.int32)
    return KeyRange(start, start + jnp.sum(patches.image_id[:, None] == image, -1, dtype=jnp.int32))
