"""A ViT trained to tell an image's answers."""
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from vora_jax.batch import Batch, Output
from vora_jax.nn.stack import Gather
from vora_jax.ops.attention import attention
from vora_jax.types import VISION, Array, Params
from vora_jax.vision.vit import VisionTransformer, Vit


class TokenClassifier(nn.Module):
    """Predicts every target token of a segment from the mean feature of its last picture, not from the words.

    Text as classification labels (Huang et al. 2024, "Classification Done Right for Vision-Language Pre-Training"):
    the small way to train an encoder, here the distillation teacher of a run that has no pre-trained one.
    """

    vit: Vit
    vocab_size: int
    attend: Callable = attention
    gather: Gather | None = None
    deterministic: bool = True

    def setup(self):
        self.encoder = VisionTransformer(self.vit, self.attend, self.gather)
        head = nn.with_logical_partitioning(nn.initializers.zeros, ('vision', 'vocab'))
        self.head = self.param('head', head, (self.vit.width, self.vocab_size), jnp.float32)

    def hidden(self, batch: Batch) -> jax.Array:
        """f[B, S, C]: at each slot, the mean feature of its segment's last picture so far (0 before any)."""
        patches = batch.patches
        features = self.encoder(patches).output
        num_images = patches.grid.shape[1]
        member = jax.nn.one_hot(patches.image_id, num_images, dtype=features.dtype)  # -1 gives zeros
        total = jnp.einsum('bpm,bpc->bmc', member, features)
        pooled = total / jnp.maximum(member.sum(1), 1.0)[..., None]
        token = jnp.cumsum(batch.modality == VISION, axis=1, dtype=jnp.int32) - 1
        seen, token = token >= 0, jnp.maximum(token, 0)
        slot = jnp.take_along_axis(batch.vision_slot, token, axis=1)
        seen &= jnp.take_along_axis(batch.segment_id, jnp.maximum(slot, 0), axis=1) == batch.segment_id
        source = jnp.take_along_axis(batch.vision_source, token, axis=1)
        image = jnp.take_along_axis(patches.image_id, source, axis=1)
        state = jnp.take_along_axis(pooled, jnp.maximum(image, 0)[..., None], axis=1)
        return jnp.where(seen[..., None], state, 0.0)

    def __call__(self, batch: Batch, adapters_on: Array | None = None) -> Output:
        return Output(self.hidden(batch), jnp.zeros((0,), jnp.float32),
                      jnp.sum(batch.vision_slot >= 0).astype(jnp.float32))

    def unembedding(self, params: Params) -> jax.Array:
        """f32[C, V]: the classifier's kernel."""
        return params['head']
