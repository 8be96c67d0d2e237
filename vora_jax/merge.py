"""Folds adapters into kernels, model and parameters together."""
import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

from vora_jax.model import VisionLanguageModel
from vora_jax.nn.adapters import Adapter, DualLowRank, LowRank, ModalityKernel
from vora_jax.nn.stack import LayerGroup, join_groups
from vora_jax.params import Flat, flatten, regroup, unflatten
from vora_jax.types import Array, Params, UserError

Terms = tuple[tuple[LowRank, Flat], ...]  # adapters and their parameters


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
                            'equals it; export the model unmerged (layout `own`).')
        if adapter.scope == 'text':
            raise UserError("merge: an adapter of scope 'text' cannot be folded into a kernel that other slots share; "
                            "train with scope 'all' or 'vision', or export the model unmerged (layout `own`).")
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

    def added(kernel, terms):
        for adapter, branch in terms:
            kernel = adapter.fold(kernel, branch)
        return kernel

    flat, _ = fold_adapters(flatten(params), model.groups, added)
    flat = {path: leaf for path, leaf in flat.items()
            if not path.startswith('teacher/') and '/side/' not in path}
    merged = merged_model(model)
    return regroup(unflatten(flat), [group.num_layers for group in merged.groups]), merged


def fold_adapters(flat: Flat, groups: Sequence[LayerGroup],
                  added: Callable[[Array, Terms], Array]) -> tuple[Flat, tuple[LayerGroup, ...]]:
    """(parameters, groups) of the same layers with their adapters folded as `plan_fold` says.

    Args:
        flat: of the whole model.
        added: gives a kernel plus the products of some adapters; called where there are any.

    Raises:
        UserError: something that no kernel can express.
    """
    flat, folded = dict(flat), []
    for index, group in enumerate(groups):
        raise_if_unfoldable(group)
        table = []
        for linear, adapters in group.adapters:
            base, fold = f'decoder/layers/group_{index}/block/{linear}/', plan_fold(adapters)
            terms = [(adapter, _pop(flat, f'{base}adapter_{number}/')) for number, adapter in enumerate(adapters)]

            def summed(kernel, numbers, terms=terms):
                return added(kernel, tuple(terms[number] for number in numbers)) if numbers else kernel

            if fold.vision is not None:
                start, numbers = fold.vision
                own = {name: flat[base + name] for name in ('kernel', 'bias') if base + name in flat}
                own = own if start is None else terms[start][1]
                flat |= {f'{base}adapter_0/{name}': leaf for name, leaf in own.items()}
                flat[f'{base}adapter_0/kernel'] = summed(own['kernel'], numbers)
                table.append((linear, fold.adapters))
            flat[f'{base}kernel'] = summed(flat[f'{base}kernel'], fold.base)
        folded.append(dataclasses.replace(group, adapters=tuple(table)))
    return flat, tuple(folded)


def raise_if_unmergeable(model: VisionLanguageModel) -> None:
    """Raises UserError, saying why, where `merge` cannot fold the model."""
    if not isinstance(model, VisionLanguageModel):
        raise UserError(f'merge: a {type(model).__name__} has no adapters; merge a checkpoint of a stage that trained some.')
    for group in model.groups:
        raise_if_unfoldable(group)
    if not any(has_low_rank(group) or group.side for group in model.groups) and model.distillation is None:
        raise UserError('merge: this checkpoint has no adapters that can be folded and no distillation heads; there is '
                        'nothing to merge.')


def raise_if_unfoldable(group: LayerGroup) -> None:
    """Raises UserError, saying why, where something in these layers fits into no kernel."""
    if group.mixtures:
        raise UserError('merge: a ModalityMixture weighs its paths by the modality of each segment, so no kernel equals it; '
                        'export the model unmerged (layout `own`).')
    if group.prompts:
        raise UserError('merge: GatedPrompts are keys and values beside the kernels, so no kernel equals them; export '
                        'the model unmerged (layout `own`).')
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


def has_low_rank(group: LayerGroup) -> bool:
    """Whether a group has adapters that `merge` would fold, or refuse."""
    return any(isinstance(adapter, (LowRank, DualLowRank)) for _, adapters in group.adapters for adapter in adapters)


def _pop(flat: Flat, prefix: str) -> Flat:
    return {path[len(prefix):]: flat.pop(path) for path in list(flat) if path.startswith(prefix)}
