"""A vision encoder, fusion, projector: one front end."""
import dataclasses
from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from vora_jax.batch import Patches
from vora_jax.nn.adapted_dense import AdaptedDense
from vora_jax.nn.modality_mixture import MixtureTable
from vora_jax.nn.slots import SlotContext
from vora_jax.nn.stack import Gather
from vora_jax.ops.attention import attention
from vora_jax.types import Array, UserError
from vora_jax.vision.cue_enhancer import CueEnhancer, CueEnhancerModule
from vora_jax.vision.packed import image_range
from vora_jax.vision.patch_embed import PatchEmbed
from vora_jax.vision.pooling import window_means
from vora_jax.vision.vit import VisionTransformer, Vit


@dataclasses.dataclass(frozen=True)
class Projector:
    """A stack of linears with an activation in between, to the language model's width.

    num_layers: 1 is a linear, 2 the MLP of LLaVA-1.5 (Liu et al. 2023).    bias: of its linears.
    activation: between them.    hidden_width: of all but the last; 0 is the language model's width.
    """

    num_layers: int = 2
    bias: bool = True
    activation: Literal['gelu', 'silu'] = 'gelu'
    hidden_width: int = 0

    def __post_init__(self):
        if self.num_layers < 1 or self.hidden_width < 0:
            raise UserError(f'Projector: num_layers {self.num_layers} must be at least 1, and hidden_width '
                            f'{self.hidden_width} not negative.')


@dataclasses.dataclass(frozen=True)
class EncoderFrontend:
    """A front end with an encoder: features of some of its blocks, fused, perhaps pooled, then a projector.

    taps: blocks whose unnormed outputs are taken, counted from 0; negative ones from the end.
    select: whose features go on: those of every patch, or of each image's [cls] slot alone.
    fusion: taps side by side in the channels, or each as a token of its own, or a `CueEnhancer` of them.
    mixtures: of the encoder's blocks.
    pool: side of the windows of patches whose mean goes on (arXiv 2311.06791); 1 leaves them as they are. A grid that it
        does not divide has smaller windows at its lower and right edge.
    """

    encoder: Vit
    taps: tuple[int, ...] = (-2,)
    projector: Projector = Projector()
    select: Literal['patch', 'cls'] = 'patch'
    fusion: Literal['channels', 'tokens'] | CueEnhancer = 'channels'
    mixtures: MixtureTable = ()
    pool: int = 1

    def __post_init__(self):
        layers = self.encoder.num_layers
        if not self.taps or not all(-layers <= tap < layers for tap in self.taps):
            raise UserError(f'taps = {self.taps} are not blocks of an encoder of {layers} layers.')
        if self.select == 'cls' and not self.patch_embed.cls_token:
            raise UserError("select = 'cls' needs an encoder with a [cls] token; set "
                            'PatchEmbed.cls_token = True or take another encoder.')
        if self.pool < 1 or (self.pool > 1 and self.select == 'cls'):
            raise UserError(f'pool = {self.pool} with select = {self.select!r}: it must be 1, or more with '
                            "select = 'patch'.")
        if isinstance(self.fusion, CueEnhancer):
            if self.select == 'cls' or self.encoder.width % self.fusion.num_heads:
                raise UserError(f'CueEnhancer: it needs patches (select = {self.select!r}) and num_heads '
                                f'({self.fusion.num_heads}) that divide the encoder\'s width {self.encoder.width}.')
            if not -len(self.taps) <= self.fusion.anchor < len(self.taps):
                raise UserError(f'CueEnhancer.anchor = {self.fusion.anchor} is not one of {len(self.taps)} taps.')

    @property
    def patch_embed(self) -> PatchEmbed:
        return self.encoder.patch_embed

    @property
    def tokens_per_place(self) -> int:
        """Tokens made of each patch or [cls] slot, see `VisionTokenRule`."""
        return len(self.taps) if self.fusion == 'tokens' else 1

    def module(self, width: int, attend: Callable, dtype: jnp.dtype, deterministic: bool = True,
               gather: Gather | None = None) -> nn.Module:
        """The Linen module, f[B, O, width] of `Patches`; O outputs are numbered as `VisionTokenRule.sources` says."""
        return EncoderFrontendModule(self, width, attend, dtype, deterministic, gather)


class EncoderFrontendModule(nn.Module):
    """f[B, O, D]: language-model vectors of all places, each seen in its whole image."""

    config: EncoderFrontend
    width: int
    attend: Callable = attention
    dtype: jnp.dtype = jnp.float32
    deterministic: bool = True
    gather: Gather | None = None

    @nn.compact
    def __call__(self, patches: Patches, adapters_on: Array | None = None) -> jax.Array:
        config, projector = self.config, self.config.projector
        encoder = VisionTransformer(config.encoder, self.attend, self.gather, self.dtype, config.mixtures,
                                    self.deterministic, name='encoder')
        blocks = encoder(patches, adapters_on).blocks
        levels = [blocks[tap] for tap in config.taps]
        if config.select == 'cls':
            # An image that is not there takes any place.
            cls = jnp.minimum(image_range(patches).start, patches.image_id.shape[1] - 1)
            levels = [jnp.take_along_axis(level, cls[..., None], axis=1) for level in levels]
        if isinstance(config.fusion, CueEnhancer):
            x = CueEnhancerModule(config.fusion, name='enhancer')(levels, patches)
        else:
            x = jnp.concatenate(levels, axis=-1)
        if config.pool > 1:
            x = window_means(x, patches, config.pool)
        x = x.reshape(len(x), x.shape[1] * config.tokens_per_place, -1)
        for layer in range(projector.num_layers):
            if layer:
                x = nn.silu(x) if projector.activation == 'silu' else nn.gelu(x, approximate=False)
            last = layer == projector.num_layers - 1
            width = self.width if last else projector.hidden_width or self.width
            dense = AdaptedDense(width, ('embed', 'width'), use_bias=projector.bias, name=f'projector_{layer}')
            x = dense(x, SlotContext(patches.key_range))
        return x
