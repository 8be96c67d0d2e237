"""Root-mean-square norm in f32."""
import flax.linen as nn
import jax
import jax.numpy as jnp


class RMSNorm(nn.Module):
    """f[..., D] normalised by its root mean square (Zhang & Sennrich 2019).

    The mean square and the division run in f32; the result is cast to the input's dtype before the scale is applied,
    as Llama, Qwen and AIMv2 do it.
    """

    epsilon: float
    axis: str = 'embed'

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param('scale', nn.with_logical_partitioning(nn.initializers.ones, (self.axis,)), x.shape[-1:],
                           jnp.float32)
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.epsilon)
        return wide.astype(x.dtype) * jnp.expand_dims(scale.astype(x.dtype), range(x.ndim - 1))
