"""An exported folder's tensors against the checkpoint's."""
import dataclasses
import pathlib
from typing import Any

import numpy as np

from vora_jax.convert.export.foreign_stream import stream
from vora_jax.convert.export.plan import Plan
from vora_jax.convert.files.safetensors_files import Folder, open_folder
from vora_jax.convert.names.mismatch import name_list
from vora_jax.convert.names.name_map import from_foreign
from vora_jax.types import Array


@dataclasses.dataclass
class Comparison:
    """What `verify` found.

    layout: of the folder.    dtype: of the exported weights.    tensors: compared bit for bit.
    worst_tensor, max_abs_tensor_diff: the tensor that differs most; '' where none does.
    num_prompts: prompts compared.    max_abs_logit_diff: over all slots of all prompts, both sides in float32.
    same_answers: prompts with equal greedy answers.    near_ties: others where the two best logits lay within `TIE`.
    gaps: one sentence for each of those.    worst: the prompt with the largest difference.
    max_abs_feature_diff: of an encoder's blocks.    distill_losses: (layer, ours, torch's) of each distilled layer.
    left_out: sentences on what was not compared, and why.
    problems: a sentence for each thing that is not equal; empty where the folder passes.
    """

    layout: str = ''
    dtype: str = ''
    tensors: int = 0
    worst_tensor: str = ''
    max_abs_tensor_diff: float = 0.0
    num_prompts: int = 0
    max_abs_logit_diff: float = 0.0
    same_answers: int = 0
    near_ties: int = 0
    gaps: list[str] = dataclasses.field(default_factory=list)
    worst: str = ''
    max_abs_feature_diff: float | None = None
    distill_losses: list[tuple[int, float, float]] = dataclasses.field(default_factory=list)
    left_out: list[str] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)


def compare_tensors(plan: Plan, dtype: str, folder: pathlib.Path, found: Comparison,
                    keep: bool = True) -> tuple[dict[str, Array], bool]:
    """({our path: array} of the whole model as exported, whether the folder has its names, dtypes and shapes).

    Reads the folder with our own reader: no torch is needed. One tensor of each side is in memory at a time, unless
    `keep` asks for the parameters.
    """
    params, fits = {}, True
    for place, part in plan.parts.items():
        kept = {}
        with open_folder(folder / place) as there:
            where, lacking, different = f'{place}/' if place else '', [], []
            unused = set(there.tensors)
            for name, array in stream(part, dtype):
                found.tensors += 1
                unused.discard(name)
                problem = _difference(array, name, there)
                if problem == 'lacking':
                    lacking.append(where + name)
                elif problem is not None:
                    different.append(where + name)
                    _note_worst(found, where + name, problem)
                    fits = fits and problem != 'form'
                if keep:
                    kept[name] = np.array(array)
        for names, kind in ((lacking, 'are not in the folder'), ([where + name for name in sorted(unused)],
                                                                 'are not in the checkpoint'), (different, 'differ')):
            if names:
                found.problems.append(f'tensors that {kind} ({len(names)}): {name_list(names)}')
        fits = fits and not lacking and not unused
        if keep:
            params |= from_foreign(kept, part.shapes, part.table)
    return params, fits


def _difference(array: np.ndarray, name: str, there: Folder) -> Any:
    """None where both are equal; 'lacking', 'form' (another dtype or shape), or the largest difference."""
    if name not in there.tensors:
        return 'lacking'
    info = there.tensors[name]
    if tuple(info.shape) != array.shape or info.dtype != array.dtype:
        return 'form'
    other = there.read(name)
    if np.array_equal(array.reshape(-1).view(np.uint8), other.reshape(-1).view(np.uint8)):
        return None
    return float(np.max(np.abs(array.astype(np.float64) - other.astype(np.float64)), initial=0.0))


def _note_worst(found: Comparison, name: str, difference: Any) -> None:
    size = float('inf') if difference == 'form' or difference != difference else difference
    if not found.worst_tensor or size > found.max_abs_tensor_diff:
        found.worst_tensor, found.max_abs_tensor_diff = name, size
