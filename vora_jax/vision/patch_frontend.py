"""Patches straight into the language model."""
import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from vora_jax.batch import Patches
from vora_jax.nn.stack import Gather
from vora_jax.types import Array
from vora_jax.vision.patch_embed import PatchEmbed, PatchEmbedding


@dataclasses.dataclass(frozen=True)
class PatchFrontend:
    """A front end without an encoder: patch embedding, then a linear to the language model's width."""

    patch_embed: PatchEmbed

    def module(self, width: int, attend: Callable, dtype: jnp.dtype, deterministic: bool = True,
               gather: Gather | None = None) -> nn.Module:
        """The Linen module, f[B, P, width] of `Patches`; it has neither layers nor attention nor dropout."""
        return PatchFrontendModule(self, width, dtype)


class PatchFrontendModule(nn.Module):
    """f[B, P, D]: one language-model vector for each patch (Vision as LoRA, section 3.1; 6 M parameters at 7B)."""

    config: PatchFrontend
    width: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, patches: Patches, adapters_on: Array | None = None) -> jax.Array:
        """`adapters_on` switches nothing: there are no adapters here."""
        x = PatchEmbedding(self.config.patch_embed, self.dtype, name='patch_embed')(patches)
        kernel = self.param('out_proj', nn.with_logical_partitioning(nn.initializers.lecun_normal(), ('vision', 'embed')),
                            (x.shape[-1], self.width), jnp.float32)
        return jnp.dot(x, kernel.astype(x.dtype))
