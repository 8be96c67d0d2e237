"""One transformer block with adaptable linears."""
import dataclasses
from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from vora_jax.nn.adapted_dense import AdaptedDense
from vora_jax.nn.adapters import Adapter
from vora_jax.nn.cache import Cache, write_cache
from vora_jax.nn.gated_prompts import GatedPrompts, PromptBranch
from vora_jax.nn.modality_mixture import MixtureBranch, MixtureTable
from vora_jax.nn.norms import Norm, RMSNorm, norm
from vora_jax.nn.slots import SlotContext
from vora_jax.ops.attention import attention
from vora_jax.ops.rope import apply_rope

LINEARS = ('q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj')

# Which adapters sit on which linear of a block: ((linear, (adapter, ...)), ...).
AdapterTable = tuple[tuple[str, tuple[Adapter, ...]], ...]

# `silu_gated`: silu(gate) * up (Llama, Qwen, AIMv2). The others have no gate: gelu (DINOv2), its tanh form (SigLIP), and
# x * sigmoid(1.702 x) (CLIP).
Activation = Literal['silu_gated', 'gelu', 'gelu_tanh', 'gelu_quick']


@dataclasses.dataclass(frozen=True)
class BlockShape:
    """Sizes of a pre-norm block, and the choices in which block families differ.

    width D, mlp_width F, N query and K key/value heads of head_dim H.
    norm: of its two norms.    activation: of its MLP.    biases: linears that have one.
    qk_norm: an RMSNorm over H on each query and key head, before rotary positions (Qwen3).
    layer_scale: a learned factor for each channel of both branches (DINOv2).
    """

    width: int
    mlp_width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    norm: Norm = 'rms'
    activation: Activation = 'silu_gated'
    biases: tuple[str, ...] = ()
    qk_norm: bool = False
    layer_scale: bool = False


class Block(nn.Module):
    """Pre-norm block: norm, attention, norm, MLP, each branch added to its input.

    adapters: of its linears.    biases: linears that have one beyond `shape.biases`.
    mixtures: of its normed states.    prompts: of its attention.
    attend: attention function with the signature of `ops.attention.attention`.
    """

    shape: BlockShape
    adapters: AdapterTable = ()
    biases: tuple[str, ...] = ()
    mixtures: MixtureTable = ()
    prompts: GatedPrompts | None = None
    attend: Callable = attention
    deterministic: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, context: SlotContext, cache: Cache | None = None):
        """(f[B, T, D] output, cache with this layer's new slots written at `context.write_slot`), for x: f[B, T, D]."""
        shape, table = self.shape, dict(self.adapters)

        def linear(name, features, axes):
            use_bias = name in shape.biases or name in self.biases
            dense = AdaptedDense(features, axes, table.get(name, ()), use_bias, self.deterministic, name=name)
            return lambda x, context=context: checkpoint_name(dense(x, context=context), name)

        q_width, kv_width = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        q_proj = linear('q_proj', q_width, ('embed', 'heads'))
        k_proj, v_proj = (linear(name, kv_width, ('embed', 'kv')) for name in ('k_proj', 'v_proj'))
        q_norm, k_norm = (RMSNorm(shape.norm_eps, 'head_dim', name=name) if shape.qk_norm else _same
                          for name in ('q_norm', 'k_norm'))

        def heads(z):
            return z.reshape(*z.shape[:2], -1, shape.head_dim)

        def keys_values(y, context):
            return k_norm(heads(k_proj(y, context=context))), heads(v_proj(y, context=context))

        y = norm(shape.norm, shape.norm_eps, 'attention_norm')(x)
        y, cache = self.mixed(y, 'attention', context, cache)
        q, (k, v) = q_norm(heads(q_proj(y))), keys_values(y, context)
        if context.angles is not None:
            q, k = apply_rope(q, context.angles), apply_rope(k, context.angles)
        if cache is not None:
            k, v = (write_cache(old, new, context.write_slot) for old, new in zip(cache[:2], (k, v)))
            cache = cache._replace(keys=k, values=v)
        out = self.attend(q, k, v, context.key_range)
        if self.prompts is not None:
            branch = PromptBranch(self.prompts, shape.width, self.attend, name='adapter_prompts')
            out = branch(out, q, keys_values, context)
        out = linear('o_proj', shape.width, ('heads', 'embed'))(out.reshape(*out.shape[:2], q_width))
        x = checkpoint_name(x + self.scaled(out, 'attention_scale'), 'attended')

        y = norm(shape.norm, shape.norm_eps, 'mlp_norm')(x)
        y, cache = self.mixed(y, 'mlp', context, cache)
        up = linear('up_proj', shape.mlp_width, ('embed', 'mlp'))
        if shape.activation == 'silu_gated':
            inner = nn.silu(linear('gate_proj', shape.mlp_width, ('embed', 'mlp'))(y)) * up(y)
        else:
            inner = activate(up(y), shape.activation)
        out = linear('down_proj', shape.width, ('mlp', 'embed'))(inner)
        return x + self.scaled(out, 'mlp_scale'), cache

    def mixed(self, y: jax.Array, site: str, context: SlotContext, cache: Cache | None):
        """(y through the mixture of this site, where there is one; the cache)."""
        mixture = dict(self.mixtures).get(site)
        if mixture is None:
            return y, cache
        branch = MixtureBranch(mixture, self.deterministic, name=f'adapter_{site}')
        if cache is None or site not in cache.routes:
            return branch(y, context)[0], cache
        y, routes = branch(y, context, cache.routes[site])
        return y, cache._replace(routes=cache.routes | {site: routes})

    def scaled(self, x: jax.Array, name: str) -> jax.Array:
        """x times the layer scale of this name, where the shape has one."""
        if not self.shape.layer_scale:
            return x
        scale = self.param(name, nn.with_logical_partitioning(nn.initializers.ones, ('embed',)), x.shape[-1:], jnp.float32)
        return x * scale.astype(x.dtype)[None, None]


def activate(x: jax.Array, activation: Activation) -> jax.Array:
    """The ungated activation, applied to x: f[...]."""
    if activation == 'gelu_quick':
        return x * nn.sigmoid(jnp.asarray(1.702, x.dtype) * x)
    return nn.gelu(x, approximate=activation == 'gelu_tanh')


def _same(x: jax.Array) -> jax.Array:
    return x
