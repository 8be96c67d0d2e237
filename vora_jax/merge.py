"""Folds adapters into kernels, model and parameters together."""
import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from vora_jax.model import VisionLanguageModel
from vora_jax.nn.adapters import Adapter, DualLowRank, LowRank, ModalityKernel
from vora_jax.nn.stack import LayerGroup, join_groups
from vora_jax.params import flatten, regroup, unflatten
from vora_jax.types import Params, UserError


class Fold(NamedTuple):
    """How the adapters of one linear become its kernel, and at most one kernel for vision slots.

    base: numbers of the adapters added to the layer's kernel.
    vision: None where vision slots share it; else (number of the `ModalityKernel` that theirs starts from, None for the
        layer's own; numbers of the adapters added to it).
    """

    base: tuple[int, ...]
    vision: tuple[int | None, tuple[int, ...]] | None

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        """What stays on the linear."""
        return () if self.vision is None else (ModalityKernel(),)


def plan_fold(adapters: Sequence[Adapter]) -> Fold:
    """The fold of a linear's adapters: `LowRank` of scope all and vision, and `ModalityKernel` of scope vision.

    Raises:
        UserError: an adapter that no kernel can express.
    """
    base, vision = (), None
    for number, adapter in enumerate(adapters):
        if isinstance(adapter, DualLowRank):
            raise UserError('merge: a DualLowRank multiplies its channels by factors that depend on the slot, so no kernel '
                            'equals it; export the model unmerged.')
        if adapter.scope == 'text':
            raise UserError("merge: an adapter of scope 'text' cannot be folded into a kernel that other slots share; "
                            "train with scope 'all' or 'vision', or export the model unmerged.")
        if isinstance(adapter, ModalityKernel):
            vision = number, ()
        elif adapter.scope == 'vision':
            start, added = vision or (None, base)
            vision = start, (*added, number)
        else:
            base = *base, number
            vision = vision and (vision[0], (*vision[1], number))
    return Fold(base, vision)


def merge(params: Params, model: VisionLanguageModel) -> tuple[Params, VisionLanguageModel]:
    """(params, model) that compute the same hidden states with as few adapters as can be, without heads or teacher.

    Folds in f32: every adapted kernel becomes `kernel + fold`, kept in f32; what acts on vision slots only becomes a
    `ModalityKernel`. Groups that no longer differ become one.

    Raises:
        UserError: nothing to merge, or an adapter that no kernel can express.
    """
    raise_if_unmergeable(model)
    flat = flatten(params)
    for index, group in enumerate(model.groups):
        for linear, adapters in group.adapters:
            base = f'decoder/layers/group_{index}/block/{linear}/'
            branches = [{path[len(prefix):]: flat.pop(path) for path in list(flat) if path.startswith(prefix)}
                        for prefix in (f'{base}adapter_{number}/' for number in range(len(adapters)))]
            fold = plan_fold(adapters)

            def summed(kernel, numbers, adapters=adapters, branches=branches):
                for number in numbers:
                    kernel = adapters[number].fold(kernel, branches[number])
                return kernel

            if fold.vision is not None:
                start, added = fold.vision
                own = {name: flat[base + name] for name in ('kernel', 'bias') if base + name in flat}
                own = own if start is None else branches[start]
                flat |= {f'{base}adapter_0/{name}': leaf for name, leaf in own.items()}
                flat[f'{base}adapter_0/kernel'] = summed(own['kernel'], added)
            flat[f'{base}kernel'] = summed(flat[f'{base}kernel'], fold.base)
    flat = {path: leaf for path, leaf in flat.items()
            if not path.startswith('teacher/') and '/side/' not in path}
    merged = merged_model(model)
    return regroup(unflatten(flat), [group.num_layers for group in merged.groups]), merged


def raise_if_unmergeable(model: VisionLanguageModel) -> None:
    """Raises UserError, saying why, where `merge` cannot fold the model."""
    if not isinstance(model, VisionLanguageModel):
        raise UserError(f'merge: a {type(model).__name__} has no adapters; merge a checkpoint of a stage that trained some.')
    if any(group.mixtures for group in model.groups):
        raise UserError('merge: a ModalityMixture weighs its paths by the modality of each segment, so no kernel equals it; '
                        'export the model unmerged.')
    if any(group.prompts for group in model.groups):
        raise UserError('merge: GatedPrompts are keys and values beside the kernels, so no kernel equals them; export '
                        'the model unmerged.')
    if not any(low_rank(group) or group.side for group in model.groups) and model.distillation is None:
        raise UserError('merge: this checkpoint has no adapters that can be folded and no distillation heads; there is '
                        'nothing to merge.')
    for group in model.groups:
        for _, adapters in group.adapters:
            plan_fold(adapters)


def merged_model(model: VisionLanguageModel) -> VisionLanguageModel:
    """The model that `merge` gives: the same decoder and front end, without distillation and what can be folded.

    Adapters that cannot be folded stay: then it is the model of a stage that trains on with them.
    """
    def merged(group: LayerGroup) -> LayerGroup:
        table = []
        for linear, adapters in group.adapters:
            try:
                adapters = plan_fold(adapters).adapters
            except UserError:
                pass
            if adapters:
                table.append((linear, adapters))
        return dataclasses.replace(group, adapters=tuple(table), side=False)

    return model.clone(groups=join_groups(merged(group) for group in model.groups), distillation=None)


def low_rank(group: LayerGroup) -> bool:
    """Whether a group has adapters that `merge` would fold, or refuse."""
    return any(isinstance(adapter, (LowRank, DualLowRank)) for _, adapters in group.adapters for adapter in adapters)
