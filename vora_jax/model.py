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
from vora_jax.nn.slots import SlotContext, vision_slots, vision_token
from vora_jax.nn.stack import Gather, LayerGroup
from vora_jax.ops.attention import attention
from vora_jax.types import ROUTE, Array, Params
from vora_jax.vision.encoder_frontend import EncoderFrontend
from vora_jax.vision.patch_frontend import PatchFrontend
from vora_jax.vision.vit import VisionTransformer


class VisionLanguageModel(nn.Module):
    """A decoder that reads text and image slots in one sequence.

    llm: sizes of the language model.    groups: its layers, with their adapters.
    vision: the front end that feeds vision slots; None for a plain language model.
    distillation: heads and teacher of the training stage that has them.
    route_token: ROUTE slots hold a learned vector, one for segments without pictures and one for those with some.
    attend: attention function; `training.mesh` has a sharded one.
    gather: makes parameters whole where they are used, see `Stack`.
    """

    llm: LanguageModel
    groups: tuple[LayerGroup, ...]
    vision: PatchFrontend | EncoderFrontend | None = None
    distillation: Distillation | None = None
    route_token: bool = False
    attend: Callable = attention
    gather: Gather | None = None
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
            self.teacher = VisionTransformer(distillation.teacher, self.attend, self.gather, self.llm.dtype)
        if self.vision is not None:
            self.frontend = self.vision.module(self.llm.width, self.attend, self.llm.dtype, self.deterministic, self.gather)
        if self.route_token:
            init = nn.with_logical_partitioning(nn.initializers.normal(1.0), (None, 'embed'))
            self.modality_embedding = self.param('modality_embedding', init, (2, self.llm.width), jnp.float32)
        self.decoder = Decoder(self.llm, self.groups, side, self.attend, self.gather, self.deterministic)

    @property
    def vocab_size(self) -> int:
        """Ids the model can read and predict."""
        return self.llm.vocab_size

    def __call__(self, batch: Batch, adapters_on: Array | None = None) -> Output:
        """Runs a batch; `adapters_on: bool[] or bool[B]` switches all adapters (None: on)."""
        vision_slot = batch.vision_slot
        context = SlotContext(batch.key_range, batch.modality, adapters_on=adapters_on, route_slot=batch.route_slot,
                              vision=vision_slots(vision_slot, batch.modality, adapters_on))
        features = None
        if self.distillation is not None:
            features = self._teacher_features(batch)
        hidden, _, side = self.decoder(self.embed(batch, adapters_on), batch.positions, context, None, features,
                                       (vision_slot, batch.vision_source))
        distill_sum = jnp.zeros((0,), jnp.float32) if side is None else side
        return Output(hidden, distill_sum, jnp.sum(vision_slot >= 0).astype(jnp.float32))

    def embed(self, batch: Batch, adapters_on: Array | None = None) -> jax.Array:
        """f[B, S, D]: token embeddings, with front-end outputs in the vision slots and modality vectors in ROUTE slots."""
        x = self.decoder.embed(batch.tokens)
        if self.route_token:
            vectors = self.modality_embedding[jnp.minimum(batch.tokens, 1)].astype(x.dtype)
            x = jnp.where((batch.modality == ROUTE)[..., None], vectors, x)
        if self.vision is None:
            return x
        outputs = self.frontend(batch.patches, adapters_on)
        token = vision_token(batch.modality)
        source = jnp.take_along_axis(batch.vision_source, jnp.maximum(token, 0), axis=1)
        return jnp.where((token >= 0)[..., None], jnp.take_along_axis(outputs, source[..., None], axis=1), x)

    def decode(self, x: jax.Array, positions: jax.Array, context: SlotContext, cache):
        """(f[B, T, D], cache): new slots x against a cache of all layers."""
        hidden, cache, _ = self.decoder(x, positions, context, cache)
        return hidden, cache

    def embed_tokens(self, tokens: jax.Array) -> jax.Array:
        """f[B, T, D] embeddings of text tokens."""
        return self.decoder.embed(tokens)

    def _teacher_features(self, batch: Batch) -> jax.Array:
        """f[L_distilled, B, P, C]: outputs of the teacher's blocks that have a layer to teach."""
        blocks, taught = jax.lax.stop_gradient(self.teacher(batch.patches).blocks), self.distillation.blocks
        return blocks if taught == tuple(range(len(blocks))) else blocks[jnp.asarray(taught)]

    def unembedding(self, params: Params) -> jax.Array:
        """f32[D, V]: the head's kernel, from the model's full parameters."""
        return unembedding(self.llm, params['decoder'])
