"""Adapters as a PEFT folder beside their base."""
import dataclasses

from vora_jax.convert.export import llm as export_llm
from vora_jax.convert.export import own as export_own
from vora_jax.convert.export.exportable import Exportable
from vora_jax.convert.export.plan import Part, Plan, Request
from vora_jax.convert.names.layouts import TRANSPOSED
from vora_jax.convert.names.name_map import Row, Table
from vora_jax.convert.names.tables.decoder import BLOCK, LAYER, LINEAR_NAMES
from vora_jax.nn.adapters import LowRank
from vora_jax.types import UserError

BASE = 'base'
PEFT = Table(tuple(
    Row(f'{BLOCK}{linear}/adapter_0/{side}', f'base_model.model.{LAYER}{name}.lora_{side.upper()}.weight', TRANSPOSED)
    for linear, name in LINEAR_NAMES.items() for side in 'ab'))

USAGE = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained({base!r}{remote})
model, tokenizer = PeftModel.from_pretrained(base, '.'), AutoTokenizer.from_pretrained('.'{remote})
"""


def plan(request: Request) -> Plan:
    """LoRA adapters for `peft`, and in `base/` the model without them, unless `request.base` names it.

    Raises:
        UserError: there are no adapters, or PEFT cannot express them.
    """
    what, notes = request.what, []
    adapter, linears, layers = _recipe(what)
    sees = what.model.vision is not None
    if request.base and any(group.biases for group in what.model.groups):
        raise UserError('export: this model was trained with biases that its base does not have, so its adapters do not fit '
                        f'{request.base}; leave out --base, so that the base is written too.')
    if request.base and sees:
        notes.append(f'The front end is not in this folder: on {request.base} the adapters give a language model that '
                     'cannot see.')
    config = {
        'peft_type': 'LORA', 'task_type': 'CAUSAL_LM', 'r': adapter.rank, 'lora_alpha': adapter.scale * adapter.rank,
        'lora_dropout': adapter.dropout, 'bias': 'none', 'fan_in_fan_out': False, 'use_rslora': False, 'use_dora': False,
        'inference_mode': True, 'target_modules': linears, 'layers_to_transform': layers, 'layers_pattern': 'layers',
        'modules_to_save': None, 'base_model_name_or_path': request.base or f'{request.target}/{BASE}'}
    adapters = {path: leaf for path, leaf in what.params.items() if '/adapter_' in path}
    parts = {'': Part(PEFT, adapters, {path: what.shapes[path] for path in adapters}, {'adapter_config.json': config},
                      'adapter_model')}
    base = _without_adapters(what)
    written = (export_own if sees else export_llm).plan(request._replace(what=base))
    if not request.base:
        parts[BASE] = written.parts['']
    groups = tuple(dataclasses.replace(group, adapters=old.adapters)
                   for group, old in zip(written.model.groups, what.model.groups, strict=True))
    remote = ', trust_remote_code=True' if sees and not request.base else ''
    usage = USAGE.format(base=request.base or BASE, remote=remote)
    return Plan(parts, written.model.clone(groups=groups), usage, tuple(notes))


def _recipe(what: Exportable):
    """(the adapter, the names of its linears, the layers that have it)."""
    if any(group.mixtures or group.prompts for group in what.model.groups):
        raise UserError('export: a PEFT folder holds no mixtures routed by modality and no gated prompts; take the layout '
                        '`own`.')
    layers = [group.adapters for group in what.model.groups for _ in range(group.num_layers)]
    tables = {table for table in layers if table}
    if not tables:
        raise UserError('export: there are no adapters to write as a PEFT folder; take another layout.')
    adapters = {adapter for table in tables for _, many in table for adapter in many}
    if len(tables) > 1 or len(adapters) > 1 or any(len(many) > 1 for table in tables for _, many in table):
        raise UserError('export: a PEFT folder holds one adapter, the same on every linear it adapts; take the layout '
                        '`own`.')
    adapter, = adapters
    if not isinstance(adapter, LowRank):
        raise UserError(f'export: PEFT has no {type(adapter).__name__}; take the layout `own`.')
    if adapter.scope != 'all':
        raise UserError(f'export: PEFT\'s adapters act on all slots, these on those of scope {adapter.scope!r}; take the '
                        'layout `own`.')
    return adapter, [linear for linear, _ in next(iter(tables))], [i for i, table in enumerate(layers) if table]


def _without_adapters(what: Exportable) -> Exportable:
    groups = tuple(dataclasses.replace(group, adapters=()) for group in what.model.groups)
    params = {path: leaf for path, leaf in what.params.items() if '/adapter_' not in path}
    return what._replace(model=what.model.clone(groups=groups), params=params,
                         shapes={path: what.shapes[path] for path in params})
