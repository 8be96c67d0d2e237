"""Block-wise distillation from a frozen ViT."""
import dataclasses
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from vora_jax.nn.norms import RMSNorm
from vora_jax.vision.vit import Vit

Pairing = Literal['input_to_output', 'output_to_output']


@dataclasses.dataclass(frozen=True)
class Distillation:
    """Which language-model layer meets which teacher block, and how.

    teacher: the frozen encoder; its patch size equals the student's.
    layers: `layers[j]` is the language-model layer whose head meets teacher block `blocks[j]`.
    blocks: teacher blocks, counted from 0, targets being their unnormed outputs.
    pairing: `input_to_output` takes the state *entering* the layer (as VoRA's code does: head 0 sees the raw vision
        embedding); `output_to_output` the state *leaving* it (as VoRA's figure draws it).
    head_eps: epsilon of the heads' norm (VoRA's code: 1e-5).
    """

    teacher: Vit
    layers: tuple[int, ...]
    blocks: tuple[int, ...]
    pairing: Pairing = 'output_to_output'
    head_eps: float = 1e-6

    def __post_init__(self):
        if len(self.layers) != len(self.blocks):
            raise ValueError(f'Distillation: {len(self.layers)} layers cannot be paired with {len(self.blocks)} blocks.')
        if list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f'Distillation.layers: {self.layers} must rise; each layer has one head.')
        if self.blocks and max(self.blocks) >= self.teacher.num_layers:
            raise ValueError(f'Distillation.blocks: block {max(self.blocks)} is not one of the teacher\'s '
                             f'{self.teacher.num_layers} blocks (counted from 0).')


class DistillHead(nn.Module):
    """f32[]: sum over real vision tokens of 1 - cos(linear(norm(state)), teacher feature)."""

    width: int
    pairing: Pairing
    epsilon: float

    @nn.compact
    def __call__(self, entering, leaving, features, tokens):
        """entering, leaving: f[B, S, D];  features: f[B, P, C] of the teacher;  tokens: i32[B, Q] twice, each vision token's
        slot, -1 where there is no token, and the patch that feeds it."""
        vision_slot, vision_source = tokens
        # Here and not for all layers at once: that would be a second stack of features.
        target = jnp.take_along_axis(features, vision_source[..., None], axis=1)
        state = entering if self.pairing == 'input_to_output' else leaving
        state = jnp.take_along_axis(state, jnp.maximum(vision_slot, 0)[..., None], axis=1)
        # Where rematerialisation keeps it, the layer's last product is not made again just for this head.
        state = checkpoint_name(state, 'taught')
        state = RMSNorm(self.epsilon, name='norm')(state)
        kernel = self.param('kernel', nn.with_logical_partitioning(nn.initializers.lecun_normal(), ('embed', 'vision')),
                            (state.shape[-1], self.width), jnp.float32)
        student = jnp.dot(state, kernel.astype(state.dtype))
        return jnp.sum(jnp.where(vision_slot >= 0, 1.0 - cosine(student, target), 0.0))


def cosine(a: jax.Array, b: jax.Array) -> jax.Array:
    """f32[...]: cosine of the angle between the last axes of a and b; 0 where either vanishes (and no NaN gradient)."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    squares = jnp.sum(a * a, -1) * jnp.sum(b * b, -1)
    safe = jnp.where(squares > 0, squares, 1.0)
    return jnp.where(squares > 0, jnp.sum(a * b, -1) * jax.lax.rsqrt(safe), 0.0)
