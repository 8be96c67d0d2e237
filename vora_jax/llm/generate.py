"""Greedy generation: one prefill, cached decoding."""
import functools
from typing import Any

import jax
import jax.numpy as jnp

from vora_jax.batch import Batch
from vora_jax.nn.cache import Cache
from vora_jax.nn.slots import SlotContext, vision_slots
from vora_jax.types import PAD, TEXT, Array, KeyRange, Params


def empty_cache(model: Any, batch: int, num_slots: int) -> Cache:
    """Zeros for all layers of a `VisionLanguageModel` and rows of `num_slots` slots."""
    llm = model.llm
    shape = (llm.num_layers, batch, num_slots, llm.num_kv_heads, llm.head_dim)
    mixtures = {site: mixture for group in model.groups for site, mixture in group.mixtures if mixture.route_by == 'slot'}
    routes = {site: jnp.zeros((*shape[:3], mixture.num_experts), jnp.float32) for site, mixture in mixtures.items()}
    return Cache(jnp.zeros(shape, llm.dtype), jnp.zeros(shape, llm.dtype), routes)


@functools.partial(jax.jit, static_argnames=('model', 'max_new_tokens', 'eos_id'))
def greedy(model: Any, params: Params, prompts: Batch, *, max_new_tokens: int, eos_id: int,
           adapters_on: Array | None = None) -> jax.Array:
    """i32[B, max_new_tokens]: the most likely continuation of each prompt; 0 after its `eos_id`.

    Args:
        model: a `VisionLanguageModel`.
        params: its full parameters.
        prompts: one prompt a row, right-padded; targets are not read.
        max_new_tokens: ids to generate at most. Stops early when every row has ended.
        eos_id: id that ends an answer; it is part of the result.
        adapters_on: as in the model.

    Cache slots are row slots: each row writes its next key at its own next slot, so its keys stay contiguous and prompts
    of different lengths share a batch without padding on the left.
    """
    num_rows, num_slots = prompts.tokens.shape
    variables = {'params': params}
    kernel = model.unembedding(params)
    length = jnp.sum(prompts.modality != PAD, axis=1, dtype=jnp.int32)
    last = jnp.maximum(length - 1, 0)

    def next_token(hidden):
        return jnp.argmax(jnp.dot(hidden.astype(jnp.float32), kernel.astype(jnp.float32)), axis=-1).astype(jnp.int32)

    slots = jnp.broadcast_to(jnp.arange(num_slots, dtype=jnp.int32)[None], (num_rows, num_slots))
    context = SlotContext(prompts.key_range, prompts.modality, adapters_on=adapters_on, write_slot=slots,
                          route_slot=prompts.route_slot,
                          vision=vision_slots(prompts.vision_slot, prompts.modality, adapters_on))
    cache = empty_cache(model, num_rows, num_slots + max_new_tokens)
    x = model.apply(variables, prompts, adapters_on, method='embed')
    hidden, cache = model.apply(variables, x, prompts.positions, context, cache, method='decode')
    first = next_token(jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0])
    position = jnp.take_along_axis(prompts.positions, last[:, None], axis=1)
    start = jnp.take_along_axis(prompts.key_start, last[:, None], axis=1)
    route = jnp.take_along_axis(prompts.route_slot, last[:, None], axis=1)

    def unfinished(carry):
        step, _, ended, _, _ = carry
        return (step < max_new_tokens) & ~jnp.all(ended)

    def decode(carry):
        step, token, ended, cache, answer = carry
        slot = length[:, None] + step - 1  # of the token generated last
        modality = jnp.full_like(slot, TEXT)
        context = SlotContext(KeyRange(start, slot + 1), modality, adapters_on=adapters_on, write_slot=slot,
                              route_slot=route, vision=vision_slots(prompts.vision_slot[:, :0], modality))
        x = model.apply(variables, token[:, None], method='embed_tokens')
        hidden, cache = model.apply(variables, x, position + step, context, cache, method='decode')
        token = jnp.where(ended, 0, next_token(hidden[:, 0]))
        return step + 1, token, ended | (token == eos_id), cache, answer.at[:, step].set(token)

    answer = jnp.zeros((num_rows, max_new_tokens), jnp.int32).at[:, 0].set(first)
    return jax.lax.while_loop(unfinished, decode, (1, first, first == eos_id, cache, answer))[-1]
