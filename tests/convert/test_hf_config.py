"""Language models in config.json: what is read, written, refused."""
import dataclasses

import pytest

from vora_jax.convert.families.hf_config import llm_from_config, llm_to_config
from vora_jax.llm.decoder import LanguageModel
from vora_jax.ops.rope import RopeScaling
from vora_jax.types import UserError

OLD = {'model_type': 'llama', 'vocab_size': 96, 'hidden_size': 32, 'intermediate_size': 48, 'num_hidden_layers': 2,
       'num_attention_heads': 4, 'num_key_value_heads': 2, 'rms_norm_eps': 1e-5, 'hidden_act': 'silu',
       'torch_dtype': 'bfloat16', 'rope_theta': 5e5, 'max_position_embeddings': 64, 'tie_word_embeddings': False}
LLAMA3 = {'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0, 'original_max_position_embeddings': 16}
LLM = LanguageModel(96, 2, 32, 48, 4, 2, 8, 5e5, 1e-5)
QKV = ('q_proj', 'k_proj', 'v_proj')


def new_style(config, **rope):
    """The same configuration as transformers 5 writes it."""
    new = {name: value for name, value in config.items() if name not in ('torch_dtype', 'rope_theta', 'rope_scaling')}
    rope = {'rope_type': 'default', **(config.get('rope_scaling') or {}), 'rope_theta': config['rope_theta']}
    rope['rope_type'] = rope.pop('type', rope['rope_type'])
    return new | {'dtype': config['torch_dtype'], 'rope_parameters': rope}


@pytest.mark.parametrize('changes, expected', [
    ({}, {}),
    ({'num_key_value_heads': None}, {'num_kv_heads': 4}),
    ({'head_dim': 16}, {'head_dim': 16}),
    ({'head_dim': None}, {}),
    ({'tie_word_embeddings': True}, {'tied_head': True}),
    ({'attention_bias': True}, {'biases': (*QKV, 'o_proj')}),
    ({'mlp_bias': True}, {'biases': ('gate_proj', 'up_proj', 'down_proj')}),
    ({'rope_scaling': None}, {}),
    ({'rope_scaling': {'type': 'linear', 'factor': 2.0}}, {'rope_scaling': RopeScaling(2.0, 'linear')}),
    ({'rope_scaling': {'rope_type': 'llama3', **LLAMA3}}, {'rope_scaling': RopeScaling(8.0, 'llama3', 1.0, 4.0, 16)}),
    ({'model_type': 'qwen2', 'use_sliding_window': False, 'sliding_window': 32}, {'biases': QKV}),
    ({'model_type': 'qwen2', 'use_sliding_window': True, 'sliding_window': 32, 'max_window_layers': 2}, {'biases': QKV}),
    ({'model_type': 'qwen3', 'head_dim': 16, 'attention_bias': False}, {'qk_norm': True, 'head_dim': 16}),
    ({'model_type': 'qwen3', 'layer_types': ['full_attention'] * 2}, {'qk_norm': True, 'head_dim': 128}),
    ({'model_type': 'mistral', 'sliding_window': None}, {}),
])
def test_old_and_new_style(changes, expected):
    wanted = dataclasses.replace(LLM, max_positions=64, **expected)
    config = OLD | changes
    assert llm_from_config(config) == llm_from_config(new_style(config)) == wanted
    assert llm_from_config(llm_to_config(wanted)) == wanted


def test_what_a_short_configuration_leaves_to_its_family():
    # LLaVA's text_config is as short as this.
    llm = llm_from_config({'model_type': 'llama', 'rms_norm_eps': 1e-5, 'vocab_size': 32064})
    assert llm == LanguageModel(32064, 32, 4096, 11008, 32, 32, 128, 1e4, 1e-5, max_positions=2048)


@pytest.mark.parametrize('changes, message', [
    ({'model_type': 'gpt2'}, "model_type 'gpt2' is no language model that can be read; these can: llama, mistral"),
    ({'hidden_act': 'gelu'}, "hidden_act 'gelu' is not supported, only 'silu'"),
    ({'model_type': 'mistral', 'sliding_window': 4096}, 'sliding_window 4096 is in use'),
    ({'model_type': 'mistral'}, 'sliding_window 4096 is in use'),
    ({'model_type': 'qwen2', 'use_sliding_window': True, 'sliding_window': 8, 'max_window_layers': 1}, 'window 8 is in'),
    ({'model_type': 'qwen3', 'layer_types': ['full_attention', 'sliding_attention'], 'sliding_window': 8}, 'window 8 is'),
    ({'rope_scaling': {'type': 'dynamic', 'factor': 2.0}}, "rope_scaling of type 'dynamic' is not supported, only linear"),
    ({'rope_scaling': {'rope_type': 'yarn', 'factor': 4.0}}, "rope_scaling of type 'yarn' is not supported"),
    ({'rope_scaling': {'rope_type': 'llama3', 'factor': 4.0}}, "type 'llama3' needs a number called low_freq_factor"),
    ({'rope_parameters': {'rope_type': 'longrope', 'rope_theta': 1.0}}, "rope_parameters of type 'longrope' is not"),
    ({'rope_parameters': {'full_attention': {'rope_type': 'default'}}}, 'rope_parameters differs between layers'),
    ({'partial_rotary_factor': 0.5}, 'partial_rotary_factor is not supported'),
])
def test_what_is_not_supported_is_named(changes, message):
    with pytest.raises(UserError, match=message):
        llm_from_config(OLD | changes, 'folder/config.json')


@pytest.mark.parametrize('changes', [{'biases': ('o_proj',)}, {'biases': QKV, 'qk_norm': True},
                                     {'biases': ('gate_proj', 'up_proj')}])
def test_no_stock_model(changes):
    with pytest.raises(UserError, match='no stock Qwen2, Qwen3 or Llama has biases on'):
        llm_to_config(dataclasses.replace(LLM, **changes))
