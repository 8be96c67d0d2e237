"""Adapters of a linear layer: configurations and branches.

Each configuration says on which slots it acts (`scope`) and makes a Linen module that is called with the layer's input
and output at those slots, and gives the new output.
"""
import dataclasses
import math
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from vora_jax.nn.norms import LayerNorm
from vora_jax.ops.linear import linear
from vora_jax.types import Params, Scope, UserError


@dataclasses.dataclass(frozen=True)
class LowRank:
    """Adds `scale * (x @ a) @ b` to a linear layer (Hu et al. 2021).

    rank: inner width R.
    scale: factor of the branch (alpha / rank where a recipe states alpha).
    dropout: rate on the branch's input while training.
    scope: the slots it acts on: all, vision or text.
    """

    rank: int
    scale: float = 1.0
    dropout: float = 0.0
    scope: Scope = 'all'

    def __post_init__(self):
        _check_rank(self)

    def branch(self, axes: tuple[str, str], deterministic: bool, name: str) -> nn.Module:
        """The Linen module that computes the new output."""
        return LowRankBranch(self, axes, deterministic, name=name)

    def fold(self, kernel: jax.Array, params: Params) -> jax.Array:
        """f32[..., D_in, D_out]: `kernel` plus this adapter's product, in f32; leading axes are layers."""
        low, high = (params[side].astype(jnp.float32) for side in ('a', 'b'))
        # Highest precision: a TPU's default would round the product to bf16.
        product = jnp.matmul(low, high, precision=jax.lax.Precision.HIGHEST)
        return kernel.astype(jnp.float32) + self.scale * product


@dataclasses.dataclass(frozen=True)
class DualLowRank:
    """Adds `scale * (layer_norm(x @ a) * relu(x @ task)) @ b` (Jiao et al. 2024, arXiv 2411.12787, Dual-LoRA).

    The second product is a factor for each rank channel that depends on the slot, so no kernel equals this and it cannot
    be folded.

    rank, scale, scope: as in `LowRank`.    dropout: rate on the input of `a` only.    norm_eps: of the norm.
    """

    rank: int = 32
    scale: float = 2.0
    dropout: float = 0.05
    scope: Scope = 'all'
    norm_eps: float = 1e-5

    def __post_init__(self):
        _check_rank(self)

    def branch(self, axes: tuple[str, str], deterministic: bool, name: str) -> nn.Module:
        """The Linen module that computes the new output."""
        return DualLowRankBranch(self, axes, deterministic, name=name)


@dataclasses.dataclass(frozen=True)
class ModalityKernel:
    """A kernel (and bias) of its own for the slots of its scope (LLaViT, arXiv 2511.10301); starts as a copy.

    scope: the slots it acts on: vision or text.
    """

    scope: Literal['vision', 'text'] = 'vision'

    def __post_init__(self):
        if self.scope not in ('vision', 'text'):
            raise UserError(f"ModalityKernel.scope is {self.scope!r}; it is 'vision' or 'text'. A kernel for all slots is "
                            "the layer's own: train that.")

    def branch(self, axes: tuple[str, str], deterministic: bool, name: str) -> nn.Module:
        """The Linen module that computes the new output."""
        return ModalityKernelBranch(axes, name=name)


Adapter = LowRank | DualLowRank | ModalityKernel


class LowRankBranch(nn.Module):
    """The sum of a `LowRank`; a is kaiming-uniform (U(+-1/sqrt(fan_in))), b is zero, so it changes nothing at first."""

    adapter: LowRank
    axes: tuple[str, str]
    deterministic: bool

    @nn.compact
    def __call__(self, x: jax.Array, y: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
        a, b = _low(self, 'a', x), _high(self, y)
        x = nn.Dropout(self.adapter.dropout, deterministic=self.deterministic)(x)
        low = checkpoint_name(linear(x, a), 'low_rank')
        return y + linear(low * jnp.asarray(self.adapter.scale, x.dtype), b)


class DualLowRankBranch(nn.Module):
    """The sum of a `DualLowRank`; a and task are kaiming-uniform, b is zero. The norm runs in f32."""

    adapter: DualLowRank
    axes: tuple[str, str]
    deterministic: bool

    @nn.compact
    def __call__(self, x: jax.Array, y: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
        a, task, b = _low(self, 'a', x), _low(self, 'task', x), _high(self, y)
        dropped = nn.Dropout(self.adapter.dropout, deterministic=self.deterministic)(x)
        skill, gate = (checkpoint_name(low, 'low_rank') for low in (linear(dropped, a), linear(x, task)))
        skill = LayerNorm(self.adapter.norm_eps, axis='rank', name='norm')(skill)
        return y + linear(skill * nn.relu(gate) * jnp.asarray(self.adapter.scale, x.dtype), b)


class ModalityKernelBranch(nn.Module):
    """`x @ kernel + bias` with parameters of its own, which start as the layer's."""

    axes: tuple[str, str]

    @nn.compact
    def __call__(self, x: jax.Array, y: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
        def copied(name, value, axes):
            return self.param(name, nn.with_logical_partitioning(lambda key: jnp.asarray(value, jnp.float32), axes))

        out = linear(x, copied('kernel', kernel, self.axes))
        return out if bias is None else out + copied('bias', bias, self.axes[1:]).astype(x.dtype)[None, None]


def _check_rank(adapter: LowRank | DualLowRank) -> None:
    if adapter.rank < 1 or not 0 <= adapter.dropout < 1:
        raise UserError(f'{type(adapter).__name__}: rank {adapter.rank} must be at least 1, and dropout {adapter.dropout} '
                        'from 0 to less than 1.')


def _low(branch: nn.Module, name: str, x: jax.Array) -> jax.Array:
    shape = x.shape[-1], branch.adapter.rank
    return branch.param(name, nn.with_logical_partitioning(_kaiming_uniform, (branch.axes[0], 'rank')), shape, jnp.float32)


def _high(branch: nn.Module, y: jax.Array) -> jax.Array:
    shape = branch.adapter.rank, y.shape[-1]
    zeros = nn.with_logical_partitioning(nn.initializers.zeros, ('rank', branch.axes[1]))
    return branch.param('b', zeros, shape, jnp.float32)


def _kaiming_uniform(key, shape, dtype):
    bound = 1.0 / math.sqrt(shape[0])
    return jax.random.uniform(key, shape, dtype, -bound, bound)
