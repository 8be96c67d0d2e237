"""One transformer block with adaptable linears."""
import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import jax

from vora_jax.nn.adapted_dense import AdaptedDense
from vora_jax.nn.adapters import LowRank
from vora_jax.nn.norms import RMSNorm
from vora_jax.nn.slots import SlotContext
from vora_jax.ops.attention import attention
from vora_jax.ops.rope import apply_rope

LINEARS = ('q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj')

# Which adapters sit on which linear of a block: ((linear, (adapter, ...)), ...).
AdapterTable = tuple[tuple[str, tuple[LowRank, ...]], ...]


@dataclasses.dataclass(frozen=True)
class BlockShape:
    """Sizes of a pre-norm block: width D, mlp_width F, N query and K key/value heads of head_dim H."""

    width: int
    mlp_width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    qkv_bias: bool = False


class Block(nn.Module):
    """Pre-norm block of Llama, Qwen2 and AIMv2: RMSNorm, attention, RMSNorm, gated SiLU MLP.

    attend: attention function with the signature of `ops.attention.attention`.
    """

    shape: BlockShape
    adapters: AdapterTable = ()
    attend: Callable = attention
    deterministic: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, context: SlotContext, cache=None):
        """(f[B, T, D] output, cache with this layer's keys and values written), for x: f[B, T, D].

        cache: None, or (keys, values), each f[B, S, K, H]; new keys go to `context.write_slot`.
        """
        shape, table = self.shape, dict(self.adapters)

        def linear(name, features, axes, use_bias=False):
            dense = AdaptedDense(features, axes, table.get(name, ()), use_bias, self.deterministic, name=name)
            return functools.partial(dense, context=context)

        y = RMSNorm(shape.norm_eps, name='attention_norm')(x)
        q_width, kv_width = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        q = linear('q_proj', q_width, ('embed', 'heads'), shape.qkv_bias)(y)
        k = linear('k_proj', kv_width, ('embed', 'kv'), shape.qkv_bias)(y)
        v = linear('v_proj', kv_width, ('embed', 'kv'), shape.qkv_bias)(y)
        q = q.reshape(*q.shape[:2], shape.num_heads, shape.head_dim)
        k, v = (z.reshape(*z.shape[:2], shape.num_kv_heads, shape.head_dim) for z in (k, v))
        if context.angles is not None:
            q, k = apply_rope(q, context.angles), apply_rope(k, context.angles)
        if cache is not None:
            cache = tuple(write_cache(old, new, context.write_slot) for old, new in zip(cache, (k, v)))
            k, v = cache
        out = self.attend(q, k, v, context.key_range)
        x = x + linear('o_proj', shape.width, ('heads', 'embed'))(out.reshape(*out.shape[:2], q_width))

        y = RMSNorm(shape.norm_eps, name='mlp_norm')(x)
        gate = linear('gate_proj', shape.mlp_width, ('embed', 'mlp'))(y)
        up = linear('up_proj', shape.mlp_width, ('embed', 'mlp'))(y)
        x = x + linear('down_proj', shape.width, ('mlp', 'embed'))(nn.silu(gate) * up)
        return x, cache


def write_cache(cache: jax.Array, new: jax.Array, write_slot: jax.Array) -> jax.Array:
    """f[B, S, K, H]: `cache` with `new: f[B, T, K, H]` at slots `write_slot: i32[B, T]` of each row; others unchanged."""
    rows = jax.numpy.arange(cache.shape[0], dtype=jax.numpy.int32)[:, None]
    return cache.at[rows, write_slot].set(new.astype(cache.dtype), mode='drop')
