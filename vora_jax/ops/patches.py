"""Position tables sampled on any grid."""
import jax
import jax.numpy as jnp


def sample_position_table(table: jax.Array, row: jax.Array, col: jax.Array, grid: jax.Array) -> jax.Array:
    """f32[..., C]: the 2-D position table resized (bilinear, half-pixel centres) to each patch's own image grid.

    Args:
        table: f32[R, K, C] learned positions of a grid of R x K patches.
        row, col: i32[...] place of a patch in its image's grid.
        grid: i32[..., 2] rows and columns of that image.

    On an image of exactly R x K patches this is `table[row, col]`, bit for bit. Equal to resizing the table with
    `torch.nn.functional.interpolate(mode='bilinear', align_corners=False)` and indexing it.
    """
    table = table.astype(jnp.float32)
    rows, cols, _ = table.shape

    def taps(place, count, size):
        centre = (place.astype(jnp.float32) + 0.5) * (size / jnp.maximum(count, 1).astype(jnp.float32)) - 0.5
        centre = jnp.clip(centre, 0.0, size - 1.0)
        low = jnp.floor(centre).astype(jnp.int32)
        return low, jnp.minimum(low + 1, size - 1), (centre - low.astype(jnp.float32))[..., None]

    top, bottom, down = taps(row, grid[..., 0], rows)
    left, right, across = taps(col, grid[..., 1], cols)
    upper = table[top, left] * (1.0 - across) + table[top, right] * across
    lower = table[bottom, left] * (1.0 - across) + table[bottom, right] * across
    return upper * (1.0 - down) + lower * down
