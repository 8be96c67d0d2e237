"""Which model a foreign folder holds."""
from collections.abc import Mapping
from typing import Any, NamedTuple

from vora_jax.convert.families import own_arguments, own_layout, own_names
from vora_jax.convert.families.hf_config import LLM_FAMILIES, llm_from_config
from vora_jax.convert.families.vit_config import vit_family, vit_from_config, vit_table
from vora_jax.convert.families.vora_config import read_vora
from vora_jax.convert.names import tables
from vora_jax.convert.names.mismatch import Shapes
from vora_jax.convert.names.name_map import Table, prefixed
from vora_jax.types import UserError
from vora_jax.vision.encoder_frontend import Projector
from vora_jax.vision.vit import Vit

Config = Mapping[str, Any]


class Recognised(NamedTuple):
    """A foreign model in our terms.

    family: 'qwen2', 'qwen3', 'llama', 'clip', 'siglip', 'aimv2', 'dinov2', 'llava', 'vora' or 'vora_jax'.
    method: name of a function of `variants`.    stage: one of its stages.    arguments: of that function.
    table: names of the folder's tensors.
    hints: plain values for a run's data: `max_positions` (slots), `template` (a guess), `image` (fields of
        `ImagePolicy`), `dtype`, `eos_id`, `image_token_id`; each only where the folder tells.
    """

    family: str
    method: str
    stage: str
    arguments: dict[str, Any]
    table: Table
    hints: dict[str, Any]


def recognise(config: Config, tensors: Shapes, preprocessor: Config | None = None, *,
              teacher_heads: int | None = None, where: str = 'config.json') -> Recognised:
    """The model that a Hugging Face folder holds.

    Args:
        config: content of config.json, as transformers 4.x or 5.x write it.
        tensors: {name: shape} of the folder.
        preprocessor: content of preprocessor_config.json (in newer folders: `image_processor` of processor_config.json).
        teacher_heads: attention heads of the teacher inside a VoRA checkpoint, which nothing in the folder tells.
        where: what to call config.json in errors.

    Raises:
        UserError: names what is not supported.
    """
    try:
        return _dispatch(config, tensors, preprocessor, teacher_heads, where)
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f'{where} does not look like one that transformers wrote ({type(error).__name__}: {error}); compare '
                        'it with that of the original model.') from error


def _dispatch(config: Config, tensors: Shapes, preprocessor: Config | None, teacher_heads: int | None,
              where: str) -> Recognised:
    kind = config.get('model_type')
    if config.get('quantization_config'):
        raise UserError(f'{where}: quantization_config is there; quantised weights are not supported, take the '
                        'original ones.')
    if kind == 'vora':
        return _vora(config, tensors, preprocessor, teacher_heads, where)
    if kind == own_layout.MODEL_TYPE:
        method, stage, arguments = own_arguments.model_arguments(dict(config))
        hints, policy = _hints(config, None), config.get('image_policy')
        if policy:
            hints['image'] = {name: _tuples(value) for name, value in policy.items()}
        return Recognised(kind, method, stage, arguments, own_names.OWN, hints)
    if kind == 'llava':
        return _llava(config, preprocessor, where)
    if kind in LLM_FAMILIES:
        llm = llm_from_config(config, where)
        family = 'llama' if kind == 'mistral' else kind  # without windows it is one
        return Recognised(family, 'language_model', 'pretrain', {'llm': llm}, tables.DECODER, _hints(config, kind))
    if kind in _ENCODERS:
        return _encoder(config, tensors, preprocessor, where)
    why = _UNSUPPORTED.get(kind, '')
    raise UserError(f'{where}: model_type {kind!r} is not supported{why}; these are: '
                    f'{", ".join((*LLM_FAMILIES, *_ENCODERS, "llava", "vora", own_layout.MODEL_TYPE))}.')


# model_type of a vision-language pair -> that of its vision side.
_ENCODERS = {kind: kind for kind in ('clip_vision_model', 'siglip_vision_model', 'aimv2_vision_model', 'dinov2')} | {
    'clip': 'clip_vision_model', 'siglip': 'siglip_vision_model', 'aimv2': 'aimv2_vision_model'}
_UNSUPPORTED = {
    'dinov2_with_registers': ' (register tokens)', 'dinov3_vit': ' (rotary positions and register tokens)',
    'siglip2': ' (padded patches with masks)', 'siglip2_vision_model': ' (padded patches with masks)',
    'qwen2_moe': ' (experts)', 'qwen3_moe': ' (experts)', 'mixtral': ' (experts)',
    'qwen2_vl': ' (3-D rotary positions)', 'qwen2_5_vl': ' (3-D rotary positions)',
    'llava_llama': ' (take the folder converted for transformers, of model_type llava)', 'llava_next': ' (tiled pictures)',
    'llava_onevision': ' (tiled pictures)',
    'gemma': ' (scaled embeddings)', 'gemma2': ' (scaled embeddings)', 'gemma3': ' (scaled embeddings)',
    'phi3': ' (fused projections)',
}


def _encoder(config: Config, tensors: Shapes, preprocessor: Config | None, where: str) -> Recognised:
    """An encoder alone, or the vision side of a pair."""
    kind = config['model_type']
    vision = config.get('vision_config')
    if vision is not None or kind in ('clip', 'siglip'):
        config = {'model_type': _ENCODERS[kind], **(vision or {})}
    vit, table = _tower(config, tensors, preprocessor, where)
    family = vit_family(config, where)
    return Recognised(family, 'image_encoder', 'frozen', {'vit': vit}, prefixed(table, 'encoder/', ''),
                      _hints(config, None) | _image_hint(vit, preprocessor))


def _tower(config: Config, tensors: Shapes, preprocessor: Config | None, where: str) -> tuple[Vit, Table]:
    """(encoder, its table) for names without a prefix."""
    original = 'preprocessor.patchifier.proj.weight' in tensors
    if original:
        # Tables of sines are computed, not read.
        config = {**config, 'model_type': 'aimv2', 'is_native': config.get('is_native') or
                  'preprocessor.pos_embed' not in tensors}
    elif config['model_type'] == 'aimv2':
        config = {**config, 'model_type': 'aimv2_vision_model'}
    vit = vit_from_config(config, preprocessor, where)
    table = tables.AIMV2_ORIGINAL if original else vit_table(vit)
    if original and vit.patch_embed.positions == 'sincos':
        table = table._replace(ignored=(('preprocessor.pos_embed', 'sines and cosines, which are computed'),))
    return vit, table


def _llava(config: Config, preprocessor: Config | None, where: str) -> Recognised:
    """Hugging Face's LLaVA-1.5."""
    text, vision = (config.get(part) or {} for part in ('text_config', 'vision_config'))
    text = {'model_type': 'llama', **text}
    text['tie_word_embeddings'] = bool(config.get('tie_word_embeddings') or text.get('tie_word_embeddings'))
    llm = llm_from_config(text, f'{where}: text_config')
    if not vision:
        vision = {'model_type': 'clip_vision_model', 'hidden_size': 1024, 'intermediate_size': 4096, 'patch_size': 14,
                  'image_size': 336, 'num_hidden_layers': 24, 'num_attention_heads': 16}
    vit = vit_from_config(vision, preprocessor, f'{where}: vision_config')
    strategy = config.get('vision_feature_select_strategy', 'default')
    if strategy != ('default' if vit.patch_embed.cls_token else 'full'):
        raise UserError(f'{where}: vision_feature_select_strategy {strategy!r} is not supported for this vision_config; '
                        'the language model must get the patches and no [cls].')
    activation = config.get('projector_hidden_act', 'gelu')
    if activation != 'gelu':
        raise UserError(f'{where}: projector_hidden_act {activation!r} is not supported, only \'gelu\'.')
    arguments = {'llm': llm, 'encoder': vit, 'taps': _taps(config.get('vision_feature_layer', -2), vit, where),
                 'projector': Projector(2, bool(config.get('multimodal_projector_bias', True)))}
    hints = _hints(text, 'llava') | _hints(config, 'llava') | _image_hint(vit, preprocessor)
    image_token = config.get('image_token_index', config.get('image_token_id'))
    hints |= {} if image_token is None else {'image_token_id': image_token}
    return Recognised('llava', 'llava', 'finetune', arguments, tables.llava_table(vit_table(vit)), hints)


def _taps(layers: int | list[int], vit: Vit, where: str) -> tuple[int, ...]:
    """Blocks for indices into `hidden_states`, whose entry 0 enters the first block."""
    layers = [layers] if isinstance(layers, int) else list(layers)
    taps = [layer if layer < 0 else layer - 1 for layer in layers]
    if not layers or any(layer == 0 or not -vit.num_layers <= tap < vit.num_layers for layer, tap in zip(layers, taps)):
        raise UserError(f'{where}: vision_feature_layer {layers} is not supported; it must name outputs of the '
                        f'{vit.num_layers} blocks.')
    return tuple(taps)


def _vora(config: Config, tensors: Shapes, preprocessor: Config | None, teacher_heads: int | None,
          where: str) -> Recognised:
    """The official VoRA layout."""
    stage, arguments, table, llm_family = read_vora(config, tensors, preprocessor, teacher_heads, where)
    hints = _hints(config, llm_family) | {'template': 'vora'}
    # Its data code pads with black.
    hints['image'] = {'kind': 'square_pad', 'side': config.get('image_size', 448), 'color': (0, 0, 0)}
    return Recognised('vora', 'vora', stage, arguments, table, hints)


# Families of language models -> name of the chat template they were tuned with, which config.json does not tell.
_TEMPLATES = {'qwen2': 'chatml', 'qwen3': 'chatml', 'llava': 'vicuna_v1'}


def _hints(config: Config, family: str | None) -> dict[str, Any]:
    hints = {}
    template = _TEMPLATES.get(family)
    if family == 'llama' and config.get('vocab_size') == 128256:
        template = 'llama3'
    eos = config.get('eos_token_id')
    for name, value in (('template', template), ('dtype', config.get('dtype', config.get('torch_dtype'))),
                        ('max_positions', config.get('max_position_embeddings')),
                        ('eos_id', eos[0] if isinstance(eos, list) else eos)):
        if value is not None:
            hints[name] = value
    return hints


def _tuples(value: Any) -> Any:
    """JSON has lists where our dataclasses have tuples, also inside tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _image_hint(vit: Vit, preprocessor: Config | None) -> dict[str, Any]:
    """Pictures of the position table's size, cut as the preprocessor does it."""
    patches, preprocessor = vit.patch_embed, preprocessor or {}
    if patches.positions == 'sincos':
        return {'image': {'kind': 'native', 'max_patches': 4 * patches.table_rows * patches.table_cols}}
    is_siglip = vit.norm == 'layer' and not patches.cls_token  # its processor changes the aspect ratio
    pads, crops = preprocessor.get('do_pad', False), preprocessor.get('do_center_crop', not is_siglip)
    size = preprocessor.get('crop_size' if crops else 'size') or preprocessor.get('size')
    sides = size.values() if isinstance(size, Mapping) else [size or patches.table_rows * patches.patch_size]
    # SigLIP's 384 pixels make 27 patches of 14: the rest is cut off.
    side = min(sides) // patches.patch_size * patches.patch_size
    if pads:
        return {'image': {'kind': 'square_pad', 'side': side, 'color': tuple(int(255 * mean) for mean in patches.mean)}}
    return {'image': {'kind': 'square_crop' if crops else 'square_stretch', 'side': side}}
