"""Vision encoders in config.json, both ways."""
import dataclasses
from collections.abc import Mapping
from typing import Any

from vora_jax.convert.names.name_map import Table
from vora_jax.convert.names.tables import AIMV2, CLIP, DINOV2, DINOV2_GATED, SIGLIP
from vora_jax.types import UserError
from vora_jax.vision.patch_embed import CLIP_MEAN, CLIP_STD, PatchEmbed
from vora_jax.vision.vit import Vit

Config = Mapping[str, Any]
_QKVO = ('q_proj', 'k_proj', 'v_proj', 'o_proj')
_PLAIN, _GATED = (*_QKVO, 'up_proj', 'down_proj'), (*_QKVO, 'gate_proj', 'up_proj', 'down_proj')
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# What all models of a family share: fields of `Vit`, then of its `PatchEmbed`.
_FAMILIES = {
    'clip': ({'norm': 'layer', 'activation': 'gelu_quick', 'biases': _PLAIN, 'pre_norm': True},
             {'norm': False, 'bias': False, 'positions': 'bicubic', 'cls_token': True,
              'mean': CLIP_MEAN, 'std': CLIP_STD}),
    'siglip': ({'norm': 'layer', 'activation': 'gelu_tanh', 'biases': _PLAIN},
               {'norm': False, 'positions': 'bicubic', 'mean': (0.5,) * 3, 'std': (0.5,) * 3}),
    'aimv2': ({'norm': 'rms', 'activation': 'silu_gated'}, {'mean': CLIP_MEAN, 'std': CLIP_STD}),
    'dinov2': ({'norm': 'layer', 'layer_scale': True},
               {'norm': False, 'positions': 'bicubic', 'cls_token': True, 'mean': _IMAGENET[0], 'std': _IMAGENET[1]}),
}
# What transformers takes where config.json says nothing.
_SIZES = {'hidden_size': 768, 'num_hidden_layers': 12, 'num_attention_heads': 12, 'image_size': 224, 'num_channels': 3}
_DEFAULTS = {
    'clip': _SIZES | {'intermediate_size': 3072, 'patch_size': 32, 'layer_norm_eps': 1e-5, 'hidden_act': 'quick_gelu'},
    'siglip': _SIZES | {'intermediate_size': 3072, 'patch_size': 16, 'layer_norm_eps': 1e-6,
                        'hidden_act': 'gelu_pytorch_tanh', 'vision_use_head': True},
    'aimv2': _SIZES | {'hidden_size': 1024, 'intermediate_size': 2816, 'num_hidden_layers': 24, 'num_attention_heads': 8,
                       'patch_size': 14, 'rms_norm_eps': 1e-5, 'hidden_act': 'silu', 'use_head': True},
    'dinov2': _SIZES | {'patch_size': 14, 'mlp_ratio': 4, 'layer_norm_eps': 1e-6, 'hidden_act': 'gelu', 'qkv_bias': True,
                        'use_mask_token': True},
}
_ACTIVATIONS = {'quick_gelu': 'gelu_quick', 'gelu': 'gelu', 'gelu_pytorch_tanh': 'gelu_tanh', 'gelu_new': 'gelu_tanh',
                'silu': 'silu_gated'}
_MODEL_TYPES = {'clip_vision_model': 'clip', 'siglip_vision_model': 'siglip', 'aimv2_vision_model': 'aimv2',
                'aimv2': 'aimv2', 'dinov2': 'dinov2'}


def vit_from_config(config: Config, preprocessor: Config | None = None, where: str = 'config.json') -> Vit:
    """The encoder that a vision configuration describes.

    Args:
        config: of CLIP, SigLIP, AIMv2 (transformers' names of fields, which Apple's own are too) or DINOv2.
        preprocessor: preprocessor_config.json, for mean and standard deviation of pixels.

    Raises:
        UserError: names the field whose value is not supported.
    """
    family = vit_family(config, where)
    get = dict(_DEFAULTS[family]) | {name: value for name, value in config.items() if value is not None}
    vit, patches = (dict(fields) for fields in _FAMILIES[family])
    activation = _ACTIVATIONS.get(get['hidden_act'])
    if activation is None or (activation == 'silu_gated') != (family == 'aimv2'):
        raise UserError(f'{where}: hidden_act {get["hidden_act"]!r} is not supported for {family}.')
    sides = [size if isinstance(size, int) else _square(size, where) for size in (get['image_size'], get['patch_size'])]
    if get['num_channels'] != 3:
        raise UserError(f'{where}: num_channels {get["num_channels"]} is not supported, only 3.')
    eps = float(get['rms_norm_eps' if family == 'aimv2' else 'layer_norm_eps'])
    patches |= {'patch_size': sides[1], 'width': get['hidden_size'], 'norm_eps': eps,
                'table_rows': sides[0] // sides[1], 'table_cols': sides[0] // sides[1], **pixels_of(preprocessor, where)}
    vit |= {'num_layers': get['num_hidden_layers'], 'mlp_width': get.get('intermediate_size'),
            'num_heads': get['num_attention_heads'], 'norm_eps': eps, 'activation': activation}
    if family == 'dinov2':
        _read_dinov2(get, vit, patches)
    elif family == 'aimv2':
        _read_aimv2(get, vit, patches, where)
    elif family == 'siglip':
        vit['pool'] = 'attention_mlp' if get['vision_use_head'] else 'none'
    return Vit(PatchEmbed(**patches), **vit)


def vit_family(config: Config, where: str = 'config.json') -> str:
    """'clip', 'siglip', 'aimv2' or 'dinov2'. UserError for others."""
    kind = config.get('model_type')
    if kind not in _MODEL_TYPES:
        raise UserError(f'{where}: the vision encoder {kind!r} is not supported; these are: {", ".join(_MODEL_TYPES)}.')
    return _MODEL_TYPES[kind]


def vit_table(vit: Vit) -> Table:
    """Names of the encoder in transformers' own layout. UserError where no family has such an encoder."""
    family = _family_of(vit)
    if family == 'dinov2' and vit.activation == 'silu_gated':
        return DINOV2_GATED
    return {'clip': CLIP, 'siglip': SIGLIP, 'aimv2': AIMV2, 'dinov2': DINOV2}[family]


def vit_to_config(vit: Vit, dtype: str = 'float32') -> dict[str, Any]:
    """config.json of a stock encoder; `vit_from_config` gives `vit` again (mean and std: `preprocessor` has them).

    Raises:
        UserError: no family of encoders looks like this.
    """
    family, patches = _family_of(vit), vit.patch_embed
    config = {
        'architectures': [{'clip': 'CLIPVisionModel', 'siglip': 'SiglipVisionModel', 'aimv2': 'Aimv2VisionModel',
                           'dinov2': 'Dinov2Model'}[family]],
        'model_type': 'dinov2' if family == 'dinov2' else f'{family}_vision_model',
        'hidden_size': vit.width, 'num_hidden_layers': vit.num_layers, 'num_attention_heads': vit.num_heads,
        'image_size': patches.table_rows * patches.patch_size, 'patch_size': patches.patch_size, 'num_channels': 3,
        'hidden_act': next(name for name, value in _ACTIVATIONS.items() if value == vit.activation),
        'rms_norm_eps' if family == 'aimv2' else 'layer_norm_eps': vit.norm_eps, 'torch_dtype': dtype,
    }
    if family == 'dinov2':
        gated = vit.activation == 'silu_gated'
        ratio = next((ratio for ratio in range(1, 17) if _dinov2_mlp_width(vit.width, ratio, gated) == vit.mlp_width), 4)
        config |= {'hidden_act': 'gelu' if gated else config['hidden_act'], 'qkv_bias': 'q_proj' in vit.biases,
                   'mlp_ratio': ratio, 'use_swiglu_ffn': gated,
                   'use_mask_token': patches.mask_token}
    else:
        config['intermediate_size'] = vit.mlp_width
    if family == 'aimv2':
        config |= {'qkv_bias': 'q_proj' in vit.biases, 'mlp_bias': 'up_proj' in vit.biases,
                   'use_head': vit.pool != 'none', 'is_native': patches.positions == 'sincos'}
    if family == 'siglip':
        config['vision_use_head'] = vit.pool != 'none'
    again = vit_from_config(config, {'image_mean': patches.mean, 'image_std': patches.std})
    different = next((field.name for ours, theirs in ((vit, again), (patches, again.patch_embed))
                      for field in dataclasses.fields(ours) if field.name != 'patch_embed'
                      and getattr(ours, field.name) != getattr(theirs, field.name)), None)
    if different is not None:
        raise UserError(f'no stock {family} encoder has this value of {different}; choose another layout of export.')
    return config


def _family_of(vit: Vit) -> str:
    if vit.layer_scale:
        return 'dinov2'
    if vit.norm == 'rms':
        return 'aimv2'
    return 'clip' if vit.pre_norm else 'siglip'


def _read_dinov2(get: dict[str, Any], vit: dict[str, Any], patches: dict[str, Any]) -> None:
    gated = get.get('use_swiglu_ffn', False)
    biases = _GATED if gated else _PLAIN
    vit |= {'mlp_width': _dinov2_mlp_width(get['hidden_size'], get['mlp_ratio'], gated),
            'biases': biases if get['qkv_bias'] else biases[3:]}
    if gated:
        vit['activation'] = 'silu_gated'
    patches['mask_token'] = get['use_mask_token']


def _dinov2_mlp_width(width: int, ratio: float, gated: bool) -> int:
    return (int(int(width * ratio) * 2 / 3) + 7) // 8 * 8 if gated else int(width * ratio)


def _read_aimv2(get: dict[str, Any], vit: dict[str, Any], patches: dict[str, Any], where: str) -> None:
    # transformers biases the output projection with `qkv_bias`, Apple's own code with `use_bias`.
    attention, mlp = get.get('qkv_bias', False), get.get('mlp_bias', get.get('use_bias', False))
    output = get.get('use_bias', attention)
    vit['biases'] = tuple(name for name, there in zip(_GATED, (*[attention] * 3, output, *[mlp] * 3)) if there)
    own_layout = get['model_type'] == 'aimv2'  # Apple's files: no attention head
    vit['pool'] = 'attention' if get['use_head'] and not own_layout else 'none'
    if vit['pool'] != 'none' and attention:
        raise UserError(f'{where}: qkv_bias together with use_head is not supported.')
    patches['positions'] = 'sincos' if get.get('is_native') else 'bilinear'


def pixels_of(preprocessor: Config | None, where: str) -> dict[str, tuple[float, ...]]:
    """Mean and standard deviation where the preprocessor states them."""
    if not preprocessor:
        return {}
    if not preprocessor.get('do_normalize', True):
        return {'mean': (0.0,) * 3, 'std': (1.0,) * 3}
    found = {ours: tuple(float(x) for x in preprocessor[theirs]) for ours, theirs in (
        ('mean', 'image_mean'), ('std', 'image_std')) if preprocessor.get(theirs) is not None}
    if any(len(values) != 3 for values in found.values()):
        raise UserError(f'{where}: the preprocessor\'s image_mean and image_std must have three values each.')
    return found


def _square(size: Any, where: str) -> int:
    """The side of a size that config.json gives as [height, width] or as a mapping."""
    sides = set(size.values()) if isinstance(size, Mapping) else set(size)
    if len(sides) != 1:
        raise UserError(f'{where}: a size of {size} pixels is not supported, only squares.')
    return int(sides.pop())
