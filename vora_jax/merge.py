"""Folds adapters into kernels, model and parameters together."""
from vora_jax.model import VisionLanguageModel
from vora_jax.nn.stack import LayerGroup, group_layers
from vora_jax.params import flatten, regroup, unflatten
from vora_jax.types import Params, UserError


def merge(params: Params, model: VisionLanguageModel) -> tuple[Params, VisionLanguageModel]:
    """(params, model) that compute the same hidden states without adapters, distillation heads or teacher.

    Folds in f32: every adapted kernel becomes `kernel + fold`, kept in f32. Groups that no longer differ become one.

    Raises:
        UserError: nothing to merge, or an adapter that no single kernel can express.
    """
    if not isinstance(model, VisionLanguageModel):
        raise UserError(f'merge: a {type(model).__name__} has no adapters; merge a checkpoint of a stage that trained some.')
    if not any(group.adapters or group.side for group in model.groups) and model.distillation is None:
        raise UserError('merge: this checkpoint has no adapters and no distillation heads; there is nothing to merge.')
    flat = flatten(params)
    for index, group in enumerate(model.groups):
        for linear, adapters in group.adapters:
            base = f'decoder/layers/group_{index}/block/{linear}'
            for number, adapter in enumerate(adapters):
                prefix = f'{base}/adapter_{number}/'
                branch = {path[len(prefix):]: flat.pop(path) for path in list(flat) if path.startswith(prefix)}
                flat[f'{base}/kernel'] = adapter.fold(flat[f'{base}/kernel'], branch)
    flat = {path: leaf for path, leaf in flat.items()
            if not path.startswith('teacher/') and '/side/' not in path}
    merged = merged_model(model)
    return regroup(unflatten(flat), [group.num_layers for group in merged.groups]), merged


def merged_model(model: VisionLanguageModel) -> VisionLanguageModel:
    """The model that `merge` gives: the same decoder and front end, without adapters and distillation."""
    layers = [((), False, group.biases) for group in model.groups for _ in range(group.num_layers)]
    groups: tuple[LayerGroup, ...] = group_layers(layers)
    return model.clone(groups=groups, distillation=None)
