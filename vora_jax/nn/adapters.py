"""Low-rank adapters: configuration, branch and fold."""
import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

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

    def branch(self, features: int, axes: tuple[str, str], deterministic: bool, name: str) -> nn.Module:
        """The Linen module that computes the addition, f[B, T, features]."""
        return LowRankBranch(self, features, axes, deterministic, name=name)

    def fold(self, kernel: jax.Array, params: Params) -> jax.Array:
        """f32[..., D_in, D_out]: `kernel` plus this adapter's product, in f32; leading axes are layers.

        Raises:
            UserError: the adapter acts on some slots only, which no single kernel can express.
        """
        if self.scope != 'all':
            raise UserError(f'merge: an adapter of scope {self.scope!r} cannot be folded into a kernel that all slots '
                            "share; train with scope 'all' or export the model unmerged.")
        low, high = (params[side].astype(jnp.float32) for side in ('a', 'b'))
        # Highest precision: a TPU's default would round the product to bf16.
        product = jnp.matmul(low, high, precision=jax.lax.Precision.HIGHEST)
        return kernel.astype(jnp.float32) + self.scale * product


class LowRankBranch(nn.Module):
    """The product of a `LowRank`; a is kaiming-uniform (U(+-1/sqrt(fan_in))), b is zero, so it starts at exactly 0."""

    adapter: LowRank
    features: int
    axes: tuple[str, str]
    deterministic: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        a = self.param('a', nn.with_logical_partitioning(_kaiming_uniform, (self.axes[0], 'rank')),
                       (x.shape[-1], self.adapter.rank), jnp.float32)
        b = self.param('b', nn.with_logical_partitioning(nn.initializers.zeros, ('rank', self.axes[1])),
                       (self.adapter.rank, self.features), jnp.float32)
        x = nn.Dropout(self.adapter.dropout, deterministic=self.deterministic)(x)
        return linear(linear(x, a) * jnp.asarray(self.adapter.scale, x.dtype), b)


def _kaiming_uniform(key, shape, dtype):
    bound = 1.0 / math.sqrt(shape[0])
    return jax.random.uniform(key, shape, dtype, -bound, bound)
