"""VoRA's official checkpoints as arguments of a method."""
import math
import re
from collections.abc import Mapping
from typing import Any

from vora_jax.convert.families.hf_config import llm_from_config
from vora_jax.convert.families.vit_config import pixels_of
from vora_jax.convert.names.mismatch import Shapes
from vora_jax.convert.names.name_map import Table
from vora_jax.convert.names.tables import VORA
from vora_jax.nn.block import LINEARS
from vora_jax.types import UserError
from vora_jax.vision.patch_embed import PatchEmbed
from vora_jax.vision.vit import Vit

Config = Mapping[str, Any]
_PATCHES, _TABLE = 'patchifier.proj.weight', 'pos_embed'
_LINEAR = re.compile(r'llm\.model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)\.(bias|lora_A\.weight)')
_TEACHER, _HEAD = 'aux_vision.aux_model.', 'aux_vision.aux_layer_'
_TRUNK = f'{_TEACHER}trunk.blocks.'
_NOT_NEEDED = 'distillation heads and teacher, which only unmerged checkpoints with both can use'


def read_vora(config: Config, tensors: Shapes, preprocessor: Config | None, teacher_heads: int | None,
              where: str) -> tuple[str, dict[str, Any], Table, str]:
    """(stage, arguments of `variants.vora`, table of names, family of the language model).

    Unmerged adapters make it `pretrain`, otherwise it is `finetune`; the released code's quirks are on. What the tensors
    show (ranks, adapted layers, biases, position table, teacher) is read from them, not from the configuration.

    Raises:
        UserError: names what is not supported.
    """
    if config.get('vision_attention_mask', 'bidirectional') != 'bidirectional':
        raise UserError(f'{where}: vision_attention_mask {config["vision_attention_mask"]!r} is not supported, only '
                        '\'bidirectional\'.')
    family = _llm_family(config, tensors)
    llm = llm_from_config(config, where, family)
    pixels = pixels_of(preprocessor, where)
    embed = _patch_embed('vision_embedding.', tensors, where, llm.norm_eps, config, pixels)
    embed = PatchEmbed(**embed, positions='first_rows' if f'vision_embedding.{_TABLE}' in tensors else 'sincos')
    lora, biases = _adapted(tensors, 'lora_A.weight'), _adapted(tensors, 'bias')
    biases = {linear: layers for linear, layers in biases.items() if linear not in llm.biases}
    seen = lora or biases
    recipe = config.get('lora') or {}
    num_layers = min(max(map(max, seen.values())) + 1 if seen else recipe.get('layers') or 24, llm.num_layers)
    targets = tuple(linear for linear in LINEARS if linear in lora or not lora and (not biases or linear in biases)
                    or not lora and linear in llm.biases)
    arguments = {'llm': llm, 'patch_embed': embed, 'scale': 1.0, 'num_adapted_layers': num_layers, 'targets': targets,
                 'pairing': 'input_to_output', 'head_eps': 1e-5, 'extra_biases': bool(biases), 'join_adjacent_images': True}
    if lora:
        arguments['rank'] = next(shape[0] for name, shape in tensors.items() if name.endswith('.lora_A.weight'))
    has_teacher = any(name.startswith(_TRUNK) for name in tensors) and any(name.startswith(_HEAD) for name in tensors)
    if lora and has_teacher:
        return 'pretrain', arguments | {'teacher': _teacher(config, tensors, pixels, teacher_heads, where)}, VORA, family
    # The checkpoint no longer has a teacher, but the method asks for one: a stand-in, of which nothing is built.
    arguments |= {'teacher': Vit(embed, num_layers=1, mlp_width=1, num_heads=1), 'distill_weight': 0.0}
    table = VORA._replace(ignored=(*VORA.ignored, ('aux_vision.*', _NOT_NEEDED)))
    return 'pretrain' if lora else 'finetune', arguments, table, family


def _llm_family(config: Config, tensors: Shapes) -> str:
    """By what the last layer has, which is the least likely to be adapted."""
    last = f'llm.model.layers.{config.get("num_hidden_layers", 0) - 1}.self_attn.'
    if f'{last}q_norm.weight' in tensors:
        return 'qwen3'
    return 'llama' if f'{last}q_proj.weight' in tensors and f'{last}q_proj.bias' not in tensors else 'qwen2'


def _adapted(tensors: Shapes, part: str) -> dict[str, set[int]]:
    """{linear: layers of the language model whose linear has this part}."""
    found: dict[str, set[int]] = {}
    for name in tensors:
        if (match := _LINEAR.fullmatch(name)) and match[3] == part:
            found.setdefault(match[2], set()).add(int(match[1]))
    return found


def _patch_embed(prefix: str, tensors: Shapes, where: str, eps: float, config: Config,
                 pixels: dict[str, Any]) -> dict[str, Any]:
    """Sizes of a patch embedding, from its tensors."""
    kernel, table = tensors.get(prefix + _PATCHES), tensors.get(prefix + _TABLE)
    if kernel is None or len(kernel) != 4:
        raise UserError(f'{where} is of a VoRA model, but there is no tensor {prefix}{_PATCHES}; is a file of '
                        'weights missing?')
    width, _, side, _ = kernel
    rows = math.isqrt(table[1]) if table is not None else config.get('image_size', 448) // side
    if table is not None and rows * rows != table[1]:
        raise UserError(f'{where}: {prefix}{_TABLE} has {table[1]} positions, which are no square grid.')
    return {'patch_size': side, 'width': width, 'table_rows': rows, 'table_cols': rows, 'norm_eps': eps, **pixels}


def _teacher(config: Config, tensors: Shapes, pixels: dict[str, Any], heads: int | None, where: str) -> Vit:
    """The AIMv2 of the checkpoint; its own configuration, which says how many heads it has, stands elsewhere."""
    if f'{_TEACHER}preprocessor.{_PATCHES}' not in tensors:
        raise UserError(f'{where}: only AIMv2 is supported as a teacher; to import without it, remove the tensors '
                        f'{_TEACHER}*.')
    own = config.get('aux_vision') if isinstance(config.get('aux_vision'), Mapping) else {}
    eps = float(own.get('rms_norm_eps', 1e-5))
    embed = _patch_embed(f'{_TEACHER}preprocessor.', tensors, where, eps, config, pixels)
    heads = heads or own.get('num_attention_heads')
    if heads is None and embed['width'] % 128:
        raise UserError(f'{where} does not tell how many attention heads the teacher has, and at width {embed["width"]} '
                        'they cannot be guessed; give their number.')
    heads = heads or embed['width'] // 128
    # Like the student, the released encoder gives a smaller picture the first entries of its table.
    positions = 'first_rows' if f'{_TEACHER}preprocessor.{_TABLE}' in tensors else 'sincos'
    layers = {int(name[len(_TRUNK):].partition('.')[0]) for name in tensors if name.startswith(_TRUNK)}
    mlp_width = tensors.get(f'{_TRUNK}0.mlp.fc1.weight', (4096,))[0]
    biases = [linear for name, linears in (('attn.qkv', LINEARS[:3]), ('attn.proj', LINEARS[3:4]), ('mlp.fc1', LINEARS[4:5]),
                                           ('mlp.fc3', LINEARS[5:6]), ('mlp.fc2', LINEARS[6:]))
              for linear in linears if f'{_TRUNK}0.{name}.bias' in tensors]
    return Vit(PatchEmbed(**embed, positions=positions), max(layers) + 1, mlp_width, heads, eps, biases=tuple(biases))
