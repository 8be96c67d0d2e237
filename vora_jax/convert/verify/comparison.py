"""Compares a model with its exported folder."""
import dataclasses
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from vora_jax.batch import Batch
from vora_jax.convert.adapters.compare import compare_adapters
from vora_jax.convert.export.exportable import cast
from vora_jax.convert.export.layouts import ADAPTERS, MERGED, plan_of, select
from vora_jax.convert.export.plan import Plan, Request
from vora_jax.convert.export.to_hf import is_export, read_record
from vora_jax.convert.families.own_layout import Prompting
from vora_jax.convert.verify.distillation import compare_distillation
from vora_jax.convert.verify.encoder import compare_features
from vora_jax.convert.verify.prompts import compare_prompts
from vora_jax.convert.verify.reimport import compare_reimport
from vora_jax.convert.verify.tensors import Comparison, compare_tensors
from vora_jax.convert.verify.torch_side import (
    Question,
    from_pretrained,
    import_torch,
    open_tokenizer,
    open_torch,
)
from vora_jax.merge import has_low_rank
from vora_jax.method import VisionTokenRule
from vora_jax.params import unflatten
from vora_jax.types import Params, UserError

__all__ = ['Comparison', 'Question', 'load_folder', 'verify']


def verify(params: Params, model: Any, folder: str, questions: Sequence[Question], batches: Iterable[Batch], *,
           eos_id: int, rule: VisionTokenRule | None = None, prompting: Prompting | None = None, teacher: str = '',
           max_new_tokens: int = 16, tolerance: float = 1e-3) -> Comparison:
    """Compares every tensor, then loads the folder as its users do and compares token ids, logits and greedy answers.

    A fold on export is folded again. Both sides compute in float32 with the exported weights, so an export in bfloat16 is
    held to the same tolerance. Tensors need no torch; the layout `vora` runs in JAX, imported again.

    Args:
        params, model: the checkpoint.
        folder: its export.
        questions: prompts for the folder's own tokenizer, template and picture code.
        batches: the same prompts as rows of the training code, in the same order; surplus rows are left out.
        eos_id: id that ends an answer.
        rule, prompting: as `export` takes them.
        teacher: Hugging Face folder of the teacher that the checkpoint distils from; compares losses too.
        max_new_tokens: length of the compared answers.
        tolerance: largest accepted difference of a logit.

    Raises:
        UserError: the folder is not an export, or torch cannot load it, or the checkpoint has no such layout.
    """
    path, record = pathlib.Path(folder), read_record(pathlib.Path(folder))
    if record['layout'] == ADAPTERS:
        return compare_adapters(params, model, path, record)
    layout, found = record['layout'], Comparison(record['layout'], record['dtype'])
    merge = record['merged'] and layout not in MERGED and _has_adapters(model)
    what, _ = select(params, model, layout, merge)
    prompting = prompting or Prompting('', eos_id)
    plan = plan_of(Request(what, found.dtype, prompting, rule, record['image_token_id'], record['base'],
                           str(path.absolute())), layout)
    exported, fits = compare_tensors(plan, found.dtype, path, found)
    if not fits:
        found.left_out.append('logits were not compared, because the folder holds another model')
        return found
    exported = unflatten(cast(exported, 'float32'))
    if layout == 'encoder':
        if _torch_is_there(found):
            compare_features(plan.model, exported, path, found)
        return found
    reference = plan.model.clone(llm=dataclasses.replace(plan.model.llm, activation_dtype='float32'))
    if layout == 'vora':
        compare_reimport(reference, exported, path, batches, len(questions), tolerance, found)
    elif layout == 'peft' and record['base']:
        found.left_out.append(f'logits were not compared, because the base is {record["base"]}')
    elif _torch_is_there(found):
        side = open_torch(path, layout, plan.model.vision is not None)
        batches = list(batches)
        asked, rows = _askable(plan, layout, list(questions), batches, found)
        if _reads_other_rows(plan.model):
            found.left_out.append("batches of several prompts: with ModalityMixture.route_by = 'first_row' an answer "
                                  'depends on the first prompt of its batch; here each prompt is a batch of its own')
            asked, rows = _some(asked, rows, range(len(asked)))
        compare_prompts(reference, exported, rows, side, asked, eos_id=eos_id, max_new_tokens=max_new_tokens,
                        tolerance=tolerance, stock_pixels=layout == 'llava',
                        same_pictures=prompting.image_kind != 'native', found=found)
        if teacher and layout == 'own' and found.dtype == what.dtype:
            every = _some(list(questions), batches, range(len(questions)))
            compare_distillation(params, model, side, teacher, *every, found)
    if teacher and (layout != 'own' or found.dtype != what.dtype):
        found.left_out.append('distillation losses are compared for the layout `own` in the checkpoint\'s dtype only')
    return found


def load_folder(folder: str) -> tuple[Any, Any]:
    """(model, tokenizer) of an export in our own layout, by `from_pretrained`; every weight must come from the folder.

    Raises:
        UserError: torch is missing, or the folder is not an export or does not hold exactly the model's tensors.
    """
    _, transformers = import_torch()
    if not is_export(pathlib.Path(folder)):
        raise UserError(f'{folder} is not a folder that `vora export` wrote; export the checkpoint first.')
    model = from_pretrained(transformers.AutoModelForCausalLM, folder, trust_remote_code=True)
    return model, open_tokenizer(transformers.AutoTokenizer, folder, trust_remote_code=True)


def _has_adapters(model: Any) -> bool:
    return any(map(has_low_rank, getattr(model, 'groups', ())))


def _reads_other_rows(model: Any) -> bool:
    tables = [group.mixtures for group in model.groups] + [getattr(model.vision, 'mixtures', ())]
    return any(mixture.route_by == 'first_row' for table in tables for _, mixture in table)


def _torch_is_there(found: Comparison) -> bool:
    try:
        import_torch()
    except UserError as error:
        found.left_out.append(f'only tensors were compared: {error}')
        return False
    return True


def _askable(plan: Plan, layout: str, questions: list[Question], batches: Iterable[Batch],
             found: Comparison) -> tuple[list[Question], Iterable[Batch]]:
    """The questions that the folder's own processor cuts into as many patches as ours, and rows for them."""
    if layout == 'llm':
        blind = [index for index, question in enumerate(questions) if not question.images]
        if len(blind) < len(questions):
            found.left_out.append(f'{len(questions) - len(blind)} prompts with pictures: this layout cannot see')
        return _some(questions, batches, blind)
    if layout != 'llava':
        return questions, batches
    embed, batches = plan.model.vision.patch_embed, list(batches)
    grids = [batch.patches.grid[row] for batch in batches for row in range(len(batch.tokens))]
    fitting = [index for index, question in enumerate(questions)
               if all(tuple(grid) == (embed.table_rows, embed.table_cols) for grid in grids[index] if grid.any())]
    if len(fitting) < len(questions):
        side = embed.table_rows * embed.patch_size
        found.left_out.append(f'{len(questions) - len(fitting)} prompts with pictures that are not {side} x {side} pixels, '
                              'to which the stock processor brings all')
    return _some(questions, batches, fitting)


def _some(questions: list[Question], batches: Iterable[Batch], chosen: Iterable[int]) -> tuple[list[Question], list[Batch]]:
    """Some of the questions, with their rows as batches of one."""
    rows = [(batch, row) for batch in batches for row in range(len(batch.tokens))]
    chosen = list(chosen)
    return [questions[index] for index in chosen], [_row(*rows[index]) for index in chosen]


def _row(batch: Batch, row: int) -> Batch:
    """A batch of one of its rows."""
    def cut(leaf):
        return None if leaf is None else np.asarray(leaf)[row:row + 1]
    patches = batch.patches and type(batch.patches)(*map(cut, batch.patches))
    return type(batch)(*(patches if name == 'patches' else cut(leaf) for name, leaf in zip(batch._fields, batch)))
