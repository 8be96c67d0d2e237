"""A folder without code of its own, imported again."""
import dataclasses
import json
import pathlib
from collections.abc import Iterable

import jax
import numpy as np

from vora_jax import variants
from vora_jax.batch import Batch
from vora_jax.convert.export.exportable import exportable, parameter_shapes
from vora_jax.convert.families.recognise import recognise
from vora_jax.convert.files.safetensors_files import open_folder
from vora_jax.convert.names.name_map import entries, from_foreign, match_names
from vora_jax.convert.verify.prompts import hidden_states
from vora_jax.convert.verify.tensors import Comparison
from vora_jax.model import VisionLanguageModel
from vora_jax.params import unflatten
from vora_jax.types import Params, UserError


def compare_reimport(model: VisionLanguageModel, params: Params, folder: pathlib.Path, batches: Iterable[Batch],
                     num_prompts: int, tolerance: float, found: Comparison) -> None:
    """Logits of the model that `vora import` makes of the folder, computed in JAX, against the checkpoint's."""
    teacher = None if model.distillation is None else model.distillation.teacher.num_heads
    again, theirs = _imported(folder, teacher)
    model, params = _undistilled(model, params)
    found.left_out.append('no torch code was run: VoRA\'s is not shipped, so logits are those of the folder imported again')
    for batch in batches:
        with jax.default_matmul_precision('highest'):
            ours = np.asarray(hidden_states(model, params, batch)) @ np.asarray(model.unembedding(params))
            other = np.asarray(hidden_states(again, theirs, batch)) @ np.asarray(again.unembedding(theirs))
        for row in range(min(len(ours), num_prompts - found.num_prompts)):
            real = np.asarray(batch.modality[row]) > 0
            difference = float(np.max(np.abs(ours[row][real] - other[row][real])))
            where = f'prompt {found.num_prompts + 1}'
            found.num_prompts += 1
            if not difference <= tolerance:
                found.problems.append(f'logits of {where} differ by {difference:.2e}, more than {tolerance:g}; README.md of '
                                      'the folder says what VoRA\'s code computes in another way')
            else:
                found.same_answers += bool((ours[row][real].argmax(-1) == other[row][real].argmax(-1)).all())
            if not found.worst or not difference <= found.max_abs_logit_diff:
                found.max_abs_logit_diff, found.worst = difference, where


def _imported(folder: pathlib.Path, teacher_heads: int | None) -> tuple[VisionLanguageModel, Params]:
    """(model, parameters in float32) as `vora import` makes them, without distillation."""
    try:
        config, picture = (json.loads((folder / name).read_text(encoding='utf-8'))
                           for name in ('config.json', 'preprocessor_config.json'))
    except (OSError, ValueError) as error:
        raise UserError(f'{folder}: config.json or preprocessor_config.json cannot be read ({error}); export the checkpoint '
                        'again.') from error
    with open_folder(folder) as there:
        given = {name: info.shape for name, info in there.tensors.items()}
        known = recognise(config, given, picture, teacher_heads=teacher_heads)
        model = getattr(variants, known.method)(**known.arguments).stage(known.stage).model
        shapes = parameter_shapes(model)
        names, _ = match_names(entries(shapes, known.table), given, known.table, str(folder))
        tensors = {name: there.read(name).astype(np.float32) for name in names.values()}
        params = unflatten(from_foreign(tensors, shapes, known.table, str(folder)))
    model = model.clone(llm=dataclasses.replace(model.llm, activation_dtype='float32'))
    return _undistilled(model, params)


def _undistilled(model: VisionLanguageModel, params: Params) -> tuple[VisionLanguageModel, Params]:
    what = exportable(params, model)
    return what.model, unflatten(what.params)
