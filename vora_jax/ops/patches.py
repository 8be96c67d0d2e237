"""Position tables sampled on any grid."""
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

Sampling = Literal['bilinear', 'bicubic', 'first_rows']


def sample_position_table(table: jax.Array, row: jax.Array, col: jax.Array, grid: jax.Array,
                          sampling: Sampling = 'bilinear') -> jax.Array:
    """f32[..., C]: the 2-D position table resized (half-pixel centres) to each patch's own image grid.

    Args:
        table: f32[R, K, C] learned positions of a grid of R x K patches.
        row, col: i32[...] place of a patch in its image's grid.
        grid: i32[..., 2] rows and columns of that image.
        sampling: `bilinear` or `bicubic` (Keys' kernel, a = -0.75), equal to resizing the table with
            `torch.nn.functional.interpolate(align_corners=False)` and indexing it. `first_rows`, a quirk of VoRA's code:
            an image of n <= R * K patches takes the first n entries of the table in reading order, whatever its shape;
            larger ones are bilinear.

    On an image of exactly R x K patches all are `table[row, col]`, bit for bit.
    """
    table = jnp.asarray(table, jnp.float32)
    rows, cols, _ = table.shape
    if sampling == 'bicubic':
        return _sample(table, _cubic_taps(row, grid[..., 0], rows), _cubic_taps(col, grid[..., 1], cols))
    smooth = _sample(table, _linear_taps(row, grid[..., 0], rows), _linear_taps(col, grid[..., 1], cols))
    if sampling == 'bilinear':
        return smooth
    index = row.astype(jnp.int32) * grid[..., 1] + col.astype(jnp.int32)
    first = table.reshape(rows * cols, -1)[jnp.clip(index, 0, rows * cols - 1)]
    return jnp.where((grid[..., 0] * grid[..., 1] <= rows * cols)[..., None], first, smooth)


def sincos_positions(row: jax.Array, col: jax.Array, width: int, base: float = 10000.0) -> jax.Array:
    """f32[..., width]: fixed 2-D positions, [sin(col), cos(col), sin(row), cos(row)], a quarter of the width each.

    The order of AIMv2's native-resolution encoders (El-Nouby et al. 2024), and of MAE.
    """
    frequencies = jnp.asarray(1.0 / base ** (np.arange(width // 4) / (width // 4)), jnp.float32)
    angles = [jnp.maximum(place, 0).astype(jnp.float32)[..., None] * jnp.expand_dims(frequencies, range(place.ndim))
              for place in (col, row)]
    return jnp.concatenate([f(angle) for angle in angles for f in (jnp.sin, jnp.cos)], axis=-1)


def _centre(place, count, size):
    return (place.astype(jnp.float32) + 0.5) * (size / jnp.maximum(count, 1).astype(jnp.float32)) - 0.5


def _linear_taps(place, count, size):
    """[(index i32[...], weight f32[...]), ...] of the table entries that make one value along one axis."""
    centre = jnp.clip(_centre(place, count, size), 0.0, size - 1.0)
    low = jnp.floor(centre).astype(jnp.int32)
    part = centre - low.astype(jnp.float32)
    return [(low, 1.0 - part), (jnp.minimum(low + 1, size - 1), part)]


def _cubic_taps(place, count, size, a=-0.75):
    centre = _centre(place, count, size)
    low = jnp.floor(centre)
    taps = []
    for offset in (-1, 0, 1, 2):
        t = jnp.abs(centre - (low + offset))
        near = ((a + 2) * t - (a + 3)) * t * t + 1
        far = ((t - 5) * t + 8) * a * t - 4 * a
        weight = jnp.where(t <= 1, near, jnp.where(t < 2, far, 0.0))
        taps.append((jnp.clip(low.astype(jnp.int32) + offset, 0, size - 1), weight))
    return taps


def _sample(table, row_taps, col_taps):
    value = 0.0
    for row, down in row_taps:
        line = 0.0
        for col, across in col_taps:
            line = line + table[row, col] * across[..., None]
        value = value + line * down[..., None]
    return value
