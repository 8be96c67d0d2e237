"""A tiny GGUF file of the Llama architecture, and what is in it."""
import json
from typing import Any, NamedTuple

import gguf
import numpy as np
import tokenizers

LAYERS, WIDTH, MLP, HEADS, KV_HEADS, HEAD_DIM = 2, 64, 96, 4, 2, 32
CONTROL = ('<|endoftext|>', '<|im_start|>', '<|im_end|>')
TEMPLATE = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] }}{% endfor %}"
_CORPUS = ['the cat sat on the mat and the cat sat', 'a cat and a hat, 1234 hats', "don't sit on the hat"] * 3
_PARTS = {
    'attn_q': ('self_attn.q_proj', (HEADS * HEAD_DIM, WIDTH)), 'attn_k': ('self_attn.k_proj', (KV_HEADS * HEAD_DIM, WIDTH)),
    'attn_v': ('self_attn.v_proj', (KV_HEADS * HEAD_DIM, WIDTH)),
    'attn_output': ('self_attn.o_proj', (WIDTH, HEADS * HEAD_DIM)), 'ffn_gate': ('mlp.gate_proj', (MLP, WIDTH)),
    'ffn_up': ('mlp.up_proj', (MLP, WIDTH)), 'ffn_down': ('mlp.down_proj', (WIDTH, MLP)),
    'attn_norm': ('input_layernorm', (WIDTH,)), 'ffn_norm': ('post_attention_layernorm', (WIDTH,))}


class Tiny(NamedTuple):
    """weights: {Hugging Face name: f32, through the file's quantisation}.    tokenizer: what the file's was made of."""

    path: str
    weights: dict[str, np.ndarray]
    tokenizer: tokenizers.Tokenizer


def train_tokenizer() -> tokenizers.Tokenizer:
    """A byte-level BPE of few merges, digits apart."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Digits(individual_digits=True),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(_CORPUS, tokenizers.trainers.BpeTrainer(
        vocab_size=280, special_tokens=list(CONTROL), initial_alphabet=alphabet, show_progress=False))
    return tokenizer


def write_gguf(path: str, *, biases: bool = False, tied: bool = True, change: dict[str, Any] | None = None,
               drop: tuple[str, ...] = (), extra: dict[str, np.ndarray] | None = None, architecture: str = 'llama') -> Tiny:
    """Writes a file with random weights.

    Args:
        change: further or other metadata.    drop: GGUF names of tensors to leave out.    extra: f32 tensors to add.
    """
    rng, tokenizer = np.random.default_rng(0), train_tokenizer()
    writer = gguf.GGUFWriter(path, architecture)
    vocab = tokenizer.get_vocab()
    tokens = sorted(vocab, key=vocab.get)
    kinds = [3 if token in CONTROL else 1 for token in tokens]
    settings = {
        'llama.block_count': LAYERS, 'llama.context_length': 128, 'llama.embedding_length': WIDTH,
        'llama.feed_forward_length': MLP, 'llama.attention.head_count': HEADS, 'llama.attention.head_count_kv': KV_HEADS,
        'llama.attention.key_length': HEAD_DIM, 'llama.attention.value_length': HEAD_DIM, 'llama.rope.freq_base': 1e5,
        'llama.attention.layer_norm_rms_epsilon': 1e-5, 'llama.rope.dimension_count': HEAD_DIM,
        'tokenizer.ggml.model': 'gpt2', 'tokenizer.ggml.pre': 'smollm', 'tokenizer.ggml.bos_token_id': 1,
        'tokenizer.ggml.eos_token_id': 2, 'tokenizer.ggml.padding_token_id': 2, 'tokenizer.chat_template': TEMPLATE,
        **(change or {})}
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in settings.items():
        if value is not None:
            add[type(value)](key, value)
    writer.add_array('tokenizer.ggml.tokens', tokens)
    writer.add_array('tokenizer.ggml.token_type', kinds)
    writer.add_array('tokenizer.ggml.merges', [' '.join(pair) for pair in _merges(tokenizer)])

    parts = {'token_embd.weight': ('model.embed_tokens.weight', (len(tokens), WIDTH)),
             'output_norm.weight': ('model.norm.weight', (WIDTH,))}
    if not tied:
        parts['output.weight'] = ('lm_head.weight', (len(tokens), WIDTH))
    for layer in range(LAYERS):
        for theirs, (name, shape) in _PARTS.items():
            parts[f'blk.{layer}.{theirs}.weight'] = (f'model.layers.{layer}.{name}.weight', shape)
            if biases and 'norm' not in theirs:
                parts[f'blk.{layer}.{theirs}.bias'] = (f'model.layers.{layer}.{name}.bias', shape[:1])
    weights = {}
    for theirs, (name, shape) in parts.items():
        array = rng.standard_normal(shape).astype(np.float32) * (0.1 if len(shape) > 1 else 0.3) + (len(shape) == 1)
        kind = gguf.GGMLQuantizationType.F32
        if len(shape) > 1:
            kind = gguf.GGMLQuantizationType.Q8_0 if theirs == 'token_embd.weight' else gguf.GGMLQuantizationType.Q4_1
        heads = {'attn_q': HEADS, 'attn_k': KV_HEADS}.get(theirs.split('.')[-2])
        packed = gguf.quants.quantize(array, kind)
        weights[name] = gguf.quants.dequantize(packed, kind)
        if heads:  # quantised blocks lie within rows, so rows of bytes can be moved
            packed = _permute(packed, heads)
        if theirs not in drop:
            writer.add_tensor(theirs, packed, raw_dtype=kind)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Tiny(path, weights, tokenizer)


def _merges(tokenizer: tokenizers.Tokenizer) -> list[list[str]]:
    return json.loads(tokenizer.to_str())['model']['merges']


def _permute(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Row 2p + j of a head is Hugging Face's row j * head_dim / 2 + p."""
    head_dim, out = len(rows) // num_heads, np.empty_like(rows)
    for head in range(num_heads):
        for p in range(head_dim // 2):
            for j in range(2):
                out[head * head_dim + 2 * p + j] = rows[head * head_dim + j * head_dim // 2 + p]
    return out
