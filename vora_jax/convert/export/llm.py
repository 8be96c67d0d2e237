"""The language model alone, as a stock one."""
import dataclasses
import pathlib

from vora_jax.convert.export.exportable import Exportable, parameter_shapes
from vora_jax.convert.export.lazy_arrays import zeros
from vora_jax.convert.export.plan import Part, Plan, Request
from vora_jax.convert.families.hf_config import llm_to_config
from vora_jax.convert.names.tables import DECODER
from vora_jax.nn.adapters import ModalityKernel
from vora_jax.nn.block import LINEARS
from vora_jax.types import UserError

ATTENTION, MLP = LINEARS[:4], LINEARS[4:]

USAGE = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained('{folder}'), AutoTokenizer.from_pretrained('{folder}')
chat = [{{'role': 'user', 'content': 'your question'}}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors='pt', return_dict=True)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))
"""


def plan(request: Request) -> Plan:
    """Stock Qwen2, Qwen3 or Llama, without adapters; what pictures alone pass is left out with them.

    Biases that only some layers have (VoRA's) make it a Llama with biases on all linears of attention or MLP, zero where
    a layer has none.

    Raises:
        UserError: the model has adapters, or no stock model has its parts.
    """
    if request.what.model.route_token:
        raise UserError('export: a stock language model has no ROUTE slot; take the layout `own`.')
    what = text_only(request.what)
    if what.has_adapters:
        raise UserError('export: a stock language model has no kernels of their own for some slots; take the layout `own`.')
    notes: list[str] = []
    # transformers 5 gives every Qwen2 the tokenizer of Qwen, whatever the folder holds.
    foreign = (_is_sentencepiece(request.prompting.tokenizer) and what.model.llm.biases == ATTENTION[:3]
               and not what.model.llm.qk_norm)
    what = with_equal_layers(what, ATTENTION if foreign else ())
    if foreign:
        notes.append('A Llama whose output projections have biases of zero, not a Qwen2: for that, transformers 5 would '
                     'ignore this tokenizer.')
    if request.what.model.vision is not None:
        notes.append('The language model alone: it reads text and cannot see.')
    if any(group.biases for group in request.what.model.groups):
        notes.append('Biases that only some layers were trained with are zero in the others; so the model is a Llama '
                     'with biases.')
    config = llm_to_config(what.model.llm, request.dtype) | request.token_ids
    part = Part(DECODER, what.params, what.shapes, {'config.json': config, 'generation_config.json': generation(request)})
    return Plan({'': part}, what.model, USAGE.format(folder='.'), tuple(notes))


def _is_sentencepiece(folder: str) -> bool:
    return (pathlib.Path(folder) / 'tokenizer.model').is_file() and not (pathlib.Path(folder) / 'tokenizer.json').is_file()


def generation(request: Request, **more) -> dict:
    """generation_config.json: greedy."""
    return {'do_sample': False, **request.token_ids, **more}


def text_only(what: Exportable) -> Exportable:
    """Without the front end, and without the kernels that only its slots have."""
    groups, unused = [], []
    for index, group in enumerate(what.model.groups):
        table = [(linear, adapters) for linear, adapters in group.adapters if adapters != (ModalityKernel('vision'),)]
        unused += [f'decoder/layers/group_{index}/block/{linear}/adapter_' for linear, adapters in group.adapters
                   if (linear, adapters) not in table]
        groups.append(dataclasses.replace(group, adapters=tuple(table)))
    params = {path: leaf for path, leaf in what.params.items()
              if path.startswith('decoder/') and not path.startswith(tuple(unused))}
    return what._replace(model=what.model.clone(vision=None, groups=tuple(groups)), params=params,
                         shapes={path: shape for path, shape in what.shapes.items() if path in params})


def with_equal_layers(what: Exportable, also: tuple[str, ...] = ()) -> Exportable:
    """The same function with the same biases in all layers, zero where there were none; `also` on these linears."""
    model = what.model
    if not also and not any(group.biases for group in model.groups):
        return what
    wanted = {*model.llm.biases, *also, *(name for group in model.groups for name in group.biases)}
    biases = tuple(name for kind in (ATTENTION, MLP) if wanted & {*kind} for name in kind)
    llm = dataclasses.replace(model.llm, biases=biases)
    model = model.clone(llm=llm, groups=tuple(dataclasses.replace(group, biases=()) for group in model.groups))
    shapes, params = parameter_shapes(model), dict(what.params)
    for path, shape in shapes.items():
        if path not in params:
            params[path] = zeros(shape, what.params[path.replace('/bias', '/kernel')].dtype)
    return what._replace(model=model, params=params, shapes=shapes)
