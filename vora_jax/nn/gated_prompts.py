"""Learned keys and values behind zero gates."""
import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from vora_jax.nn.slots import SlotContext, vision_slots
from vora_jax.ops.attention import attention
from vora_jax.types import TEXT, KeyRange, UserError


@dataclasses.dataclass(frozen=True)
class GatedPrompts:
    """Adds `tanh(gate_h) * attention(q_h, keys(prompts), values(prompts))` to each head h of an attention.

    Zero-initialised attention (Zhang et al. 2023, arXiv 2303.16199). The prompts have a softmax of their own, so a gate of 0
    leaves the layer as it was; they stand at no rotary position, while q is rotated, as in the released code.

    num_prompts: prompts K of a layer, vectors of the layer's width.
    """

    num_prompts: int = 10

    def __post_init__(self):
        if self.num_prompts < 1:
            raise UserError(f'GatedPrompts.num_prompts = {self.num_prompts}: a layer with prompts needs at least 1.')


class PromptBranch(nn.Module):
    """The sum of `GatedPrompts`; prompts are normal with deviation 1, gates are zero, so it changes nothing at first."""

    prompts: GatedPrompts
    width: int
    attend: Callable = attention

    @nn.compact
    def __call__(self, out: jax.Array, q: jax.Array, keys_values: Callable, context: SlotContext) -> jax.Array:
        """f[B, T, N, H]: `out`, the attention of q to other slots, plus that to the prompts; 0 stays where a slot sees none.

        q: f[B, T, N, H] normed and rotated queries.
        keys_values: the layer's own (keys, values), f[1, K, K_heads, H], of vectors f[1, K, width] and their context.
        """
        rows, num_prompts, num_heads = len(q), self.prompts.num_prompts, q.shape[2]
        init = nn.with_logical_partitioning(nn.initializers.normal(1.0), (None, 'embed'))
        prompts = self.param('prompts', init, (num_prompts, self.width), jnp.float32)
        zeros = nn.with_logical_partitioning(nn.initializers.zeros, ('heads',))
        gate = jnp.tanh(self.param('gate', zeros, (num_heads,), jnp.float32)).astype(out.dtype)

        # To other adapters of the layer the prompts are words.
        none, words = jnp.zeros((1, num_prompts), jnp.int32), jnp.full((1, num_prompts), TEXT, jnp.int8)
        as_text = SlotContext(KeyRange(none, none), words, vision=vision_slots(none[:, :0], words))
        keys, values = keys_values(prompts.astype(out.dtype)[None], as_text)
        keys, values = (jnp.broadcast_to(z, (rows, *z.shape[1:])) for z in (keys, values))
        start, stop = context.key_range
        seen = KeyRange(jnp.zeros_like(start), jnp.where(stop > start, jnp.asarray(num_prompts, stop.dtype), 0))
        changed = out + gate[None, None, :, None] * self.attend(q, keys, values, seen)
        if context.adapters_on is None:
            return changed
        return jnp.where(context.adapters_on.reshape(-1, 1, 1, 1), changed, out)
