"""The vision-language model, up to its last hidden state."""
import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vora_jax.batch import Batch, Output
from vora_jax.distill import Distillation, DistillHead
from vora_jax.llm.decoder import Decoder, LanguageModel, unembedding
from vora_jax.nn.slots import SlotContext
from vora_jax.nn.stack import LayerGroup
from vora_jax.ops.attention import attention
from vora_jax.types import VISION, Array, Params
from vora_jax.vision.encoder_frontend import EncoderFrontend
from vora_jax.vision.patch_frontend import PatchFrontend
from vora_jax.vision.vit import VisionTransformer


class VisionLanguageModel(nn.Module):
    """A decoder that reads text and image slots in one sequence.

    llm: sizes of the language model.    groups: its layers, with their adapters.
    vision: the front end that feeds vision slots; None for a plain language model.
    distillation: heads and teacher of the training stage that has them.
    attend: attention function; `training.sharding` gives a sharded one.
    """

    llm: LanguageModel
    groups: tuple[LayerGroup, ...]
    vision: PatchFrontend | EncoderFrontend | None = None
    distillation: Distillation | None = None
    attend: Callable = attention
    deterministic: bool = True

    def setup(self):
        side = None
        if self.distillation is not None:
            distillation = self.distillation
            sides = tuple(np.flatnonzero([group.side for group in self.groups for _ in range(group.num_layers)]).tolist())
            if sides != distillation.layers:
                raise ValueError(f'VisionLanguageModel: the groups put heads on layers {sides}, Distillation.layers says '
                                 f'{distillation.layers}.')
            side = functools.partial(DistillHead, distillation.teacher.width, distillation.pairing,
                                     distillation.head_eps, name='side')
            self.teacher = VisionTransformer(distillation.teacher, self.attend, dtype=self.llm.dtype)
        if self.vision is not None:
            self.frontend = self.vision.module(self.llm.width, self.attend, self.llm.dtype)
        self.decoder = Decoder(self.llm, self.groups, side, self.attend, self.deterministic)

    @property
    def vocab_size(self) -> int:
        """Ids the model can read and predict."""
        return self.llm.vocab_size

    def __call__(self, batch: Batch, adapters_on: Array | None = None) -> Output:
        """Runs a batch; `adapters_on: bool[] or bool[B]` switches all adapters (None: on)."""
        context = SlotContext(batch.key_range, batch.modality, adapters_on=adapters_on)
        features, vision_slot = None, batch.vision_slot
        if self.distillation is not None:
            features = self._teacher_features(batch)
        hidden, _, side = self.decoder(self.embed(batch), batch.positions, context, None, features, vision_slot)
        distill_sum = jnp.zeros((0,), jnp.float32) if side is None else side
        return Output(hidden, distill_sum, jnp.sum(vision_slot >= 0).astype(jnp.float32))

    def embed(self, batch: Batch) -> jax.Array:
        """f[B, S, D]: token embeddings, with front-end outputs in the vision slots."""
        x = self.decoder.embed(batch.tokens)
        if self.vision is None:
            return x
        outputs = self.frontend(batch.patches)
        is_vision = batch.modality == VISION
        # The q-th vision slot of a row takes its q-th vision token, so its index is a running count.
        token = jnp.maximum(jnp.cumsum(is_vision, axis=1, dtype=jnp.int32) - 1, 0)
        source = jnp.take_along_axis(batch.vision_source, token, axis=1)
        return jnp.where(is_vision[..., None], jnp.take_along_axis(outputs, source[..., None], axis=1), x)

    def decode(self, x: jax.Array, positions: jax.Array, context: SlotContext, cache):
        """(f[B, T, D], cache): new slots x against a cache of (keys, values), each f[L, B, S, K, H]."""
        hidden, cache, _ = self.decoder(x, positions, context, cache)
        return hidden, cache

    def embed_tokens(self, tokens: jax.Array) -> jax.Array:
        """f[B, T, D] embeddings of text tokens."""
        return self.decoder.embed(tokens)

    def _teacher_features(self, batch: Batch) -> jax.Array:
        """f[L_distilled, B, Q, C]: the teacher's block outputs at the patches that feed the vision tokens."""
        blocks = self.teacher(batch.patches).blocks
        blocks = jax.lax.stop_gradient(blocks[jnp.asarray(self.distillation.blocks)])
        return jnp.take_along_axis(blocks, batch.vision_source[None, ..., None], axis=2)

    def unembedding(self, params: Params) -> jax.Array:
        """f32[D, V]: the head's kernel, from the model's full parameters."""
        return unembedding(self.llm, params['decoder'])
