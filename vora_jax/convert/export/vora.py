"""VoRA's official layout: names and config.json.

github.com/Hon-Wong/VoRA at f138756. Its seven .py files are not ours to ship: the model card says where they are.
"""
import dataclasses
import math

from vora_jax.convert.export.encoder import preprocessor, refuse_pictures
from vora_jax.convert.export.exportable import Exportable, parameter_shapes
from vora_jax.convert.export.lazy_arrays import scaled, zeros
from vora_jax.convert.export.llm import generation
from vora_jax.convert.export.plan import Part, Plan, Request
from vora_jax.convert.families.hf_config import llm_to_config
from vora_jax.convert.names.tables import VORA
from vora_jax.convert.names.tables.decoder import LINEAR_NAMES
from vora_jax.merge import merged_model
from vora_jax.nn.adapters import LowRank
from vora_jax.nn.block import LINEARS
from vora_jax.nn.stack import LayerGroup, join_groups
from vora_jax.types import UserError
from vora_jax.vision.patch_frontend import PatchFrontend

CODE_FILES = ('modeling_vora.py', 'configuration_vora.py', 'attention_mask.py', 'aux_vision.py', 'lora.py',
              'vision_embedding.py', 'vora_generation_utils.py')
CODE = (f'Copy {", ".join(CODE_FILES)} and generation_files/processing_vora.py from a VoRA release '
        '(github.com/Hon-Wong/VoRA) into this folder; they are not shipped here. They run with transformers 4.50 and 4.51.')
USAGE = """\
from transformers import AutoModelForCausalLM, AutoProcessor

# The model first: the processor needs its code.
model = AutoModelForCausalLM.from_pretrained('.', trust_remote_code=True)
processor = AutoProcessor.from_pretrained('.', trust_remote_code=True)
chat = [{'role': 'user', 'content': [{'type': 'image', 'url': 'picture.png'}, {'type': 'text', 'text': '<image> Question'}]}]
inputs = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True,
                                       return_tensors='pt')
print(model.generate(inputs, max_new_tokens=64, eos_token_id=processor.tokenizer.eos_token_id))
"""
_QUIRK_EPS = 1e-5  # of the norms of its distillation heads


def plan(request: Request) -> Plan:
    """VoRA's names; distillation heads and teacher where the request has them.

    Raises:
        UserError: VoRA's code has no place for a part of the model.
    """
    what, model = request.what, request.what.model
    if not isinstance(model.vision, PatchFrontend):
        raise UserError('export: the layout `vora` needs a model that reads patches without an encoder; '
                        f'take {"`llava` or `own`" if model.vision else "`llm`"}.')
    embed, llm = model.vision.patch_embed, model.llm
    plain = embed.norm and embed.bias and not embed.cls_token
    if not plain or embed.table_rows != embed.table_cols or embed.positions == 'sincos':
        raise UserError('export: VoRA\'s code has only a patch embedding with bias, norm, a square table of positions and '
                        'no [cls]; take the layout `own`.')
    refuse_pictures(request.prompting, 'VoRA\'s processor')
    what, lora, notes = _with_lora(what)
    notes += _differences(request)
    if not request.base:
        notes.append('config.json names no base model: set `llm` to a folder or hub id of the base language model, which '
                     'VoRA\'s code loads first (or export with --base NAME).')
    config = {key: value for key, value in llm_to_config(llm, request.dtype).items()
              if key not in ('architectures', 'model_type')}
    config |= request.token_ids | {
        'architectures': ['VoRAForCausalLM'], 'model_type': 'vora',
        'auto_map': {'AutoConfig': 'configuration_vora.VoRAConfig', 'AutoModelForCausalLM': 'modeling_vora.VoRAForCausalLM'},
        'llm': request.base, 'aux_vision': '', 'skip_aux_cls': False, 'reuse_aux_vision_embedding_layers': '', 'lora': lora,
        'image_size': embed.table_rows * embed.patch_size, 'patch_size': embed.patch_size,
        'vision_embedding': 'AIMv2Embedding', 'vision_embedding_intermediate_size': embed.width,
        'vision_attention_mask': 'default' if request.rule and not request.rule.bidirectional else 'bidirectional',
        'rms_norm_eps': llm.norm_eps}
    if model.distillation is not None:
        notes += _teacher_notes(what)
    picture = preprocessor(embed) | {'processor_class': 'VoRAProcessor', 'auto_map': {
        'AutoProcessor': 'processing_vora.VoRAProcessor'}}
    files = {'config.json': config, 'generation_config.json': generation(request), 'preprocessor_config.json': picture}
    return Plan({'': Part(VORA, what.params, what.shapes, files)}, what.model, USAGE, (CODE, *notes))


def _with_lora(what: Exportable) -> tuple[Exportable, dict, list[str]]:
    """(the model with the biases that VoRA's adapted linears have, config.json's `lora`, notes)."""
    model, notes = what.model, []
    layers = [group for group in model.groups for _ in range(group.num_layers)]
    if any(group.mixtures or group.prompts for group in layers) or model.route_token:
        raise UserError('export: VoRA\'s code has no mixtures routed by modality and no gated prompts; take the layout '
                        '`own`.')
    is_special = [bool(group.adapters or group.biases) for group in layers]
    count = sum(is_special)
    if not count:
        return what, {}, notes
    first = layers[0]
    biases = tuple(name for name in LINEARS if name not in model.llm.biases)
    alike = all((group.adapters, group.biases) == (first.adapters, first.biases) for group in layers[:count])
    if not all(is_special[:count]) or not alike:
        raise UserError('export: VoRA\'s code adapts the first N layers, all alike; take the layout `own`, or pass '
                        '--merge.')
    recipe = {'layers': count, 'r': -1, 'target_modules': [LINEAR_NAMES[linear] for linear in LINEARS]}
    if not first.adapters:
        if {*first.biases} != {*biases}:
            raise UserError(f'export: VoRA\'s code has a bias on each of {", ".join(biases)}, this model on '
                            f'{", ".join(first.biases)} only; take the layout `own`.')
        return what, recipe, notes
    tables = {adapters for _, adapters in first.adapters}
    adapter = first.adapters[0][1][0]
    alike = len(tables) == 1 and len(first.adapters) == len(LINEARS) and len(first.adapters[0][1]) == 1
    if not alike or not isinstance(adapter, LowRank) or adapter.scope != 'all':
        or_merged = '' if any(group.adapters for group in merged_model(model).groups) else ', or pass --merge'
        raise UserError('export: VoRA\'s code has one LowRank adapter of scope \'all\' on each of the seven linears; take '
                        f'the layout `own`{or_merged}.')
    params = dict(what.params)
    for path, leaf in what.params.items():
        if path.endswith('/adapter_0/b'):
            params[path] = scaled(leaf, adapter.scale)
    if math.frexp(abs(adapter.scale))[0] != 0.5:
        notes.append(f'The adapters\' scale {adapter.scale:g} is multiplied into their second matrix, which is rounded.')
    if not first.biases:
        notes.append('VoRA\'s code gives each adapted linear a bias; they are zero.')
    table = tuple((linear, (dataclasses.replace(adapter, scale=1.0),)) for linear, _ in first.adapters)
    groups = join_groups(LayerGroup(1, table if group.adapters else (), group.side, biases if group.adapters else ())
                         for group in layers)
    if [group.num_layers for group in groups] != [group.num_layers for group in model.groups]:
        raise ValueError('export_vora: the groups were cut in another way')
    model = model.clone(groups=groups)
    shapes = parameter_shapes(model)
    for path, shape in shapes.items():
        if path not in params:
            params[path] = zeros(shape, what.params[path.replace('/bias', '/kernel')].dtype)
    return what._replace(model=model, params=params, shapes=shapes), recipe | {'r': adapter.rank}, notes


def _differences(request: Request) -> list[str]:
    """What VoRA's code will compute in another way."""
    model, rule, prompting, notes = request.what.model, request.rule, request.prompting, []
    embed = model.vision.patch_embed
    side = embed.table_rows * embed.patch_size
    if embed.positions != 'first_rows' and (prompting.image_kind == 'native' or prompting.side != side):
        notes.append(f'Pictures of other sizes than {side} x {side}: this model samples its positions ({embed.positions}), '
                     'VoRA\'s code takes the first rows of the table.')
    if embed.norm_eps != model.llm.norm_eps:
        notes.append(f'The norm of the patch embedding has epsilon {embed.norm_eps:g}; VoRA\'s code takes the language '
                     f'model\'s {model.llm.norm_eps:g}.')
    if rule is not None and not rule.join_adjacent:
        notes.append('Pictures with no text between them: VoRA\'s code lets them see each other, this model does not.')
    if prompting.image_kind != 'square_crop' or prompting.side != side:
        notes.append(f'preprocessor_config.json cuts a square of {side} x {side} pixels out of every picture; this model '
                     f'was run on pictures of the kind {prompting.image_kind!r}.')
    return notes


def _teacher_notes(what: Exportable) -> list[str]:
    distillation = what.model.distillation
    notes = ['The distillation heads and the teacher are in the weights; `aux_vision` in config.json is empty, so that '
             'VoRA\'s code leaves them out. Set it to the teacher\'s folder to train on.']
    if distillation.pairing != 'input_to_output' or distillation.layers != distillation.blocks:
        notes.append(f'Heads were trained with pairing {distillation.pairing!r} and layers {distillation.layers}; VoRA\'s '
                     'code pairs the state entering layer i with block i.')
    if distillation.head_eps != _QUIRK_EPS:
        notes.append(f'The heads\' norms have epsilon {distillation.head_eps:g}; VoRA\'s code takes {_QUIRK_EPS:g}.')
    return notes
