"""What every layer knows about its slots."""
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vora_jax.types import TEXT, VISION, Array, KeyRange, Scope


class VisionSlots(NamedTuple):
    """Which slots adapters of scope `vision` act on, as `ops.take_slots` reads it; made once for all layers.

    slot: i32[B, Q] slot of the q-th vision token, -1 none.
    token: i32[B, S] the q of each vision slot, -1 in other slots.
    source: i32[B, S] S + q in vision slots, the slot's own number in others.
    """

    slot: Array
    token: Array
    source: Array


class SlotContext(NamedTuple):
    """Per-slot data shared by all layers of a stack.

    key_range: i32[B, T] twice; which keys each slot sees.
    modality: i8[B, T] PAD, TEXT, VISION or ROUTE; None in a stack whose layers have no adapters (a vision encoder).
    angles: f32[B, T, H / 2] twice, rotary (cos, sin); None without rotary positions.
    adapters_on: bool[] or bool[B], the run-time switch of all adapters; None: on.
    write_slot: i32[B, T] cache slot each new key is written to; None without a cache.
    route_slot: i32[B, T] slot whose state routes each slot (a cache slot where there is a cache).
    vision: of slots whose adapters are on; None in a stack without adapters of scope `vision`.
    """

    key_range: KeyRange
    modality: Array | None = None
    angles: tuple[Array, Array] | None = None
    adapters_on: Array | None = None
    write_slot: Array | None = None
    route_slot: Array | None = None
    vision: VisionSlots | None = None


def scope_mask(context: SlotContext, scope: Scope) -> jax.Array | None:
    """bool[B, T]: the slots an adapter of scope all or text acts on; None where it acts on all of them."""
    mask = None if scope == 'all' else context.modality == TEXT
    if context.adapters_on is None:
        return mask
    on = context.adapters_on.reshape(-1, 1)
    return on if mask is None else mask & on


def vision_token(modality: jax.Array) -> jax.Array:
    """i32[B, S]: the number of each vision slot among those of its row, from 0; -1 in other slots."""
    is_vision = modality == VISION
    return jnp.where(is_vision, jnp.cumsum(is_vision, axis=1, dtype=jnp.int32) - 1, -1)


def vision_slots(vision_slot: Array, modality: Array, adapters_on: Array | None = None) -> VisionSlots:
    """`SlotContext.vision` of `Batch.vision_slot` and `Batch.modality`; a row whose adapters are off has no such slots.

    Example: vision_slot [1, 2, -1] in a row of 4 slots gives token [-1, 0, 1, -1] and source [0, 4, 5, 3].
    """
    slot, token = jnp.asarray(vision_slot), vision_token(modality)
    if adapters_on is not None:
        on = adapters_on.reshape(-1, 1)
        slot, token = (jnp.where(on, index, -1) for index in (slot, token))
    own = jnp.arange(token.shape[1], dtype=jnp.int32)[None]
    return VisionSlots(slot, token, jnp.where(token >= 0, token + own.shape[1], own))
