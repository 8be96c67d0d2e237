"""Language models in config.json, both ways."""
from collections.abc import Mapping
from typing import Any

from vora_jax.llm.decoder import LanguageModel
from vora_jax.nn.block import LINEARS
from vora_jax.ops.rope import RopeScaling
from vora_jax.types import UserError

Config = Mapping[str, Any]
_QKV = ('q_proj', 'k_proj', 'v_proj')

# What each family's configuration class of transformers takes where config.json says nothing (nested ones are short).
_SIZES = {'hidden_size': 4096, 'num_hidden_layers': 32, 'num_attention_heads': 32, 'rms_norm_eps': 1e-6,
          'rope_theta': 10000.0, 'hidden_act': 'silu', 'tie_word_embeddings': False}
_DEFAULTS = {
    'llama': _SIZES | {'vocab_size': 32000, 'intermediate_size': 11008, 'max_position_embeddings': 2048},
    'mistral': _SIZES | {'vocab_size': 32000, 'intermediate_size': 14336, 'num_key_value_heads': 8,
                         'max_position_embeddings': 131072, 'sliding_window': 4096},
    'qwen2': _SIZES | {'vocab_size': 151936, 'intermediate_size': 22016, 'num_key_value_heads': 32,
                       'max_position_embeddings': 32768, 'max_window_layers': 28},
    'qwen3': _SIZES | {'vocab_size': 151936, 'intermediate_size': 22016, 'num_key_value_heads': 32, 'head_dim': 128,
                       'max_position_embeddings': 32768, 'max_window_layers': 28},
}
LLM_FAMILIES = tuple(_DEFAULTS)


def llm_from_config(config: Config, where: str = 'config.json', family: str | None = None) -> LanguageModel:
    """The sizes of a Qwen2, Qwen3, Llama or Mistral model; config.json of transformers 4.x or 5.x.

    Args:
        family: overrides `model_type` (a configuration that holds a language model's fields among its own).

    Raises:
        UserError: names the field whose value is not supported.
    """
    family = family or config.get('model_type')
    if family not in _DEFAULTS:
        raise UserError(f'{where}: model_type {family!r} is no language model that can be read; these can: '
                        f'{", ".join(LLM_FAMILIES)}.')
    get = _Reader(config, _DEFAULTS[family], where)
    get.require('hidden_act', 'silu')
    _check_windows(family, get)
    theta, scaling = _rope(get)
    heads, width = get['num_attention_heads'], get['hidden_size']
    return LanguageModel(
        vocab_size=get['vocab_size'], num_layers=get['num_hidden_layers'], width=width, mlp_width=get['intermediate_size'],
        num_heads=heads, num_kv_heads=get['num_key_value_heads'] or heads, head_dim=get['head_dim'] or width // heads,
        rope_theta=float(theta), norm_eps=float(get['rms_norm_eps']), rope_scaling=scaling, biases=_biases(family, get),
        qk_norm=family == 'qwen3', tied_head=bool(get['tie_word_embeddings']),
        max_positions=get['max_position_embeddings'])


def llm_to_config(llm: LanguageModel, dtype: str = 'float32') -> dict[str, Any]:
    """config.json of a stock model; `llm_from_config` gives `llm` again (activation_dtype and remat apart).

    Old-style names (`rope_theta`, `rope_scaling`, `torch_dtype`), which transformers 4.x and 5.x read alike.

    Args:
        dtype: of the weights.

    Raises:
        UserError: no stock model has these biases.
    """
    scaling = llm.rope_scaling
    config = {
        **_architecture(llm), 'vocab_size': llm.vocab_size, 'hidden_size': llm.width, 'intermediate_size': llm.mlp_width,
        'num_hidden_layers': llm.num_layers, 'num_attention_heads': llm.num_heads,
        'num_key_value_heads': llm.num_kv_heads, 'hidden_act': 'silu', 'max_position_embeddings': llm.max_positions,
        'rms_norm_eps': llm.norm_eps, 'rope_theta': llm.rope_theta, 'rope_scaling': None,
        'tie_word_embeddings': llm.tied_head, 'torch_dtype': dtype,
    }
    if llm.head_dim * llm.num_heads != llm.width or llm.qk_norm:
        config['head_dim'] = llm.head_dim
    if scaling is not None:
        config['rope_scaling'] = {'rope_type': scaling.kind, 'factor': scaling.factor}
        if scaling.kind == 'llama3':
            config['rope_scaling'] |= {
                'low_freq_factor': scaling.low_freq_factor, 'high_freq_factor': scaling.high_freq_factor,
                'original_max_position_embeddings': scaling.original_max_positions}
    return config


def _architecture(llm: LanguageModel) -> dict[str, Any]:
    """The family's own fields."""
    biases = set(llm.biases)
    if llm.qk_norm and biases in (set(), {*_QKV, 'o_proj'}):
        return {'architectures': ['Qwen3ForCausalLM'], 'model_type': 'qwen3', 'attention_bias': bool(biases),
                'use_sliding_window': False}
    if not llm.qk_norm and biases == set(_QKV):
        return {'architectures': ['Qwen2ForCausalLM'], 'model_type': 'qwen2', 'use_sliding_window': False}
    attention, mlp = biases & {*_QKV, 'o_proj'}, biases - {*_QKV, 'o_proj'}
    if llm.qk_norm or len(attention) not in (0, 4) or len(mlp) not in (0, 3):
        norms = ' and norms of queries and keys' if llm.qk_norm else ''
        raise UserError(f'no stock Qwen2, Qwen3 or Llama has biases on {", ".join(llm.biases) or "no linears"}{norms}; '
                        'choose another layout of export.')
    return {'architectures': ['LlamaForCausalLM'], 'model_type': 'llama', 'attention_bias': bool(attention),
            'mlp_bias': bool(mlp)}


class _Reader:
    """Fields of a configuration, with defaults; None where neither has one."""

    def __init__(self, config: Config, defaults: Config, where: str):
        self.config, self.defaults, self.where = config, defaults, where

    def __getitem__(self, name: str) -> Any:
        return self.config.get(name, self.defaults.get(name))

    def require(self, name: str, value: Any) -> None:
        if self[name] != value:
            raise UserError(f'{self.where}: {name} {self[name]!r} is not supported, only {value!r}.')


def _biases(family: str, get: _Reader) -> tuple[str, ...]:
    """Linears with a bias, in the order of `LINEARS`."""
    attention = (*_QKV, 'o_proj') if get['attention_bias'] and family in ('llama', 'qwen3') else ()
    mlp = ('gate_proj', 'up_proj', 'down_proj') if get['mlp_bias'] and family == 'llama' else ()
    chosen = {*(_QKV if family == 'qwen2' else attention), *mlp}
    return tuple(linear for linear in LINEARS if linear in chosen)


def _check_windows(family: str, get: _Reader) -> None:
    """UserError where some layers see a window of the text only."""
    layers, used = get['num_hidden_layers'], False
    if get['layer_types'] is not None:
        used = any(kind != 'full_attention' for kind in get['layer_types'])
    elif family == 'mistral':
        used = get['sliding_window'] is not None
    elif get['use_sliding_window']:
        used = get['sliding_window'] is not None and get['max_window_layers'] < layers
    if used:
        raise UserError(f'{get.where}: sliding_window {get["sliding_window"]} is in use, which is not supported; every '
                        'layer must see all earlier text.')


def _rope(get: _Reader) -> tuple[float, RopeScaling | None]:
    """(base, scaling) from `rope_parameters` (new) or `rope_theta` and `rope_scaling` (old)."""
    field = 'rope_parameters' if get['rope_parameters'] else 'rope_scaling'
    rope = get[field] or {}
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise UserError(f'{get.where}: {field} differs between layers, which is not supported.')
    if (get['partial_rotary_factor'] or rope.get('partial_rotary_factor') or 1) != 1:
        raise UserError(f'{get.where}: partial_rotary_factor is not supported; only rotary positions on whole heads are.')
    theta = rope.get('rope_theta', get['rope_theta'])
    kind = rope.get('rope_type', rope.get('type', 'default'))
    if kind == 'default':
        return theta, None
    if kind not in ('linear', 'llama3'):
        raise UserError(f'{get.where}: {field} of type {kind!r} is not supported, only linear and llama3.')
    names = ('factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings')
    names = names if kind == 'llama3' else names[:1]
    if missing := [name for name in names if not isinstance(rope.get(name), int | float)]:
        raise UserError(f'{get.where}: {field} of type {kind!r} needs a number called {missing[0]}.')
    factor, *frequencies = (float(rope[name]) for name in names[:3])
    if kind == 'linear':
        return theta, RopeScaling(factor, 'linear')
    return theta, RopeScaling(factor, 'llama3', *frequencies, int(rope['original_max_position_embeddings']))
