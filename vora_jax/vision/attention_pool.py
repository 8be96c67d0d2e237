"""One vector per image, by attention."""
from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from vora_jax.batch import Patches
from vora_jax.nn.adapted_dense import AdaptedDense
from vora_jax.nn.block import BlockShape, activate
from vora_jax.nn.norms import norm
from vora_jax.nn.slots import SlotContext
from vora_jax.ops.attention import attention
from vora_jax.vision.packed import image_range

# `attention`: a learned query attends to the image (AIMv2). `attention_mlp`: the query is projected first, and a block's
# MLP follows (SigLIP).
Pool = Literal['none', 'attention', 'attention_mlp']


class AttentionPool(nn.Module):
    """f[B, M, C]: a learned query attends to each image's patches; 0 for places without an image."""

    kind: Pool
    shape: BlockShape
    attend: Callable = attention

    @nn.compact
    def __call__(self, x: jax.Array, patches: Patches) -> jax.Array:
        """x: f[B, P, C] normed features of `patches`, each image's in one run."""
        shape, with_mlp = self.shape, self.kind == 'attention_mlp'
        rows, num_images = len(x), patches.grid.shape[1]
        start, stop = places = image_range(patches)
        context = SlotContext(places)

        def linear(name, features, axes=('embed', 'heads'), use_bias=with_mlp):
            dense = AdaptedDense(features, axes, use_bias=use_bias, name=name)
            return lambda y: dense(y, context)

        def heads(y):
            return y.reshape(*y.shape[:2], shape.num_heads, shape.head_dim)

        probe = self.param('probe', nn.with_logical_partitioning(nn.initializers.normal(0.02), ('embed',)),
                           (shape.width,), jnp.float32)
        query = jnp.broadcast_to(probe.astype(x.dtype)[None, None], (rows, num_images, shape.width))
        if with_mlp:
            query = linear('q_proj', shape.width)(query)
        key, value = linear('k_proj', shape.width)(x), linear('v_proj', shape.width)(x)
        out = self.attend(heads(query), heads(key), heads(value), context.key_range).reshape(query.shape)
        out = linear('o_proj', shape.width, ('heads', 'embed'), True)(out)
        if with_mlp:
            y = norm(shape.norm, shape.norm_eps, 'mlp_norm')(out)
            y = activate(linear('up_proj', shape.mlp_width, ('embed', 'mlp'))(y), shape.activation)
            out = out + linear('down_proj', shape.width, ('mlp', 'embed'))(y)
        return jnp.where((stop > start)[..., None], out, 0.0)
