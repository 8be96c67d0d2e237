"""Which model a folder holds: configurations of published models, in old and new style."""
import dataclasses
import math

import pytest

from vora_jax import variants
from vora_jax.convert.export.exportable import parameter_shapes
from vora_jax.convert.families.recognise import recognise
from vora_jax.convert.families.vit_config import vit_to_config
from vora_jax.convert.names.name_map import entries, foreign_shapes
from vora_jax.convert.names.tables import AIMV2_ORIGINAL
from vora_jax.llm.decoder import LanguageModel
from vora_jax.ops.rope import RopeScaling
from vora_jax.types import UserError
from vora_jax.vision.encoder_frontend import Projector
from vora_jax.vision.patch_embed import CLIP_MEAN, CLIP_STD, PatchEmbed
from vora_jax.vision.vit import Vit

QKV = ('q_proj', 'k_proj', 'v_proj')
PLAIN = (*QKV, 'o_proj', 'up_proj', 'down_proj')
GATED = (*QKV, 'o_proj', 'gate_proj', 'up_proj', 'down_proj')
HALF, IMAGENET = ((0.5,) * 3,) * 2, ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def sizes(width, mlp, layers, heads, kv=None, **rest):
    return {'hidden_size': width, 'intermediate_size': mlp, 'num_hidden_layers': layers, 'num_attention_heads': heads,
            **({} if kv is None else {'num_key_value_heads': kv}), **rest}


QWEN = {'hidden_act': 'silu', 'rms_norm_eps': 1e-6, 'rope_theta': 1000000.0, 'use_sliding_window': False,
        'torch_dtype': 'bfloat16', 'bos_token_id': 151643, 'eos_token_id': 151645}
LLMS = {
    'Qwen2.5-0.5B': ({**QWEN, 'model_type': 'qwen2', **sizes(896, 4864, 24, 14, 2), 'max_position_embeddings': 32768,
                      'max_window_layers': 24, 'sliding_window': 32768, 'tie_word_embeddings': True, 'vocab_size': 151936},
                     LanguageModel(151936, 24, 896, 4864, 14, 2, 64, 1e6, 1e-6, biases=QKV, tied_head=True), 494_032_768),
    'Qwen2.5-7B': ({**QWEN, 'model_type': 'qwen2', **sizes(3584, 18944, 28, 28, 4), 'max_position_embeddings': 131072,
                    'max_window_layers': 28, 'sliding_window': 131072, 'tie_word_embeddings': False, 'vocab_size': 152064},
                   LanguageModel(152064, 28, 3584, 18944, 28, 4, 128, 1e6, 1e-6, biases=QKV), 7_615_616_512),
    'Qwen3-0.6B': ({**QWEN, 'model_type': 'qwen3', **sizes(1024, 3072, 28, 16, 8, head_dim=128), 'attention_bias': False,
                    'max_position_embeddings': 40960, 'max_window_layers': 28, 'sliding_window': None, 'rope_scaling': None,
                    'tie_word_embeddings': True, 'vocab_size': 151936},
                   LanguageModel(151936, 28, 1024, 3072, 16, 8, 128, 1e6, 1e-6, qk_norm=True, tied_head=True), 596_049_920),
    'Llama-2-7b': ({'model_type': 'llama', **sizes(4096, 11008, 32, 32, 32), 'hidden_act': 'silu', 'rms_norm_eps': 1e-5,
                    'max_position_embeddings': 4096, 'pretraining_tp': 1, 'rope_scaling': None, 'eos_token_id': 2,
                    'tie_word_embeddings': False, 'torch_dtype': 'float16', 'vocab_size': 32000},
                   LanguageModel(32000, 32, 4096, 11008, 32, 32, 128, 1e4, 1e-5), 6_738_415_616),
    'Llama-3.1-8B': ({'model_type': 'llama', **sizes(4096, 14336, 32, 32, 8), 'attention_bias': False, 'mlp_bias': False,
                      'hidden_act': 'silu', 'rms_norm_eps': 1e-5, 'max_position_embeddings': 131072,
                      'rope_scaling': {'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
                                       'original_max_position_embeddings': 8192, 'rope_type': 'llama3'},
                      'rope_theta': 500000.0, 'tie_word_embeddings': False, 'torch_dtype': 'bfloat16',
                      'vocab_size': 128256, 'eos_token_id': [128001, 128008, 128009]},
                     LanguageModel(128256, 32, 4096, 14336, 32, 8, 128, 5e5, 1e-5, RopeScaling(8.0)), 8_030_261_248),
    'vicuna-7b-v1.5': ({'model_type': 'llama', **sizes(4096, 11008, 32, 32, 32), 'hidden_act': 'silu', 'pad_token_id': 0,
                        'rms_norm_eps': 1e-5, 'max_position_embeddings': 4096, 'rope_scaling': None, 'eos_token_id': 2,
                        'tie_word_embeddings': False, 'torch_dtype': 'float16', 'vocab_size': 32000, 'use_cache': True},
                       LanguageModel(32000, 32, 4096, 11008, 32, 32, 128, 1e4, 1e-5), 6_738_415_616),
    'SmolLM2-135M': ({'model_type': 'llama', **sizes(576, 1536, 30, 9, 3), 'attention_bias': False, 'hidden_act': 'silu',
                      'rms_norm_eps': 1e-5, 'max_position_embeddings': 8192, 'rope_theta': 100000, 'rope_scaling': None,
                      'tie_word_embeddings': True, 'torch_dtype': 'bfloat16', 'vocab_size': 49152, 'eos_token_id': 0},
                     LanguageModel(49152, 30, 576, 1536, 9, 3, 64, 1e5, 1e-5, tied_head=True), 134_515_008),
}


def clip(width, patch, grid, layers, mlp, heads):
    return Vit(PatchEmbed(patch, width, grid, grid, 1e-5, CLIP_MEAN, CLIP_STD, False, False, 'bicubic', True),
               layers, mlp, heads, 1e-5, 'layer', 'gelu_quick', PLAIN, pre_norm=True)


def dinov2(width, layers, mlp, heads, gated):
    embed = PatchEmbed(14, width, 37, 37, 1e-6, *IMAGENET, False, True, 'bicubic', True, True)
    return Vit(embed, layers, mlp, heads, 1e-6, 'layer', 'silu_gated' if gated else 'gelu', GATED if gated else PLAIN, True)


CLIP_L = sizes(1024, 4096, 24, 16, image_size=336, patch_size=14, model_type='clip_vision_model', projection_dim=768)
DINO = {'model_type': 'dinov2', 'image_size': 518, 'patch_size': 14, 'mlp_ratio': 4, 'qkv_bias': True, 'hidden_act': 'gelu',
        'layer_norm_eps': 1e-6, 'num_channels': 3, 'layerscale_value': 1.0, 'apply_layernorm': True,
        'torch_dtype': 'float32'}
AIMV2 = sizes(1024, 2816, 24, 8, image_size=224, patch_size=14, rms_norm_eps=1e-5, qkv_bias=False, num_channels=3)
AIMV2_L = Vit(PatchEmbed(14, 1024, 16, 16, 1e-5), 24, 2816, 8, 1e-5)
VITS = {  # configuration, preprocessor, encoder, its parameters, side of its pictures
    'clip-vit-large-patch14-336': (
        {'model_type': 'clip', 'projection_dim': 768, 'text_config': {'hidden_size': 768}, 'torch_dtype': 'float32',
         'vision_config': {**CLIP_L, 'layer_norm_eps': 1e-5, 'hidden_act': 'quick_gelu', 'tie_word_embeddings': True}},
        {'crop_size': 336, 'do_center_crop': True, 'image_mean': list(CLIP_MEAN), 'image_std': list(CLIP_STD), 'size': 336},
        clip(1024, 14, 24, 24, 4096, 16), 303_507_456, 336),
    'siglip-so400m-patch14-384': (
        {'model_type': 'siglip', 'text_config': {'hidden_size': 1152},
         'vision_config': sizes(1152, 4304, 27, 16, image_size=384, patch_size=14, model_type='siglip_vision_model')},
        {'image_mean': [0.5] * 3, 'image_std': [0.5] * 3, 'size': {'height': 384, 'width': 384}, 'do_resize': True},
        Vit(PatchEmbed(14, 1152, 27, 27, 1e-6, *HALF, False, True, 'bicubic'), 27, 4304, 16, 1e-6, 'layer', 'gelu_tanh',
            PLAIN, pool='attention_mlp'), 428_225_600, 378),
    'aimv2-large-patch14-224 (transformers)': (
        AIMV2 | {'model_type': 'aimv2_vision_model', 'use_head': False, 'is_native': False, 'mlp_bias': False}, None,
        AIMV2_L, 309_197_824, 224),
    'dinov2-small': (DINO | {'hidden_size': 384, 'num_hidden_layers': 12, 'num_attention_heads': 6, 'use_swiglu_ffn': False},
                     {'crop_size': {'height': 224, 'width': 224}, 'do_center_crop': True, 'size': {'shortest_edge': 256},
                      'image_mean': [0.485, 0.456, 0.406], 'image_std': [0.229, 0.224, 0.225]},
                     dinov2(384, 12, 1536, 6, False), 22_056_576, 224),
    'dinov2-giant': (DINO | {'hidden_size': 1536, 'num_hidden_layers': 40, 'num_attention_heads': 24,
                             'use_swiglu_ffn': True}, None, dinov2(1536, 40, 4096, 24, True), 1_136_480_768, 518),
}


def new_style(config):
    """As transformers 5 writes it."""
    rope = {'rope_type': 'default', **(config.get('rope_scaling') or {}), 'rope_theta': config.get('rope_theta', 10000.0)}
    new = {name: value for name, value in config.items() if name not in ('torch_dtype', 'rope_theta', 'rope_scaling')}
    return new | {'dtype': config.get('torch_dtype'), 'rope_parameters': rope}


def num_parameters(found):
    model = getattr(variants, found.method)(**found.arguments).stage(found.stage).model
    pieces = entries(parameter_shapes(model), found.table)
    return sum(math.prod(shape) for shape in foreign_shapes(pieces).values())


@pytest.mark.parametrize('name', LLMS)
def test_language_models(name):
    config, llm, count = LLMS[name]
    found, llm = recognise(config, {}), dataclasses.replace(llm, max_positions=config['max_position_embeddings'])
    assert found.arguments == {'llm': llm}
    assert (found.family, found.method, found.stage) == (config['model_type'], 'language_model', 'pretrain')
    assert recognise(new_style(config), {}) == found
    eos = config['eos_token_id']
    assert found.hints['max_positions'] == config['max_position_embeddings']
    assert (found.hints['dtype'], found.hints['eos_id']) == (config['torch_dtype'], eos if isinstance(eos, int) else eos[0])
    assert num_parameters(found) == count


def test_template_guesses():
    assert recognise(LLMS['Qwen2.5-7B'][0], {}).hints['template'] == 'chatml'
    assert recognise(LLMS['Llama-3.1-8B'][0], {}).hints['template'] == 'llama3'
    assert 'template' not in recognise(LLMS['Llama-2-7b'][0], {}).hints


@pytest.mark.parametrize('name', VITS)
def test_encoders(name):
    config, preprocessor, vit, count, side = VITS[name]
    found = recognise(config, {}, preprocessor)
    assert found.arguments == {'vit': vit}
    assert (found.method, found.stage, found.hints['image']) == ('image_encoder', 'frozen', {
        'kind': 'square_stretch' if name.startswith('siglip') else 'square_crop', 'side': side})
    assert num_parameters(found) == count
    again = recognise(vit_to_config(vit), {}, preprocessor)
    assert again.arguments == {'vit': vit} and again.table == found.table


def test_apples_own_layout_is_told_by_its_names():
    config = AIMV2 | {'model_type': 'aimv2', 'architectures': ['AIMv2Model'], 'use_bias': False, 'attention_dropout': 0.0,
                      'projection_dropout': 0.0, 'torch_dtype': 'float32'}
    first, table = 'preprocessor.patchifier.proj.weight', 'preprocessor.pos_embed'
    found = recognise(config, {first: (1024, 3, 14, 14), table: (1, 256, 1024)})
    assert found.arguments == {'vit': AIMV2_L} and num_parameters(found) == 309_197_824
    assert found.table.rows[0].name == first and len(found.table.rows) == len(AIMV2_ORIGINAL.rows)
    native = recognise(config, {first: (1024, 3, 14, 14)}).arguments['vit'].patch_embed
    assert native == dataclasses.replace(AIMV2_L.patch_embed, positions='sincos')


def test_pixels_are_normalised_as_the_preprocessor_says():
    config = VITS['dinov2-small'][0]
    embed = recognise(config, {}, {'image_mean': [0.1, 0.2, 0.3], 'image_std': [1, 2, 3]}).arguments['vit'].patch_embed
    assert (embed.mean, embed.std) == ((0.1, 0.2, 0.3), (1.0, 2.0, 3.0))
    embed = recognise(config, {}, {'do_normalize': False, 'image_mean': [0.1, 0.2, 0.3]}).arguments['vit'].patch_embed
    assert (embed.mean, embed.std) == ((0.0,) * 3, (1.0,) * 3)


LLAVA = {'model_type': 'llava', 'architectures': ['LlavaForConditionalGeneration'], 'ignore_index': -100,
         'image_token_index': 32000, 'pad_token_id': 32001, 'projector_hidden_act': 'gelu', 'torch_dtype': 'float16',
         'tie_word_embeddings': False, 'vision_feature_layer': -2, 'vision_feature_select_strategy': 'default',
         'text_config': {'_name_or_path': 'lmsys/vicuna-7b-v1.5', 'max_position_embeddings': 4096, 'model_type': 'llama',
                         'rms_norm_eps': 1e-5, 'torch_dtype': 'float16', 'vocab_size': 32064},
         'vision_config': {**CLIP_L, 'vocab_size': 32000}}


def test_llava():
    found = recognise(LLAVA, {})
    assert (found.family, found.method, found.stage) == ('llava', 'llava', 'finetune')
    assert found.arguments == {
        'llm': LanguageModel(32064, 32, 4096, 11008, 32, 32, 128, 1e4, 1e-5), 'taps': (-2,), 'projector': Projector(),
        'encoder': clip(1024, 14, 24, 24, 4096, 16)}
    assert found.hints == {'template': 'vicuna_v1', 'dtype': 'float16', 'max_positions': 4096, 'image_token_id': 32000,
                           'image': {'kind': 'square_crop', 'side': 336}}
    assert num_parameters(found) == 7_063_427_072


@pytest.mark.parametrize('layers, taps', [(-2, (-2,)), (-1, (-1,)), (1, (0,)), (24, (23,)), ([-2, 5], (-2, 4))])
def test_taps(layers, taps):
    assert recognise(LLAVA | {'vision_feature_layer': layers}, {}).arguments['taps'] == taps


VORA = {'model_type': 'vora', **LLMS['Qwen2.5-7B'][0], 'image_size': 448, 'patch_size': 14} | {'model_type': 'vora'}
EMBED = {'vision_embedding.patchifier.proj.weight': (1536, 3, 14, 14)}


def attention(layer, name, part='weight'):
    return f'llm.model.layers.{layer}.self_attn.{name}.{part}'


def test_vora_is_read_from_its_tensors():
    last = {attention(27, 'q_proj'): (3584, 3584), attention(27, 'q_proj', 'bias'): (3584,)}
    merged = recognise(VORA, EMBED | last)
    assert (merged.method, merged.stage, merged.arguments['extra_biases']) == ('vora', 'finetune', False)
    assert merged.arguments['llm'] == dataclasses.replace(LLMS['Qwen2.5-7B'][1], max_positions=131072)
    embed = merged.arguments['patch_embed']
    assert (embed.positions, embed.norm_eps, embed.table_rows) == ('sincos', 1e-6, 32)
    assert merged.hints['template'] == 'vora' and merged.hints['image'] == {
        'kind': 'square_pad', 'side': 448, 'color': (0, 0, 0)}
    assert recognise(new_style(VORA), EMBED | last) == merged

    lora = {attention(layer, name, f'lora_{side}.weight'): (8, 8) for layer in range(5) for name in ('q_proj', 'o_proj')
            for side in 'AB'}
    found = recognise(VORA, EMBED | last | lora | {attention(0, 'o_proj', 'bias'): (3584,)})
    assert found.stage == 'pretrain' and found.arguments['extra_biases'] and found.arguments['distill_weight'] == 0
    assert (found.arguments['rank'], found.arguments['num_adapted_layers']) == (8, 5)
    assert found.arguments['targets'] == ('q_proj', 'o_proj')

    biased = recognise(VORA, EMBED | last | {attention(layer, 'o_proj', 'bias'): (3584,) for layer in range(3)})
    assert (biased.stage, biased.arguments['num_adapted_layers']) == ('finetune', 3)
    model = variants.vora(**biased.arguments).stage('finetune').model
    assert [(group.num_layers, group.biases) for group in model.groups] == [(3, ('o_proj',)), (25, ())]


TEACHER = {'aux_vision.aux_layer_0.1.weight': (48, 3584), 'aux_vision.aux_model.trunk.blocks.0.mlp.fc1.weight': (64, 48),
           'aux_vision.aux_model.trunk.blocks.0.attn.qkv.bias': (144,),
           'aux_vision.aux_model.preprocessor.patchifier.proj.weight': (48, 3, 14, 14)}
LORA = {attention(0, 'q_proj', 'lora_A.weight'): (8, 3584)}


def test_voras_teacher():
    teacher = recognise(VORA, EMBED | TEACHER | LORA, teacher_heads=4).arguments['teacher']
    assert (teacher.num_heads, teacher.num_layers, teacher.mlp_width, teacher.norm_eps) == (4, 1, 64, 1e-5)
    assert teacher.biases == QKV and teacher.patch_embed.width == 48
    with pytest.raises(UserError, match='does not tell how many attention heads the teacher has, and at width 48'):
        recognise(VORA, EMBED | TEACHER | LORA)
    merged = recognise(VORA, EMBED | TEACHER)  # the original's merge tool keeps it
    assert merged.stage == 'finetune' and merged.table.ignored[-1][0] == 'aux_vision.*'


@pytest.mark.parametrize('config, tensors, message', [
    ({'model_type': 'dinov2_with_registers'}, {}, r"'dinov2_with_registers' is not supported \(register tokens\); these"),
    ({'model_type': 'siglip2'}, {}, r"'siglip2' is not supported \(padded patches with masks\)"),
    ({'model_type': 'qwen2_vl'}, {}, r'3-D rotary positions'),
    ({'architectures': ['x']}, {}, 'model_type None is not supported'),
    ({'model_type': 'llava_llama'}, {}, 'take the folder converted for transformers'),
    (LLMS['Qwen2.5-7B'][0] | {'quantization_config': {'bits': 4}}, {}, 'quantised weights are not supported'),
    (LLMS['Qwen2.5-7B'][0] | {'hidden_size': '3584'}, {}, 'does not look like one that transformers wrote .TypeError'),
    (DINO | {'hidden_size': 384, 'patch_size': 0}, {}, 'does not look like one that transformers wrote .ZeroDivisionError'),
    (LLAVA | {'text_config': [1]}, {}, 'does not look like one that transformers wrote'),
    (LLAVA | {'vision_feature_select_strategy': 'full'}, {}, "vision_feature_select_strategy 'full' is not supported for"),
    (LLAVA | {'vision_feature_layer': 0}, {}, r'vision_feature_layer \[0\] is not supported; .* the 24 blocks'),
    (LLAVA | {'vision_feature_layer': [3, 25]}, {}, r'vision_feature_layer \[3, 25\] is not'),
    (LLAVA | {'projector_hidden_act': 'relu'}, {}, "projector_hidden_act 'relu' is not supported"),
    (LLAVA | {'vision_config': {'model_type': 'pixtral'}}, {}, "vision_config: the vision encoder 'pixtral' is not supp"),
    (DINO | {'hidden_act': 'relu', 'hidden_size': 384}, {}, "hidden_act 'relu' is not supported for dinov2"),
    (DINO | {'image_size': [224, 448]}, {}, r'a size of \[224, 448\] pixels is not supported, only squares'),
    (DINO | {'num_channels': 1}, {}, 'num_channels 1 is not supported'),
    (AIMV2 | {'model_type': 'aimv2_vision_model', 'qkv_bias': True, 'use_head': True}, {}, 'qkv_bias together with'),
    (VORA | {'vision_attention_mask': 'default'}, EMBED, "vision_attention_mask 'default' is not supported"),
    (VORA, {}, 'there is no tensor vision_embedding.patchifier.proj.weight'),
    (VORA, EMBED | {'vision_embedding.pos_embed': (1, 12, 1536)}, 'has 12 positions, which are no square grid'),
])
def test_what_is_not_supported_is_named(config, tensors, message):
    with pytest.raises(UserError, match=message) as error:
        recognise(config, tensors, where='DIR/config.json')
    assert str(error.value).startswith('DIR/config.json')
