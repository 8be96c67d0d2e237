"""GGUF files of the Llama architecture, as Hugging Face folders."""
import json
import pathlib

import numpy as np
import pytest
from safetensors.numpy import load_file

from vora_jax.convert.samples.gguf_llama import llama3_factors, read_llama, unpermute
from vora_jax.types import UserError

pytest.importorskip('gguf', reason='needs the extra `assets` (gguf)')
from tiny_gguf import TEMPLATE, write_gguf  # noqa: E402


def folder_of(tiny, folder):
    model = read_llama(tiny.path)
    folder.mkdir()
    model.write(folder)
    return model


@pytest.mark.parametrize('options', [{}, {'biases': True, 'tied': False}], ids=['plain', 'biases and head'])
def test_transformers_computes_the_logits_of_the_quantised_weights(tmp_path, options):
    torch = pytest.importorskip('torch', reason='needs the extra `torch`')
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tiny = write_gguf(str(tmp_path / 'tiny.gguf'), **options)
    folder_of(tiny, tmp_path / 'out')
    biases, tied = options.get('biases', False), options.get('tied', True)
    reference = LlamaForCausalLM(LlamaConfig(
        vocab_size=280, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, rms_norm_eps=1e-5, max_position_embeddings=128, tie_word_embeddings=tied,
        attention_bias=biases, mlp_bias=biases, rope_parameters={'rope_type': 'default', 'rope_theta': 1e5})).eval()
    state = {name: torch.tensor(array.astype(np.float16).astype(np.float32)) for name, array in tiny.weights.items()}
    reference.load_state_dict({'lm_head.weight': state['model.embed_tokens.weight'], **state})
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / 'out', dtype=torch.float32, output_loading_info=True)
    assert not any(report[kind] for kind in ('missing_keys', 'unexpected_keys', 'mismatched_keys'))
    ids = torch.tensor([[1, 30, 60, 270, 5, 279, 4, 4, 99]])
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(ids).logits, reference(ids).logits, rtol=0, atol=0)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / 'out').dtype == torch.float16
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / 'out')
    text = "<|im_start|>the cat, 1234  hats\n\ndon't 日本<|im_end|>"
    assert tokenizer(text).input_ids == tiny.tokenizer.encode(text).ids
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ('<|im_start|>', '<|im_end|>', '<|im_end|>')
    assert tokenizer.apply_chat_template([{'role': 'user', 'content': 'hi'}], tokenize=False) == 'user: hi'


def test_the_folder_is_complete_and_its_tensors_are_float16(tmp_path):
    tiny = write_gguf(str(tmp_path / 'tiny.gguf'))
    model = folder_of(tiny, tmp_path / 'out')
    assert sorted(path.name for path in (tmp_path / 'out').iterdir()) == [
        'chat_template.jinja', 'config.json', 'generation_config.json', 'model.safetensors', 'tokenizer.json',
        'tokenizer_config.json']
    tensors = load_file(tmp_path / 'out/model.safetensors')
    assert set(tensors) == set(tiny.weights) and model.counts['tensors'] == len(tensors)
    for name, array in tensors.items():
        assert array.dtype == np.float16
        np.testing.assert_array_equal(array, tiny.weights[name].astype(np.float16), name)
    config = json.loads((tmp_path / 'out/config.json').read_text())
    assert (config['rms_norm_eps'], config['dtype'], config['tie_word_embeddings']) == (1e-5, 'float16', True)
    assert config['rope_parameters'] == {'rope_type': 'default', 'rope_theta': 1e5} and config['pad_token_id'] == 2
    assert json.loads((tmp_path / 'out/generation_config.json').read_text()) == {
        'bos_token_id': 1, 'eos_token_id': 2, 'pad_token_id': 2}
    assert (tmp_path / 'out/chat_template.jinja').read_text() == TEMPLATE


def test_unpermute_puts_pairs_half_a_head_apart():
    rows = np.array(['a0', 'a1', 'b0', 'b1', 'c0', 'c1', 'd0', 'd1'])
    assert unpermute(rows, 2).tolist() == ['a0', 'b0', 'a1', 'b1', 'c0', 'd0', 'c1', 'd1']
    assert unpermute(rows[:, None], 1)[:, 0].tolist() == ['a0', 'b0', 'c0', 'd0', 'a1', 'b1', 'c1', 'd1']


def llama3(factor):
    return {'rope_type': 'llama3', 'factor': factor, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
            'original_max_position_embeddings': 8192}


def test_rope_scaling(tmp_path):
    factors = llama3_factors(llama3(8.0), 1e5, 32).astype(np.float32)
    tiny = write_gguf(str(tmp_path / 'llama3.gguf'), extra={'rope_freqs.weight': factors})
    config = read_llama(tiny.path).files['config.json']
    assert config['rope_parameters'] == {'rope_theta': 1e5, **llama3(8.0)} == config['rope_scaling']
    change = {'llama.rope.scaling.type': 'linear', 'llama.rope.scaling.factor': 4.0}
    config = read_llama(write_gguf(str(tmp_path / 'linear.gguf'), change=change).path).files['config.json']
    assert config['rope_parameters'] == {'rope_theta': 1e5, 'rope_type': 'linear', 'factor': 4.0}
    bent = write_gguf(str(tmp_path / 'bent.gguf'), extra={'rope_freqs.weight': factors * np.linspace(1, 2, 16, dtype='f')})
    with pytest.raises(UserError, match='not those of Llama 3.1'):
        read_llama(bent.path)
    yarn = write_gguf(str(tmp_path / 'yarn.gguf'), change={'llama.rope.scaling.type': 'yarn'})
    with pytest.raises(UserError, match="yarn.gguf scales its rotary embeddings by 'yarn'"):
        read_llama(yarn.path)


def test_llama3_factors_are_those_of_transformers():
    pytest.importorskip('torch', reason='needs the extra `torch`')
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(head_dim=64, max_position_embeddings=131072, rope_parameters={'rope_theta': 5e5, **llama3(32.0)})
    scaled, _ = ROPE_INIT_FUNCTIONS['llama3'](config, 'cpu')
    plain = 5e5 ** (-np.arange(0, 64, 2) / 64)
    np.testing.assert_allclose(plain / llama3_factors(llama3(32.0), 5e5, 64), scaled.numpy(), rtol=1e-5)


@pytest.mark.parametrize('options, message', [
    ({'architecture': 'qwen2'}, "model of architecture 'qwen2'; only files of the Llama"),
    ({'change': {'llama.expert_count': 8}}, 'has experts, which a Llama model'),
    ({'change': {'llama.rope.dimension_count': 16}}, 'has partial rotary embeddings'),
    ({'change': {'llama.context_length': None}}, "lacks 'llama.context_length'"),
    ({'change': {'tokenizer.ggml.model': 'llama'}}, "tokenizer of kind 'llama'; only byte-level"),
    ({'change': {'tokenizer.ggml.pre': 'viking'}}, "splits words as 'viking'; only gpt-2"),
    ({'change': {'tokenizer.ggml.eos_token_id': 900}}, 'the id of its eos token is outside of its 280'),
    ({'drop': ('blk.1.ffn_up.weight',), 'extra': {'blk.1.ffn_new.weight': np.zeros((2, 32), 'f')}},
     r'tensors are 1 missing \(blk.1.ffn_up.weight\) and 1 unexpected \(blk.1.ffn_new.weight\)'),
    ({'drop': ('token_embd.weight',)}, "lacks 'token_embd.weight'"),
], ids=lambda value: value if isinstance(value, str) else '')
def test_what_cannot_be_converted_is_told_in_one_sentence(tmp_path, options, message):
    tiny = write_gguf(str(tmp_path / 'tiny.gguf'), **options)
    with pytest.raises(UserError, match=message):
        read_llama(tiny.path)


def test_numbers_beyond_float16(tmp_path):
    for value in (1e6, np.nan):
        norm = np.full(64, value, np.float32)
        tiny = write_gguf(str(tmp_path / 'tiny.gguf'), drop=('output_norm.weight',), extra={'output_norm.weight': norm})
        with pytest.raises(UserError, match='tensor output_norm.weight holds numbers that float16 cannot express'):
            list(read_llama(tiny.path).tensors())


def test_damaged_files(tmp_path):
    file = pathlib.Path(write_gguf(str(tmp_path / 'tiny.gguf')).path)
    content = file.read_bytes()
    for size in (0, 3, 100, len(content) // 4, len(content) - 1000):
        file.write_bytes(content[:size])
        with pytest.raises(UserError, match='tiny.gguf is no complete GGUF file'):
            read_llama(str(file))
    file.write_bytes(b'no GGUF' * 99)
    with pytest.raises(UserError, match='is no complete GGUF file'):
        read_llama(str(file))
    with pytest.raises(UserError, match='nowhere.gguf does not exist'):
        read_llama(str(tmp_path / 'nowhere.gguf'))


def test_llama3_tokenizer_puts_its_first_token_in_front(tmp_path):
    import tokenizers

    tiny = write_gguf(str(tmp_path / 'tiny.gguf'), change={'tokenizer.ggml.pre': 'llama-bpe'})
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(read_llama(tiny.path).files['tokenizer.json']))
    text = 'the cat, 1234'
    assert tokenizer.encode(text).ids[0] == 1 and tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.encode(text, add_special_tokens=False).ids[0] != 1
    assert tokenizer.encode(text, text).ids.count(1) == 2
