"""Counts of a batch that its FLOPs follow.

Made on the host, once for a run or a plan: how many slots, tokens, places and attended pairs a step holds, and how many its
program computes, which is more by padding, static budgets and tiles.
"""
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vora_jax.batch import Batch
from vora_jax.ops.attention import Implementation, resolve
from vora_jax.ops.blocked_attention import BLOCK
from vora_jax.ops.cross_entropy import CHUNK
from vora_jax.ops.tile_walk import Tile, half_map, tile_map
from vora_jax.types import TEXT, KeyRange


class Count(NamedTuple):
    """needed: what the method asks for.    computed: what the program works on."""

    needed: float
    computed: float

    def times(self, needed: float, computed: float | None = None) -> 'Count':
        return Count(self.needed * needed, self.computed * (needed if computed is None else computed))


class Area(NamedTuple):
    """pairs: of a query and a key that it sees; computed: those in visited tiles.

    backward_products: products of a tile that the gradient takes; 5 are needed without a stored `[T, S]` (scores, d_weights,
    d_q, d_k, d_v), 7 where d_q has a walk of its own.
    """

    pairs: Count
    backward_products: int = 5


@dataclasses.dataclass(frozen=True)
class BatchStatistics:
    """Counts of one optimizer step, over all devices and micro-batches.

    rows: how many.    slots: of rows; needed are those that are no padding.    vision, text: vision tokens and TEXT slots.
    targets: slots whose logits are computed.    places: for patches.    images: in rows.
    attention: of the language model.    image_attention: of vision encoders.    micro_batches: how many there are.
    """

    rows: float
    slots: Count
    vision: Count
    text: Count
    targets: Count
    places: Count
    images: Count
    attention: Area
    image_attention: Area
    micro_batches: float = 1

    def times(self, factor: float) -> 'BatchStatistics':
        """Those of so many times the rows, in as many micro-batches."""
        def scaled(value: Any) -> Any:
            if isinstance(value, Area):
                return value._replace(pairs=value.pairs.times(factor))
            return value.times(factor) if isinstance(value, Count) else value

        fields = {field.name: scaled(getattr(self, field.name)) for field in dataclasses.fields(self)}
        return BatchStatistics(**fields | {'rows': self.rows * factor})


def statistics_of(batch: Batch, model: Any, accumulation: int = 1, implementation: Implementation = 'auto',
                  platform: str | None = None) -> BatchStatistics:
    """The statistics of a batch in NumPy, or of the rows of a global one that this process holds, scaled to all rows.

    Args:
        batch: of one optimizer step.
        model: the run's; its heads decide which tiles attention takes.
        accumulation: micro-batches; micro-batch i holds rows i, i + accumulation, ...
        implementation, platform: of attention, as `ops.attention.resolve` takes them. A ring of devices that shares a row's
            slots (`Mesh.context`) is counted as if one device had them all.
    """
    rows = len(batch.tokens)
    if batch.patches is not None:
        batch = batch._replace(patches=batch.patches._replace(pixels=None))  # large, and not looked at
    batch = jax.tree.map(_local_rows, batch)
    slots, text = batch.tokens.size, (batch.modality == TEXT).sum()
    llm, vit = getattr(model, 'llm', None), _encoder(model)
    attention = images = places = None
    if llm is not None:
        attention = attention_area(batch.key_range, batch.tokens.shape[1], llm.num_heads, llm.num_kv_heads, llm.head_dim,
                                   llm.dtype, implementation, platform)
    if batch.patches is not None:
        places = Count(float((batch.patches.image_id >= 0).sum()), batch.patches.image_id.size)
        images = Count(float((batch.patches.grid[..., 0] > 0).sum()), batch.patches.grid[..., 0].size)
    image_attention = None
    if vit is not None and batch.patches is not None:
        dtype = llm.dtype if llm is not None else jnp.dtype('float32')
        image_attention = attention_area(batch.patches.key_range, batch.patches.image_id.shape[1], vit.num_heads,
                                         vit.num_heads, vit.width // vit.num_heads, dtype, implementation, platform)
    nothing = Count(0, 0)
    return BatchStatistics(
        rows=len(batch.tokens), slots=Count(float((batch.segment_id > 0).sum()), slots),
        vision=Count(float((batch.vision_slot >= 0).sum()), batch.vision_slot.size),
        text=Count(float(text), slots), targets=_targets(batch.loss_mask, accumulation), places=places or nothing,
        images=images or nothing, attention=attention or Area(nothing), image_attention=image_attention or Area(nothing),
        micro_batches=accumulation).times(rows / len(batch.tokens))


def attention_area(key_range: KeyRange, num_keys: int, num_heads: int, num_kv_heads: int, head_dim: int, dtype: Any,
                   implementation: Implementation = 'auto', platform: str | None = None) -> Area:
    """What an implementation visits of a mask given in NumPy; of one head."""
    batch, num_queries = key_range.start.shape
    pairs = float(np.maximum(np.asarray(key_range.stop, np.int64) - key_range.start, 0).sum())
    q, k = (jax.ShapeDtypeStruct((batch, length, heads, head_dim), dtype)
            for length, heads in ((num_queries, num_heads), (num_keys, num_kv_heads)))
    chosen = resolve(q, k, k, implementation, platform).implementation
    if chosen == 'reference':
        return Area(Count(pairs, batch * num_queries * num_keys))
    if chosen == 'xla':
        tile = Tile(min(BLOCK, num_queries), min(BLOCK, num_keys))
        return Area(Count(pairs, _run_area(key_range, num_keys, tile)))
    if chosen == 'pallas_gpu':
        from vora_jax.ops.range_attention_gpu import FULL_PRECISION, SCHEDULES
        tile = (FULL_PRECISION['forward'] if q.dtype == jnp.float32 else SCHEDULES['forward'][0]).tile
        visited = np.asarray(tile_map(_whole_tiles(key_range, tile), _rounded(num_keys, tile.keys), tile)[0])
        return Area(Count(pairs, int(visited.sum()) * tile.queries * tile.keys), 7)
    from vora_jax.ops.range_attention_tpu import MAX_RESIDENT_BYTES, default_tile
    tile = default_tile(q, k)
    lower, upper, _ = map(np.asarray, half_map(_whole_tiles(key_range, tile), _rounded(num_keys, tile.keys), tile))
    held = 4 * num_heads // num_kv_heads * _rounded(num_queries, tile.queries) * head_dim
    return Area(Count(pairs, int(lower.sum() + upper.sum()) * tile.queries * tile.keys / 2),
                5 if held <= MAX_RESIDENT_BYTES else 7)


def _run_area(key_range: KeyRange, num_keys: int, tile: Tile) -> int:
    """Tiles of keys from the first to the last that any query of a tile sees."""
    start, stop = (x.reshape(len(x), -1, tile.queries) for x in _whole_tiles(key_range, tile))
    seen = stop > start
    first = np.where(seen, start, num_keys).min(-1) // tile.keys
    last = -(-np.where(seen, stop, 0).max(-1) // tile.keys)
    return int(np.maximum(last - first, 0).sum()) * tile.queries * tile.keys


def _whole_tiles(key_range: KeyRange, tile: Tile) -> KeyRange:
    missing = -key_range.start.shape[1] % tile.queries
    return KeyRange(*(np.pad(np.asarray(x), ((0, 0), (0, missing))) for x in key_range))


def _rounded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _targets(loss_mask: np.ndarray, accumulation: int) -> Count:
    """Each row of a micro-batch has as many chunks as the one with the most targets."""
    targets = (loss_mask > 0).sum(1)
    chunk = min(CHUNK, loss_mask.shape[1])
    longest = [targets[index::accumulation].max(initial=0) for index in range(accumulation)]
    computed = sum(_rounded(int(most), chunk) for most in longest) * len(targets) / accumulation
    return Count(float(targets.sum()), float(computed))


def _encoder(model: Any) -> Any:
    """The vision encoder or teacher of a model, or None."""
    if getattr(model, 'distillation', None) is not None:
        return model.distillation.teacher
    return getattr(model, 'vit', None) or getattr(getattr(model, 'vision', None), 'encoder', None)


def _local_rows(x: Any) -> np.ndarray:
    """The rows of a global array that this process holds, each once."""
    if not isinstance(x, jax.Array):
        return np.asarray(x)
    parts = {shard.index[0].start or 0: np.asarray(shard.data) for shard in x.addressable_shards}
    return np.concatenate([parts[start] for start in sorted(parts)])
