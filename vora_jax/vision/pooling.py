"""Means over windows of packed patches."""
import jax
import jax.numpy as jnp

from vora_jax.batch import Patches
from vora_jax.ops.take_slots import take_slots
from vora_jax.vision.packed import patch_grid


def window_means(x: jax.Array, patches: Patches, side: int) -> jax.Array:
    """f[B, P, C]: at each patch the mean of x: f[B, P, C] over the `side x side` patches from it on, right and down.

    The windows of an image that do not overlap are those of the patches whose row and column are multiples of `side`
    (`VisionTokenRule.sources` takes these). A window that reaches over the image's edge is averaged over what it holds.
    Sums run in f32; columns first, then rows, and all gradients are gathers. What stands at [cls] slots and in empty
    places is their own vector.

    Example: side 2 on 2 x 3 patches    a b c    gives    (a+b+d+e)/4  (b+c+e+f)/4  (c+f)/2
                                        d e f             (d+e)/2      (e+f)/2      f
    """
    grid = patch_grid(patches)
    rows, cols = grid[..., 0], grid[..., 1]
    row, col = (place.astype(jnp.int32) for place in (patches.row, patches.col))
    wide = x.astype(jnp.float32)
    wide = _mean_along(wide, col, cols, jnp.ones_like(cols), side)
    return _mean_along(wide, row, rows, cols, side).astype(x.dtype)


def _mean_along(x: jax.Array, coordinate: jax.Array, extent: jax.Array, stride: jax.Array, side: int) -> jax.Array:
    """The mean over the `side` places from each on that lie `stride` apart, as far as the image's `extent` reaches."""
    place = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32)[None], coordinate.shape)
    total, count = x, jnp.ones_like(coordinate)
    for step in range(1, side):
        inside = (coordinate >= 0) & (coordinate + step < extent)
        index = jnp.where(inside, place + step * stride, -1)
        inverse = jnp.where(coordinate >= step, place - step * stride, -1)
        total = total + jnp.where(inside[..., None], take_slots(x, index, inverse), 0.0)
        count = count + inside.astype(jnp.int32)
    return total / count[..., None].astype(x.dtype)
