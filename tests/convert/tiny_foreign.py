"""Tiny folders as `transformers` writes them, and what it computes from them."""
import json

import ml_dtypes
import numpy as np

from vora_jax import variants
from vora_jax.convert.export.exportable import parameter_shapes
from vora_jax.convert.families.recognise import recognise
from vora_jax.convert.files.safetensors_files import open_folder
from vora_jax.convert.names.name_map import from_foreign
from vora_jax.data.images.patches import patchify
from vora_jax.data.packing import Budgets, Picture, Text, layout, stack

VIT = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=7)
DINO = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=28, patch_size=7)
LLM = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
           num_key_value_heads=2)
IMAGE_TOKEN = 95


def rope(**fields):
    return {'rope_parameters': {'rope_theta': 1000.0, **fields}}


def llava(text='LlamaConfig', vision='CLIPVisionConfig', **fields):
    """(class, configuration) names are looked up late: importing transformers takes seconds."""
    return 'LlavaForConditionalGeneration', lambda t: t.LlavaConfig(
        text_config=getattr(t, text)(**LLM).to_dict(), vision_config=getattr(t, vision)(**VIT).to_dict(),
        image_token_index=IMAGE_TOKEN, **fields)


def simple(name, sizes, **fields):
    kind = {'Llama': 'LlamaForCausalLM', 'Mistral': 'MistralForCausalLM', 'Qwen2': 'Qwen2ForCausalLM',
            'Qwen3': 'Qwen3ForCausalLM', 'Dinov2': 'Dinov2Model'}.get(name, f'{name}Model')
    return kind, lambda t: getattr(t, f'{name}Config')(**sizes | fields)


LLAMA3 = rope(rope_type='llama3', factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=16)
LLMS = {
    'qwen2': simple('Qwen2', LLM, rms_norm_eps=1e-4),
    'qwen2_tied': simple('Qwen2', LLM, tie_word_embeddings=True, **rope(rope_type='default')),
    'qwen3': simple('Qwen3', LLM, head_dim=16, attention_bias=True),
    'llama3': simple('Llama', LLM, attention_bias=True, mlp_bias=True, **LLAMA3),
    'llama_linear': simple('Llama', LLM, **rope(rope_type='linear', factor=2.5)),
    'mistral': simple('Mistral', LLM, sliding_window=None, head_dim=16),
}
VITS = {
    'clip': simple('CLIPVision', VIT),
    'clip_gelu': simple('CLIPVision', VIT, hidden_act='gelu'),
    'siglip': simple('SiglipVision', VIT),
    'siglip_headless': simple('SiglipVision', VIT, vision_use_head=False),
    'aimv2': simple('Aimv2Vision', VIT, use_head=True),
    'aimv2_headless': simple('Aimv2Vision', VIT, use_head=False, qkv_bias=True, mlp_bias=True),
    'aimv2_native': simple('Aimv2Vision', VIT, is_native=True, use_head=False),
    'dinov2': simple('Dinov2', DINO),
    'dinov2_gated': simple('Dinov2', DINO, use_swiglu_ffn=True, qkv_bias=False, use_mask_token=False),
}
LLAVAS = {
    'llava': llava(),
    'llava_taps': llava('Qwen2Config', vision_feature_layer=[1, -1], multimodal_projector_bias=False),
    'llava_siglip': llava(vision='SiglipVisionConfig', vision_feature_select_strategy='full'),
}


def write(folder, case, dtype='float32', seed=0):
    """The torch model, all weights random, and its folder as `save_pretrained` writes it."""
    import torch
    import transformers
    kind, make_config = case
    torch.manual_seed(seed)
    model = getattr(transformers, kind)(make_config(transformers)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            spread = weight[0].numel() ** -0.5 if weight.ndim > 1 and 'embed' not in name else 0.3
            is_scale = weight.ndim == 1 and name.endswith('weight') or 'lambda' in name
            weight.copy_(is_scale * 1.0 + spread * torch.randn(weight.shape))
    model = model.to(getattr(torch, dtype))
    model.save_pretrained(folder)
    return model


def read(folder, preprocessor=None, **options):
    """(recognised, method, stage's model, expected shapes, flat parameters, tensors) of a folder."""
    config = json.loads((folder / 'config.json').read_text())
    with open_folder(folder) as opened:
        found = recognise(config, {name: info.shape for name, info in opened.tensors.items()}, preprocessor, **options)
        tensors = {name: opened.read(name) for name in opened.tensors}
    method = getattr(variants, found.method)(**found.arguments)
    model = method.stage(found.stage).model
    shapes = parameter_shapes(model)
    return found, method, model, shapes, from_foreign(tensors, shapes, found.table), tensors


def pictures(count=2, grid=(4, 4), side=7, seed=1):
    """f32[count, rows * side, cols * side, 3], rounded to bfloat16 so that both dtypes read the same."""
    pixels = np.random.default_rng(seed).normal(size=(count, grid[0] * side, grid[1] * side, 3))
    return pixels.astype(ml_dtypes.bfloat16).astype(np.float32)


def packed(segments, rule):
    """One row that holds all segments: lists of token ids and of pictures [height, width, 3]."""
    parts = [[Text(part) if isinstance(part, list) else
              Picture(patchify(part, rule.patch_size), *(size // rule.patch_size for size in part.shape[:2]))
              for part in segment] for segment in segments]
    return stack([layout(parts, Budgets(120, 80, 4, 3 * (rule.patch_size if rule else 1)**2, 'float32'), rule=rule)])

