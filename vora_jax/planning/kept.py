"""What the backward pass finds, by remat policy."""
from typing import get_args

from vora_jax.nn.stack import Remat
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


def row_bytes(config: Train, remat: str) -> float:
    """Of what the backward pass finds of one row, at least: the states that enter each layer, what the policy keeps
    besides (see `LanguageModel.remat`), and a teacher's features."""
    model = config.method.stage(config.stage).model
    llm, distillation, row = getattr(model, 'llm', None), getattr(model, 'distillation', None), full_row(config)
    if llm is None:
        return 0.0
    heads, total = llm.num_heads * llm.head_dim, 0.0
    steps = REMATS.index(remat) if remat in REMATS else 0
    for group in model.groups:
        ranks = sum(getattr(adapter, 'rank', 0) for _, adapters in group.adapters for adapter in adapters)
        besides = {'full': llm.width, 'attention': heads, 'adapters': ranks,
                   'no_mlp': heads + 2 * llm.num_kv_heads * llm.head_dim + llm.width, 'matmuls': 2 * llm.mlp_width,
                   'none': llm.mlp_width}
        total += group.num_layers * row.tokens.size * sum(besides[name] for name in REMATS[:steps + 1])
    if distillation is not None:
        total += len(distillation.layers) * row.vision_slot.size * distillation.teacher.width
    return float(total * itemsize(config))
