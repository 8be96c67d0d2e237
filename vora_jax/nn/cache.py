"""What decoding keeps of earlier slots."""
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Cache(NamedTuple):
    """A layer's memory of its slots; with a leading axis L, that of all layers.

    keys, values: f[B, S, K, H].
    routes: {site: f32[B, S, E]} routing weights that each slot gives; {} where nothing is routed.
    """

    keys: jax.Array
    values: jax.Array
    routes: dict[str, jax.Array]


def write_cache(cache: jax.Array, new: jax.Array, write_slot: jax.Array) -> jax.Array:
    """f[B, S, ...]: `cache` with `new: f[B, T, ...]` at slots `write_slot: i32[B, T]` of each row; others unchanged."""
    rows = jnp.arange(cache.shape[0], dtype=jnp.int32)[:, None]
    return cache.at[rows, write_slot].set(new.astype(cache.dtype), mode='drop')
