"""The language model's decoder (Qwen, Llama)."""
import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from vora_jax.nn.block import LINEARS, BlockShape
from vora_jax.nn.norms import RMSNorm
from vora_jax.nn.remat import Remat
from vora_jax.nn.slots import SlotContext
from vora_jax.nn.stack import Gather, LayerGroup, Stack
from vora_jax.ops.attention import attention
from vora_jax.ops.rope import RopeScaling, rope_angles
from vora_jax.types import UserError


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """Sizes of a Qwen- or Llama-family decoder.

    vocab_size V, num_layers L, width D, mlp_width F, num_heads N, num_kv_heads K, head_dim H.
    rope_theta: rotary base.    rope_scaling: stretches it for long contexts (Llama 3.1).
    biases: linears with a bias, such as ('q_proj', 'k_proj', 'v_proj') in Qwen2.
    qk_norm: an RMSNorm on each query and key head (Qwen3).    tied_head: the head is the embedding.
    max_positions: the longest context it is made for, slots; exports state it, nothing here is limited by it.
    activation_dtype: of hidden states; parameters, norms, softmax, logits and losses stay f32.
    remat: what each layer keeps for its backward pass; the rest is computed again (`nn.remat`).
    """

    vocab_size: int
    num_layers: int
    width: int
    mlp_width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    rope_scaling: RopeScaling | None = None
    biases: tuple[str, ...] = ()
    qk_norm: bool = False
    tied_head: bool = False
    max_positions: int = 4096
    activation_dtype: Literal['float32', 'bfloat16'] = 'float32'
    remat: Remat = 'none'

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise UserError(f'LanguageModel.num_kv_heads = {self.num_kv_heads} does not divide LanguageModel.num_heads = '
                            f'{self.num_heads}.')
        if self.head_dim % 2:
            raise UserError(f'LanguageModel.head_dim = {self.head_dim} is odd; rotary positions need pairs.')
        if unknown := sorted(set(self.biases) - set(LINEARS)):
            raise UserError(f'LanguageModel.biases: there is no linear {unknown[0]!r}; choose from {", ".join(LINEARS)}.')

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype(self.activation_dtype)

    @property
    def block_shape(self) -> BlockShape:
        return BlockShape(self.width, self.mlp_width, self.num_heads, self.num_kv_heads, self.head_dim, self.norm_eps,
                          biases=self.biases, qk_norm=self.qk_norm)


class Decoder(nn.Module):
    """Embedding, layer groups and final norm; the head is a parameter that losses and generation apply."""

    config: LanguageModel
    groups: tuple[LayerGroup, ...]
    side: Callable[[], nn.Module] | None = None
    attend: Callable = attention
    gather: Gather | None = None
    deterministic: bool = True

    def setup(self):
        config = self.config
        embedding = nn.with_logical_partitioning(nn.initializers.normal(0.02), ('vocab', 'embed'))
        self.embedding = self.param('embedding', embedding, (config.vocab_size, config.width), jnp.float32)
        if not config.tied_head:
            head = nn.with_logical_partitioning(nn.initializers.normal(0.02), ('embed', 'vocab'))
            self.lm_head = self.param('lm_head', head, (config.width, config.vocab_size), jnp.float32)
        self.layers = Stack(config.block_shape, self.groups, self.side, self.attend, self.gather, config.remat,
                            self.deterministic)
        self.norm = RMSNorm(config.norm_eps)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """f[B, T, D] embeddings of `tokens: i32[B, T]`.

        On a mesh each device looks up its slice of the width, for the rows of all that share the table."""
        tokens = nn.with_logical_constraint(tokens, ('rows_of_all', 'slots'))
        slices = nn.with_logical_constraint(self.embedding[tokens].astype(self.config.dtype),
                                            ('rows_of_all', 'slots', 'slice'))
        return nn.with_logical_constraint(slices, ('batch', 'slots', 'width'))

    def __call__(self, x: jax.Array, positions: jax.Array, context: SlotContext, cache=None, side_scanned: Any = None,
                 side_shared: Any = None):
        """(f[B, T, D] normed last state, cache, side results) for input vectors x and `positions: i32[B, T]`."""
        angles = rope_angles(positions, self.config.head_dim, self.config.rope_theta, self.config.rope_scaling)
        x, cache, side = self.layers(x, context._replace(angles=angles), cache, side_scanned, side_shared)
        return self.norm(x), cache, side


def unembedding(config: LanguageModel, decoder_params) -> jax.Array:
    """f32[D, V]: the head's kernel."""
    return decoder_params['embedding'].T if config.tied_head else decoder_params['lm_head']
