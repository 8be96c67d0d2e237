"""Bilinear samples at learned places of packed images."""
import jax
import jax.numpy as jnp


def deformable_sample(values: jax.Array, start: jax.Array, grid: jax.Array, col: jax.Array, row: jax.Array,
                      weights: jax.Array) -> jax.Array:
    """f[B, P, N, H]: `sum over levels l and points k of weights * values[l]` sampled at (row, col).

    A sample is bilinear between the four patches around it, those outside its image counting 0: what
    `grid_sample(align_corners=False, padding_mode='zeros')` gives (Zhu et al. 2021, Deformable DETR, equation 3).

    Args:
        values: f[L, B, P, N, H] of packed patches, N heads of H channels.
        start: i32[B, P] place of the first patch of each query's image.
        grid: i32[B, P, 2] rows and columns of that image.
        col, row: f32[B, P, N, L, K] where to sample, in patches from the centre of the image's first patch.
        weights: f32[B, P, N, L, K].
    """
    total = jnp.zeros(values.shape[1:], jnp.float32)
    for level in range(values.shape[0]):
        def add(total, point, level=level):
            place_col, place_row, weight = point
            return total + _one_sample(values[level], start, grid, place_col, place_row, weight), None

        points = (jnp.moveaxis(x[..., level, :], -1, 0) for x in (col, row, weights))
        # One point at a time: all at once would be L * K * 4 copies of the features.
        total, _ = jax.lax.scan(jax.checkpoint(add), total, tuple(points))
    return total.astype(values.dtype)


def _one_sample(values, start, grid, col, row, weight):
    """f32[B, P, N, H] at one place for each query and head: values f[B, P, N, H]; col, row, weight f32[B, P, N]."""
    rows, cols = grid[..., :1], grid[..., 1:]
    left, top = (jax.lax.stop_gradient(jnp.floor(place)) for place in (col, row))
    across, along = col - left, row - top
    total = jnp.zeros(values.shape, jnp.float32)
    for down in (0, 1):
        for right in (0, 1):
            x, y = left + right, top + down
            share = (across if right else 1.0 - across) * (along if down else 1.0 - along) * weight
            # As floats: a place may be too far away for an integer.
            inside = (x >= 0) & (x < cols.astype(jnp.float32)) & (y >= 0) & (y < rows.astype(jnp.float32))
            x, y = (jnp.where(inside, place, 0.0).astype(jnp.int32) for place in (x, y))
            index = jnp.where(inside, start[..., None] + y * cols + x, 0)
            patch = jnp.take_along_axis(values, index[..., None], axis=1, mode='promise_in_bounds').astype(jnp.float32)
            total = total + jnp.where(inside, share, 0.0)[..., None] * patch
    return total
