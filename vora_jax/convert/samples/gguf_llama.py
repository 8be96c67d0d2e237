"""Llama models in a GGUF file."""
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from vora_jax.convert.samples.foreign_model import ForeignModel, check_names
from vora_jax.convert.samples.gguf_tokenizer import tokenizer_files
from vora_jax.types import UserError

# GGUF's names of a block's parts, and Hugging Face's.
_NORMS = {'attn_norm': 'input_layernorm', 'ffn_norm': 'post_attention_layernorm'}
_ATTENTION = {'attn_q': 'self_attn.q_proj', 'attn_k': 'self_attn.k_proj', 'attn_v': 'self_attn.v_proj',
              'attn_output': 'self_attn.o_proj'}
_MLP = {'ffn_gate': 'mlp.gate_proj', 'ffn_up': 'mlp.up_proj', 'ffn_down': 'mlp.down_proj'}
_ROPE_FACTORS = 'rope_freqs.weight'  # f32[head_dim / 2]; Llama 3's scaling, computed by the writer of the file


def read_llama(path: str) -> ForeignModel:
    """The model and tokenizer of a GGUF file of the Llama architecture, as a Hugging Face folder's content.

    Weights of any of the `gguf` package's quantisations become float16, one tensor at a time. The file must stay in
    place until the tensors are read.

    Raises:
        UserError: the file is no complete GGUF file, of another architecture, or holds what Llama in `transformers`
            does not have (experts, partial rotary embeddings, YaRN, tensors under other names).
        ModuleNotFoundError: the `gguf` package is not installed.
    """
    reader = _open(path)
    metadata = {key: field.contents() for key, field in reader.fields.items()}
    found = {tensor.name: tensor for tensor in reader.tensors}
    if (architecture := metadata.get('general.architecture')) != 'llama':
        raise UserError(f'{path} holds a model of architecture {architecture!r}; only files of the Llama architecture '
                        'can be converted.')
    try:
        config = _config(metadata, found, path)
        files = {'config.json': config, **tokenizer_files(metadata, path)}
    except KeyError as error:
        raise UserError(f'{path} lacks {error}, which a Llama GGUF file has; download it again.') from None
    names = tensor_names(config)
    check_names(path, names.values(), set(found) - {_ROPE_FACTORS})
    heads = {'attn_q': config['num_attention_heads'], 'attn_k': config['num_key_value_heads']}
    infos = [(name, np.dtype(np.float16), tuple(int(size) for size in reversed(found[source].shape)))
             for name, source in names.items()]

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for name, source in names.items():
            yield name, _read(found[source], heads.get(source.split('.')[-2]), path)

    return ForeignModel(infos, tensors, files)


def tensor_names(config: dict[str, Any]) -> dict[str, str]:
    """{Hugging Face name: GGUF name} of all tensors that a model of this configuration has."""
    names = {'model.embed_tokens.weight': 'token_embd.weight', 'model.norm.weight': 'output_norm.weight'}
    if not config['tie_word_embeddings']:
        names['lm_head.weight'] = 'output.weight'
    biased = (_ATTENTION if config['attention_bias'] else {}) | (_MLP if config['mlp_bias'] else {})
    for layer in range(config['num_hidden_layers']):
        for theirs, name in (_NORMS | _ATTENTION | _MLP).items():
            names[f'model.layers.{layer}.{name}.weight'] = f'blk.{layer}.{theirs}.weight'
        for theirs, name in biased.items():
            names[f'model.layers.{layer}.{name}.bias'] = f'blk.{layer}.{theirs}.bias'
    return names


def unpermute(array: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of q or k in Hugging Face's order: rotary pairs lie half a head apart.

    GGUF keeps the pairs together. One head of 4 rows, two pairs: `a0 a1 b0 b1` becomes `a0 b0 a1 b1`.

    Args:
        array: [num_heads * head_dim, ...], a kernel or a bias.
    """
    split = array.reshape(num_heads, -1, 2, *array.shape[1:])
    return split.swapaxes(1, 2).reshape(array.shape)


def _open(path: str) -> Any:
    import gguf  # late: an extra, and only this needs it

    if not pathlib.Path(path).is_file():
        raise UserError(f'{path} does not exist; correct the path.')
    try:
        return gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise UserError(f'{path} is no complete GGUF file ({error}); download it again.') from error


def _config(metadata: dict[str, Any], found: dict[str, Any], path: str) -> dict[str, Any]:
    """The content of config.json. KeyError where the metadata is incomplete."""
    width, num_heads = metadata['llama.embedding_length'], metadata['llama.attention.head_count']
    num_kv_heads = metadata.get('llama.attention.head_count_kv', num_heads)
    head_dim = metadata.get('llama.attention.key_length', width // num_heads)
    facts = {'experts': metadata.get('llama.expert_count', 0) > 0,
             'other numbers of heads in each layer': not isinstance(num_heads + num_kv_heads, int),
             'value heads of another size': metadata.get('llama.attention.value_length', head_dim) != head_dim,
             'partial rotary embeddings': metadata.get('llama.rope.dimension_count', head_dim) != head_dim}
    if unknown := [fact for fact, is_so in facts.items() if is_so]:
        raise UserError(f'{path} has {" and ".join(unknown)}, which a Llama model in transformers does not have.')
    theta, rope = float(metadata.get('llama.rope.freq_base', 1e4)), _rope_scaling(metadata, found, head_dim, path)
    special = {f'{kind}_token_id': metadata[f'tokenizer.ggml.{key}_token_id']
               for kind, key in (('bos', 'bos'), ('eos', 'eos'), ('pad', 'padding'))
               if f'tokenizer.ggml.{key}_token_id' in metadata}
    return {
        'architectures': ['LlamaForCausalLM'], 'model_type': 'llama',
        'vocab_size': int(found['token_embd.weight'].shape[1]), 'hidden_size': width,
        'intermediate_size': metadata['llama.feed_forward_length'], 'num_hidden_layers': metadata['llama.block_count'],
        'num_attention_heads': num_heads, 'num_key_value_heads': num_kv_heads, 'head_dim': head_dim,
        'hidden_act': 'silu', 'max_position_embeddings': metadata['llama.context_length'],
        # The shortest decimal of the file's float32: 1e-05, not 9.999999747378752e-06.
        'rms_norm_eps': float(str(np.float32(metadata['llama.attention.layer_norm_rms_epsilon']))),
        'rope_parameters': {'rope_theta': theta, 'rope_type': 'default', **rope},
        # For transformers 4, which would take its defaults otherwise.
        'rope_theta': theta, **({'rope_scaling': {'rope_theta': theta, **rope}} if rope else {}),
        'attention_bias': 'blk.0.attn_q.bias' in found, 'mlp_bias': 'blk.0.ffn_up.bias' in found,
        'attention_dropout': 0.0, 'initializer_range': 0.02, 'tie_word_embeddings': 'output.weight' not in found,
        'use_cache': True, **special, 'dtype': 'float16',
    }


def _rope_scaling(metadata: dict[str, Any], found: dict[str, Any], head_dim: int, path: str) -> dict[str, Any]:
    """Hugging Face's words for the file's stretching of rotary embeddings; {} for none."""
    kind = metadata.get('llama.rope.scaling.type', 'none')
    if kind == 'linear':
        return {'rope_type': 'linear', 'factor': float(metadata['llama.rope.scaling.factor'])}
    if kind != 'none':
        raise UserError(f'{path} scales its rotary embeddings by {kind!r}; only none, linear and Llama 3\'s are known.')
    if _ROPE_FACTORS not in found:
        return {}
    # The file holds Llama 3's result, not its four numbers; three of them are the same in all released models.
    factors = _dequantise(found[_ROPE_FACTORS])
    rope = {'rope_type': 'llama3', 'factor': float(factors.max()), 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
            'original_max_position_embeddings': 8192}
    expected = llama3_factors(rope, float(metadata['llama.rope.freq_base']), head_dim)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-3):
        raise UserError(f'{path} holds {_ROPE_FACTORS} that are not those of Llama 3.1 to 3.3; it cannot be converted.')
    return rope


def llama3_factors(rope: dict[str, Any], theta: float, head_dim: int) -> np.ndarray:
    """f64[head_dim / 2] by which Llama 3's scaling divides each rotary frequency."""
    wavelength = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    low, high = rope['low_freq_factor'], rope['high_freq_factor']
    smooth = (rope['original_max_position_embeddings'] / wavelength - low) / (high - low)
    smooth = np.clip(smooth, 0, 1)  # 1: short waves, untouched; 0: long waves, divided by the whole factor
    return 1 / ((1 - smooth) / rope['factor'] + smooth)


def _read(tensor: Any, num_heads: int | None, path: str) -> np.ndarray:
    """f16[out, in] or f16[width]; q and k (`num_heads` given) in Hugging Face's order of rows."""
    array = _dequantise(tensor)
    if not np.abs(array).max(initial=0) <= np.finfo(np.float16).max:  # False for NaN, too
        raise UserError(f'{path}: tensor {tensor.name} holds numbers that float16 cannot express.')
    array = array.astype(np.float16)
    return np.ascontiguousarray(array if num_heads is None else unpermute(array, num_heads))


def _dequantise(tensor: Any) -> np.ndarray:
    import gguf

    return gguf.quants.dequantize(tensor.data, tensor.tensor_type)
