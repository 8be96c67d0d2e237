"""Root-mean-square norm and layer norm."""
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

Norm = Literal['rms', 'layer']


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


class LayerNorm(nn.Module):
    """f[..., D] with zero mean and unit variance, scaled and shifted (Ba et al. 2016); all of it in f32, then cast."""

    epsilon: float
    axis: str = 'embed'

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale, bias = (
            self.param(name, nn.with_logical_partitioning(init, (self.axis,)), x.shape[-1:], jnp.float32)
            for name, init in (('scale', nn.initializers.ones), ('bias', nn.initializers.zeros)))
        wide = x.astype(jnp.float32)
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.epsilon)
        scale, bias = (jnp.expand_dims(p.astype(jnp.float32), range(x.ndim - 1)) for p in (scale, bias))
        return (wide * scale + bias).astype(x.dtype)


def norm(kind: Norm, epsilon: float, name: str, axis: str = 'embed') -> nn.Module:
    """The norm of this kind."""
    return (RMSNorm if kind == 'rms' else LayerNorm)(epsilon, axis, name=name)
