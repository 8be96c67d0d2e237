"""A vision encoder and its projector."""
import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from vora_jax.batch import Patches
from vora_jax.nn.adapted_dense import AdaptedDense
from vora_jax.nn.slots import SlotContext
from vora_jax.ops.attention import attention
from vora_jax.types import UserError
from vora_jax.vision.patch_embed import PatchEmbed
from vora_jax.vision.vit import VisionTransformer, Vit


@dataclasses.dataclass(frozen=True)
class Projector:
    """A stack of linears with GELU in between, to the language model's width.

    num_layers: 1 is a linear, 2 the MLP of LLaVA-1.5 (Liu et al. 2023).    bias: of its linears.
    """

    num_layers: int = 2
    bias: bool = True


@dataclasses.dataclass(frozen=True)
class EncoderFrontend:
    """A front end with an encoder: features of some of its blocks, concatenated by channel, then a projector.

    taps: blocks whose unnormed outputs are taken, counted from 0; negative ones from the end.
    """

    encoder: Vit
    taps: tuple[int, ...] = (-2,)
    projector: Projector = Projector()

    def __post_init__(self):
        layers = self.encoder.num_layers
        if not self.taps or not all(-layers <= tap < layers for tap in self.taps):
            raise UserError(f'EncoderFrontend.taps = {self.taps} are not blocks of an encoder of {layers} layers.')

    @property
    def patch_embed(self) -> PatchEmbed:
        return self.encoder.patch_embed

    def module(self, width: int, attend: Callable, dtype: jnp.dtype) -> nn.Module:
        """The Linen module, f[B, P, width] of `Patches`."""
        return EncoderFrontendModule(self, width, attend, dtype)


class EncoderFrontendModule(nn.Module):
    """f[B, P, D]: one language-model vector for each patch, seen in its whole image."""

    config: EncoderFrontend
    width: int
    attend: Callable = attention
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, patches: Patches) -> jax.Array:
        encoder, taps = self.config.encoder, self.config.taps
        blocks = VisionTransformer(encoder, self.attend, self.dtype, name='encoder')(patches).blocks
        x = jnp.concatenate([blocks[tap] for tap in taps], axis=-1)
        for layer in range(self.config.projector.num_layers):
            x = nn.gelu(x, approximate=False) if layer else x
            dense = AdaptedDense(self.width, ('embed', None), use_bias=self.config.projector.bias,
                                 name=f'projector_{layer}')
            x = dense(x, SlotContext(patches.key_range))
        return x
