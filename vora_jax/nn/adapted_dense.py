"""A linear layer and its adapters."""
import flax.linen as nn
import jax
import jax.numpy as jnp

from vora_jax.nn.adapters import LowRank
from vora_jax.nn.slots import SlotContext, scope_mask
from vora_jax.ops.linear import linear


class AdaptedDense(nn.Module):
    """f[B, T, features]: a base kernel plus a tuple of adapters, each on the slots of its scope.

    Where an adapter does not act, the result is the base layer's, bit for bit: it is selected, not multiplied by 0.

    features: output width.
    axes: logical names of the kernel's two dimensions.
    """

    features: int
    axes: tuple[str, str]
    adapters: tuple[LowRank, ...] = ()
    use_bias: bool = False
    deterministic: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, context: SlotContext) -> jax.Array:
        kernel = self.param('kernel', nn.with_logical_partitioning(nn.initializers.lecun_normal(), self.axes),
                            (x.shape[-1], self.features), jnp.float32)
        y = linear(x, kernel)
        if self.use_bias:
            bias = self.param('bias', nn.with_logical_partitioning(nn.initializers.zeros, self.axes[1:]),
                              (self.features,), jnp.float32)
            y = y + bias.astype(x.dtype)[None, None]
        for index, adapter in enumerate(self.adapters):
            delta = adapter.branch(self.features, self.axes, self.deterministic, f'adapter_{index}')(x)
            mask = scope_mask(context, adapter.scope)
            y = y + delta if mask is None else jnp.where(mask[..., None], y + delta, y)
        return y
