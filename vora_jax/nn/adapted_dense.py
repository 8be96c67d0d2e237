"""A linear layer and its adapters."""
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from vora_jax.nn.adapters import Adapter
from vora_jax.nn.slots import SlotContext, scope_mask
from vora_jax.ops.linear import linear
from vora_jax.ops.take_slots import put_slots, take_slots


class AdaptedDense(nn.Module):
    """f[B, T, features]: a base kernel plus a tuple of adapters, each on the slots of its scope.

    Where an adapter does not act, the result is the base layer's, bit for bit: it is selected, not multiplied by 0. An
    adapter of scope `vision` is evaluated on the vision slots alone, gathered to their static budget Q; all that it does
    in other slots is to copy them.

    features: output width.
    axes: logical names of the kernel's two dimensions.
    """

    features: int
    axes: tuple[str, str]
    adapters: tuple[Adapter, ...] = ()
    use_bias: bool = False
    deterministic: bool = True
    kernel_init: Callable = nn.initializers.lecun_normal()
    bias_init: Callable = nn.initializers.zeros

    @nn.compact
    def __call__(self, x: jax.Array, context: SlotContext) -> jax.Array:
        kernel = self.param('kernel', nn.with_logical_partitioning(self.kernel_init, self.axes),
                            (x.shape[-1], self.features), jnp.float32)
        y, bias = linear(x, kernel), None
        if self.use_bias:
            bias = self.param('bias', nn.with_logical_partitioning(self.bias_init, self.axes[1:]),
                              (self.features,), jnp.float32)
            y = y + bias.astype(x.dtype)[None, None]
        for index, adapter in enumerate(self.adapters):
            branch = adapter.branch(self.axes, self.deterministic, f'adapter_{index}')
            if adapter.scope == 'vision':
                slot, token, source = context.vision
                changed = branch(take_slots(x, slot, token), take_slots(y, slot, token), kernel, bias)
                y = put_slots(y, changed, slot, token, source)
            else:
                changed, mask = branch(x, y, kernel, bias), scope_mask(context, adapter.scope)
                y = changed if mask is None else jnp.where(mask[..., None], changed, y)
        return y
