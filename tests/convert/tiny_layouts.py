"""Debug-size models that fit the layouts of export."""
import dataclasses
import functools

import numpy as np
from tiny_models import LLM, PATCH, QKV, UNGATED, random_params

from vora_jax import variants
from vora_jax.method import Method
from vora_jax.nn.adapters import LowRank
from vora_jax.nn.block import LINEARS
from vora_jax.vision.encoder_frontend import Projector
from vora_jax.vision.patch_embed import PatchEmbed
from vora_jax.vision.vit import Vit

SIDE = 3 * PATCH
EMBED = PatchEmbed(PATCH, width=16, table_rows=3, table_cols=3, norm_eps=1e-5)
TEACHER = Vit(EMBED, num_layers=2, mlp_width=16, num_heads=2)
QWEN = dataclasses.replace(LLM, biases=QKV)


def clip(**changes) -> Vit:
    embed = dataclasses.replace(EMBED, norm=False, bias=False, positions='bicubic', cls_token=True, norm_eps=1e-5)
    return Vit(embed, 3, 20, 2, 1e-5, 'layer', 'gelu_quick', UNGATED, pre_norm=True, **changes)


def siglip(**changes) -> Vit:
    embed = dataclasses.replace(EMBED, norm=False, positions='bicubic', mean=(0.5,) * 3, std=(0.5,) * 3)
    return Vit(embed, 3, 20, 2, 1e-5, 'layer', 'gelu_tanh', UNGATED, **changes)


def dinov2() -> Vit:
    embed = dataclasses.replace(clip().patch_embed, bias=True, mask_token=True, mean=(0.485, 0.456, 0.406),
                                std=(0.229, 0.224, 0.225))
    return Vit(embed, 3, 64, 2, 1e-5, 'layer', 'gelu', UNGATED, layer_scale=True)


def adapted(llm=QWEN, **changes) -> Method:
    """Adapters on two of three layers, a distilling teacher."""
    return variants.vora(llm, EMBED, TEACHER, **{'rank': 3, 'scale': 0.5, 'num_adapted_layers': 2, **changes})


@functools.cache
def make(name: str):
    """(parameters, model, rule) of a layout's typical model."""
    methods = {
        'adapted': (adapted(), 'pretrain'),
        'biased': (adapted(extra_biases=True, join_adjacent_images=True), 'pretrain'),
        'merged': (adapted(), 'finetune'),
        'merged_biased': (adapted(extra_biases=True), 'finetune'),
        'some': (adapted(targets=LINEARS[:2]), 'pretrain'),
        'vision': (adapted(scope='vision'), 'pretrain'),
        'clip': (variants.llava(QWEN, clip(), Projector()), 'finetune'),
        'siglip': (variants.llava(LLM, siglip(), Projector(bias=False), (0, -1)), 'finetune'),
        'tied': (variants.llava(dataclasses.replace(LLM, tied_head=True), clip(), Projector()), 'finetune'),
        'clip_lora': (variants.llava(QWEN, clip(), Projector(), (0, -2), LowRank(3, 0.5)), 'adapt'),
        'llama': (variants.language_model(LLM), 'pretrain'),
        'qwen3': (variants.language_model(dataclasses.replace(LLM, qk_norm=True)), 'pretrain'),
        'encoder_clip': (variants.image_encoder(clip()), 'frozen'),
        'encoder_siglip': (variants.image_encoder(siglip(pool='attention_mlp')), 'frozen'),
        'encoder_aimv2': (variants.image_encoder(TEACHER), 'frozen'),
        'encoder_dinov2': (variants.image_encoder(dinov2()), 'frozen'),
        'tagger': (variants.image_tagger(TEACHER, 50), 'pretrain'),
    }
    method, stage = methods[name]
    model = method.stage(stage).model
    return random_params(model), model, method.vision_tokens


def bad_value(params, value: float = np.nan):
    """The same parameters, of which one weight is not finite."""
    changed = np.array(params['decoder']['norm']['scale'])
    changed[3] = value
    return {**params, 'decoder': {**params['decoder'], 'norm': {'scale': changed}}}
