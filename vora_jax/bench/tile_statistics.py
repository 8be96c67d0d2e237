"""How much of a mask's area its tiles cover: what a kernel that walks `ops.tile_walk` computes and loads."""
import dataclasses

import numpy as np

from vora_jax.ops.key_range import causal
from vora_jax.ops.tile_walk import Tile, half_map
from vora_jax.types import KeyRange


@dataclasses.dataclass(frozen=True)
class TileStatistics:
    """Of all rows together; forward and backward are the same.

    density: true mask area, a share of the whole `[T, S]`.
    visited: area that is computed, a share of the same: the halves of tiles, by keys, that are not empty.
    loaded: area of the whole tiles with such a half, a share of the same: memory traffic follows it.
    full: share of the visited area that is computed without a mask, its whole tile being seen.
    zero_rows, zero_columns: how many query tiles (forward, dq) and key tiles (dkv) nothing is visited for: each takes one
        visit more, which only writes its zeros.
    causal: area of the tiles that a causal mask of the same size visits (splash's: whole tiles, and segment ids skip none).
    """

    tile: Tile
    density: float
    visited: float
    loaded: float
    full: float
    zero_rows: int
    zero_columns: int
    causal: float

    @property
    def visited_per_true(self) -> float:
        """Area visited over true mask area: the least is 1."""
        return self.visited / self.density

    @property
    def visited_per_causal(self) -> float:
        """Area visited over that of the causal tiles."""
        return self.visited / self.causal


def tile_statistics(key_range: KeyRange, num_keys: int, tile: Tile) -> TileStatistics:
    """The statistics of a mask. T and S are rounded up to whole tiles, whose area counts whole."""
    halves, full = maps(key_range, num_keys, tile)
    loaded, below = (x.any(-1) for x in (halves, maps(causal(1, key_range.start.shape[1]), num_keys, tile)[0]))
    area = key_range.start.size * num_keys
    share = tile.queries * tile.keys / area
    return TileStatistics(
        tile, density=true_area(key_range) / area, visited=float(halves.sum() * share / 2),
        loaded=float(loaded.sum() * share), full=float(2 * full.sum() / max(1, halves.sum())),
        zero_rows=int((~loaded.any(2)).sum()), zero_columns=int((~loaded.any(1)).sum()),
        causal=float(below.sum() * len(loaded) * share))


def maps(key_range: KeyRange, num_keys: int, tile: Tile) -> tuple[np.ndarray, np.ndarray]:
    """(the halves of tiles that are not empty: bool[B, query tiles, key tiles, 2], the full tiles: bool without the 2).

    Queries and keys beyond the last see and are seen by nothing.
    """
    missing = -key_range.start.shape[1] % tile.queries
    padded = KeyRange(*(np.pad(np.asarray(x), ((0, 0), (0, missing))) for x in key_range))
    *halves, full = map(np.asarray, half_map(padded, num_keys + -num_keys % tile.keys, tile))
    return np.stack(halves, axis=-1), full


def true_area(key_range: KeyRange) -> int:
    """Pairs of a query and a key that it sees, of all rows."""
    return int(np.maximum(np.asarray(key_range.stop, np.int64) - key_range.start, 0).sum())
