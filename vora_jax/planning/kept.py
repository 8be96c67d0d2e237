"""What the backward pass finds, by remat policy."""
from typing import get_args

from vora_jax.nn.stack import LayerGroup, Remat
from vora_jax.planning.abstract_batch import full_row
from vora_jax.training.config import Train

# What the backward pass finds instead of computing it again, from the least memory to the most.
REMATS = tuple(name for name in ('full', 'attention', 'adapters', 'no_mlp', 'matmuls', 'none') if name in get_args(Remat))


def remat_of(config: Train) -> str:
    """The language model's; '' for a model without one."""
    return getattr(getattr(config.method.stage(config.stage).model, 'llm', None), 'remat', '')


def itemsize(config: Train) -> int:
    """Bytes of an activation."""
    llm = getattr(config.method.stage(config.stage).model, 'llm', None)
    return llm.dtype.itemsize if llm is not None else 4


def row_bytes(config: Train, remat: str, one_layer: bool = False) -> float:
    """Of what the backward pass finds of one row, at least: the states that enter each layer, what the policy keeps
    besides (see `LanguageModel.remat`), and a teacher's features.

    one_layer: of the largest layer alone, without the features.

    With it, what lives through the step, gradients, and all values of one layer, the estimate is 0.99 to 1.10 of what
    libtpu 0.0.42 assigns the 7B pretraining on 64 chips, 4 rows a device (full to matmuls; 0.92 for none).
    """
    model = config.method.stage(config.stage).model
    llm, distillation, row = getattr(model, 'llm', None), getattr(model, 'distillation', None), full_row(config)
    if llm is None:
        return 0.0
    heads, total = llm.num_heads * llm.head_dim, 0.0
    steps = REMATS.index(remat) if remat in REMATS else 0

    def layers_of(group: LayerGroup) -> int:
        return 1 if one_layer else group.num_layers

    groups = sorted(model.groups, key=lambda group: len(group.adapters))[-1:] if one_layer else model.groups
    for group in groups:
        ranks = sum(getattr(adapter, 'rank', 0) for _, adapters in group.adapters for adapter in adapters)
        besides = {'full': llm.width, 'attention': heads, 'adapters': ranks,
                   'no_mlp': heads + 2 * llm.num_kv_heads * llm.head_dim + llm.width, 'matmuls': 2 * llm.mlp_width,
                   'none': 4 * llm.mlp_width + 3 * llm.width}  # norms, steps of the activation, products
        total += layers_of(group) * row.tokens.size * sum(besides[name] for name in REMATS[:steps + 1])
        if distillation is not None and group.side and steps:
            total += layers_of(group) * row.vision_slot.size * llm.width
    if distillation is not None and not one_layer:
        total += len(distillation.layers) * row.vision_slot.size * distillation.teacher.width
    return float(total * itemsize(config))
