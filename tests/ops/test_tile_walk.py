"""Tile maps and walks against double loops, and how much area they visit."""
import functools
import re

import jax
import numpy as np
import pytest
from attention_layouts import brute_force_mask
from tiny_model import quick_jit

from vora_jax.bench.random_batch import Description, draw, parse
from vora_jax.bench.tile_statistics import tile_statistics
from vora_jax.ops import tile_walk as tile_walk_module
from vora_jax.ops.tile_walk import FIRST, FLAG_BITS, FULL, LAST, LOWER, UPPER, Tile, tile_map, tile_walk, unpack
from vora_jax.types import KeyRange

TILES = (Tile(4, 4), Tile(8, 4), Tile(2, 16), Tile(64, 64))
SLOTS = 64
BODY, ALL = LOWER | UPPER | FULL, (1 << FLAG_BITS) - 1  # what a visit computes; every flag


def packed(seed):
    return draw(parse('1x16@1, 2x3-9@2, text@1', '1-7'), 3, SLOTS, seed).key_range


def own_image_only(seed):
    """Columns with gaps: the text before an image is seen by the text after it, not by the image."""
    return draw(parse('2x3-20@2, text@1', '1-7', own_image_only=True), 3, SLOTS, seed).key_range


def empty_rows(seed):
    """Whole rows, and whole query and key tiles of others, that see and are seen by nothing."""
    start, stop = (np.array(x) for x in packed(seed))
    start[1], stop[1] = 0, 0
    start[2, :20], stop[2, :20] = 5, 5
    stop[2, 40:] = 0  # below start
    return KeyRange(start, stop)


def scattered(seed):
    """Any ranges, of fewer queries than keys: nothing is monotone, columns have gaps."""
    rng = np.random.default_rng(seed)
    start = rng.integers(0, 2 * SLOTS, (2, SLOTS // 8)).repeat(8, 1)  # groups, so that some tiles are full
    stop = np.clip(start + rng.integers(-3, 50, (2, SLOTS // 8)).repeat(8, 1), 0, 2 * SLOTS)
    stop[rng.random(start.shape) < 0.1] = 0
    return KeyRange(start.astype(np.int32), stop.astype(np.int32))


LAYOUTS = {layout.__name__: (layout, keys) for layout, keys in
           ((packed, SLOTS), (own_image_only, SLOTS), (empty_rows, SLOTS), (scattered, 2 * SLOTS))}


def brute_force_map(mask, tile):
    """(any, all): every tile looked at on its own."""
    rows, queries, keys = mask.shape
    some, every = np.zeros((2, rows, queries // tile.queries, keys // tile.keys), bool)
    for row, i, j in np.ndindex(*some.shape):
        area = mask[row, i * tile.queries:(i + 1) * tile.queries, j * tile.keys:(j + 1) * tile.keys]
        some[row, i, j], every[row, i, j] = area.any(), area.all()
    return some, every


def plain_walk(mask, tile, by_key):
    """[(row, query tile, key tile, flags)] of the visits in order: what a tile's two halves see, one tile after another."""
    halves, _ = brute_force_map(mask, tile._replace(keys=tile.keys // 2))
    _, full = brute_force_map(mask, tile)
    visits = []
    rows, query_tiles, key_tiles = full.shape
    for row in range(rows):
        for outer in range(key_tiles if by_key else query_tiles):
            inner = range(query_tiles if by_key else key_tiles)
            seen = []
            for i, j in ((other, outer) if by_key else (outer, other) for other in inner):
                flags = LOWER * halves[row, i, 2 * j] + UPPER * halves[row, i, 2 * j + 1] + FULL * full[row, i, j]
                if flags:
                    seen.append([row, i, j, flags])
            seen = seen or [[row, 0, outer, 0] if by_key else [row, outer, 0, 0]]
            seen[0][-1] += FIRST
            seen[-1][-1] += LAST
            visits += seen
    return [tuple(map(int, visit)) for visit in visits]


def visits_of(walk, query_tiles, key_tiles):
    """[(row, query tile, key tile, flags)] as kernels read them."""
    words = np.asarray(walk.words)[:int(walk.length)]
    return [tuple(map(int, visit)) for visit in zip(*unpack(words, query_tiles, key_tiles), words & ALL)]


@functools.partial(quick_jit, static_argnums=(1, 2))
def compiled(key_range, num_keys, tile):
    return (tile_map(key_range, num_keys, tile), tile_walk(key_range, num_keys, tile),
            tile_walk(key_range, num_keys, tile, by_key=True))


@pytest.mark.parametrize('layout', LAYOUTS)
def test_maps_and_walks_equal_plain_loops(layout):
    make, num_keys = LAYOUTS[layout]
    maps, work = set(), set()
    for tile in TILES:
        for seed in range(8):
            key_range = make(seed)
            mask = brute_force_mask(key_range, num_keys)
            (some, every), *walks = compiled(key_range, num_keys, tile)
            wanted_some, wanted_every = brute_force_map(mask, tile)
            np.testing.assert_array_equal(some, wanted_some)
            np.testing.assert_array_equal(every, wanted_every)
            maps |= {(bool(a), bool(b)) for a, b in zip(wanted_some.ravel(), wanted_every.ravel())}
            for by_key, walk in enumerate(walks):
                assert walk.words.shape == (wanted_some.size,)
                visits = visits_of(walk, *wanted_some.shape[1:])
                assert visits == plain_walk(mask, tile, by_key)
                work |= {visit[-1] & BODY for visit in visits}
    assert maps == {(False, False), (True, False), (True, True)}  # the layouts have tiles of every kind,
    assert work >= {LOWER, UPPER, LOWER | UPPER, BODY} and work <= {0, LOWER, UPPER, LOWER | UPPER, BODY}  # and visits


@pytest.mark.parametrize('layout', LAYOUTS)
def test_every_tile_of_queries_and_keys_is_begun_and_ended_once(layout):
    make, num_keys = LAYOUTS[layout]
    lone = [0, 0]
    for seed in range(8):
        for by_key, walk in enumerate(compiled(make(seed), num_keys, Tile(4, 4))[1:]):
            visits = visits_of(walk, SLOTS // 4, num_keys // 4)
            rows = max(row for row, *_ in visits) + 1
            everything = [(row, outer) for row in range(rows) for outer in range((num_keys if by_key else SLOTS) // 4)]
            for flag in (FIRST, LAST):  # once, and in order
                assert [(row, tiles[by_key]) for row, *tiles, flags in visits if flags & flag] == everything
            still = [flags for *_, flags in visits if not flags & BODY]
            assert set(still) <= {FIRST | LAST}  # a visit that runs nothing is the only one there, and begins and ends
            lone[by_key] += len(still)
    assert all(lone) or layout != 'empty_rows'


def test_the_walk_drawn_in_the_module():
    """The drawing and the walk beside it, read from the docstring, and the other walk."""
    drawing = [[sign for sign in line if sign in '/.#'] for line in tile_walk_module.__doc__.splitlines()
               if line.startswith('    queries ')]
    query = np.arange(12)
    start = np.select([query < 4, query < 8], [0, 4], 8)
    key_range = KeyRange(*(x.astype(np.int32)[None] for x in (start, np.select([query < 4, query < 8], [query + 1, 8], 9))))
    some, every = brute_force_map(brute_force_mask(key_range, 12), Tile(4, 2))
    assert drawing == np.where(every, '#', np.where(some, '/', '.'))[0].tolist()

    work = {'both': LOWER | UPPER, 'lower half': LOWER, 'upper half': UPPER, 'full': BODY}
    told = re.findall(fr'\((\d),(\d)\) ({"|".join(work)})', tile_walk_module.__doc__)
    drawn = [(0, int(i), int(j), FIRST | LAST | work[what]) for i, j, what in told]  # alone for their queries and keys
    assert [visit[1:3] for visit in drawn] == [(0, 0), (1, 1), (2, 2)]
    for walk in compiled(key_range, 12, Tile(4, 4))[1:]:
        assert visits_of(walk, 3, 3) == drawn


@pytest.mark.parametrize('rows, query_tiles, key_tiles', [(1, 1, 1), (4, 8, 16), (9, 65, 33)])
def test_unpack_is_the_inverse(rows, query_tiles, key_tiles):
    """Every visit of a mask in which all is seen, also where numbers of tiles are no powers of two."""
    whole = KeyRange(np.zeros((rows, query_tiles), np.int32), np.full((rows, query_tiles), 2 * key_tiles, np.int32))
    for by_key in (False, True):
        walk = compiled(whole, 2 * key_tiles, Tile(1, 2))[1 + by_key]
        places = zip(*(x.tolist() for x in unpack(np.asarray(walk.words), query_tiles, key_tiles)))
        order = (rows, key_tiles, query_tiles) if by_key else (rows, query_tiles, key_tiles)
        expected = [(b, j, i) if by_key else (b, i, j) for b, i, j in np.ndindex(*order)]
        assert list(places) == expected and (np.asarray(walk.words) & BODY == BODY).all()


def test_masks_are_data_to_the_walk():
    walk = jax.jit(tile_walk, static_argnums=(1, 2))
    for seed in range(20):
        walk(packed(seed), SLOTS, Tile(4, 4))
    assert walk._cache_size() == 1


# Means over seeds 0 to 9 at the tiles that the TPU kernel takes: area per true area (and as whole tiles, as loaded), and per
# area of the causal tiles. The wanted bounds are 1.5 and 0.45.
@pytest.mark.parametrize('tile, per_true, loaded_per_true, per_causal', [
    ((128, 512), 1.335, 1.570, 0.308), ((256, 512), 1.442, 1.681, 0.333)], ids=str)
def test_area_visited_of_a_packed_batch(tile, per_true, loaded_per_true, per_causal):
    tile, found = Tile(*tile), []
    for seed in range(10):
        key_range = draw(Description(), 1, 8192, seed).key_range
        found.append(tile_statistics(key_range, 8192, tile))
        for walk in compiled(key_range, 8192, tile)[1:]:  # forward and dq walk by query, dkv by key: the same area
            words = np.asarray(walk.words)[:int(walk.length)]
            halves = (words & LOWER != 0).sum() + (words & UPPER != 0).sum()
            assert halves * tile.queries * tile.keys / 2 == found[-1].visited * 8192**2
    names = ('visited_per_true', 'visited_per_causal', 'density')
    means = [np.mean([getattr(one, name) for one in found]) for name in names]
    assert means[0] <= 1.5 and means[1] <= 0.45
    assert means == pytest.approx([per_true, per_causal, 0.1228], abs=1e-3)
    assert np.mean([one.loaded / one.density for one in found]) == pytest.approx(loaded_per_true, abs=1e-3)


def test_a_tile_without_halves_is_refused():
    with pytest.raises(ValueError, match='a tile of 3 keys has no halves'):
        tile_walk(packed(0), SLOTS, Tile(4, 3))
