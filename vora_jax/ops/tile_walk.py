"""The tiles of a masked score matrix to visit.

Made on the device from the key ranges, so that masks stay data: a kernel's grid is as long as the walk, and what is not on
it costs neither a step nor a load. A visit works on the half of its keys that is seen, or on both. Queries `[0, 4)` see keys
`[0, q + 1)`, queries `[4, 8)` an image's keys `[4, 8)`, queries `[8, 12)` key 8; in tiles of 4 queries x 4 keys:

    keys        01 23  45 67  89 ab
    queries 0   /  /   .  .   .  .        walk by query: (0,0) both, (1,1) full, (2,2) lower half
    queries 1   .  .   #  #   .  .
    queries 2   .  .   .  .   /  .
"""
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vora_jax.types import KeyRange

# What a visit does, as bits of its word: begin or end the sums of its query tile (key tile when walking by key), run the
# products of the lower or upper half of its keys, run them all without a mask.
FIRST, LAST, LOWER, UPPER, FULL = 1, 2, 4, 8, 16
FLAG_BITS = 5


class Tile(NamedTuple):
    """Sides of a tile: query slots and key slots, these even."""

    queries: int
    keys: int


class TileWalk(NamedTuple):
    """words: i32[B * query tiles * key tiles], the first `length` of them visits in order; `unpack` reads one.
    length: i32[]."""

    words: jax.Array
    length: jax.Array


def tile_map(key_range: KeyRange, num_keys: int, tile: Tile) -> tuple[jax.Array, jax.Array]:
    """(any, all): bool[B, query tiles, key tiles]: some, and every, query of the tile sees some, and every, key of it.

    T and S must be multiples of the tile's sides. XLA fuses the comparisons: nothing larger than the result is stored.
    """
    batch, num_queries = key_range.start.shape
    shape = (batch, num_queries // tile.queries, 1, tile.queries)
    start, stop = (x.reshape(shape) for x in key_range)
    left = jnp.arange(num_keys // tile.keys, dtype=jnp.int32)[None, None, :, None] * tile.keys
    right = left + tile.keys
    some = (start < right) & (stop > left) & (start < stop)
    every = (start <= left) & (stop >= right)
    return some.any(-1), every.all(-1)


def half_map(key_range: KeyRange, num_keys: int, tile: Tile) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(lower, upper, full): bool[B, query tiles, key tiles]: some query sees some key of that half; every one every key.

    Raises:
        ValueError: the tile's keys have no halves.
    """
    if tile.keys % 2:
        raise ValueError(f'tile_walk: a tile of {tile.keys} keys has no halves; choose an even number.')
    some, every = tile_map(key_range, num_keys, tile._replace(keys=tile.keys // 2))
    return some[..., ::2], some[..., 1::2], every[..., ::2] & every[..., 1::2]


def tile_walk(key_range: KeyRange, num_keys: int, tile: Tile, by_key: bool = False) -> TileWalk:
    """The visits of all rows: row by row, query tile by query tile (`by_key`: key tile by key tile), in order.

    A query tile (key tile) that nothing is visited for gets one visit of neither half, which writes its zeros.
    """
    lower, upper, full = half_map(key_range, num_keys, tile)
    run = lower | upper
    batch, query_tiles, key_tiles = run.shape
    row, query, key = jnp.meshgrid(*(jnp.arange(n, dtype=jnp.int32) for n in run.shape), indexing='ij')
    if by_key:
        lower, upper, run, full, row, query, key = (
            x.swapaxes(1, 2) for x in (lower, upper, run, full, row, query, key))
    place = jnp.arange(run.shape[-1], dtype=jnp.int32)[None, None]
    visit = run | (~run.any(-1, keepdims=True) & (place == 0))
    first = place == jnp.argmax(visit, axis=-1, keepdims=True)
    last = place == run.shape[-1] - 1 - jnp.argmax(visit[..., ::-1], axis=-1, keepdims=True)
    bits = ((first, FIRST), (last, LAST), (lower, LOWER), (upper, UPPER), (full, FULL))
    flags = sum(jnp.where(x, bit, 0) for x, bit in bits)
    word = ((row << _bits(query_tiles) | query) << _bits(key_tiles) | key) << FLAG_BITS | flags
    visit = visit.reshape(-1)
    # Stable compaction: each visit goes to the number of visits before it, the others beyond the end.
    place = jnp.where(visit, jnp.cumsum(visit, dtype=jnp.int32) - 1, visit.size)
    words = jnp.zeros(visit.shape, jnp.int32).at[place].set(word.reshape(-1), mode='drop', unique_indices=True)
    return TileWalk(words, jnp.sum(visit, dtype=jnp.int32))


def unpack(word, query_tiles: int, key_tiles: int):
    """(row, query tile, key tile) of a visit.

    Fields of bits: kernels unpack words on a scalar core, where division is slow.
    """
    key_bits, query_bits = _bits(key_tiles), _bits(query_tiles)
    key = (word >> FLAG_BITS) & ((1 << key_bits) - 1)
    query = (word >> (FLAG_BITS + key_bits)) & ((1 << query_bits) - 1)
    return word >> (FLAG_BITS + key_bits + query_bits), query, key


def _bits(count: int) -> int:
    return max(1, (count - 1).bit_length())
