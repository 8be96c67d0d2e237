"""Shapes of a run's batches, and a full row, without data."""
import math
from typing import Any

import jax
import numpy as np

from vora_jax.batch import Batch
from vora_jax.data.packing import Budgets, Picture, Text, layout, stack
from vora_jax.method import VisionTokenRule
from vora_jax.training.config import Train


def batch_shapes(config: Train, sharding: Any = None) -> Any:
    """A `Batch` of `jax.ShapeDtypeStruct`: the rows of one optimizer step, by the budgets of the configuration."""
    row = _row(config, [Text([0], True)])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((config.batch_rows, *x.shape[1:]), x.dtype, sharding=sharding), row)


def full_row(config: Train) -> Batch:
    """One row that fills the budgets: pictures (as large as the policy makes them, up to the budgets of patches, pictures
    and slots), then text with targets in all slots that are left."""
    data, rule = config.data, config.method.vision_tokens
    parts: list[Text | Picture] = []
    left = data.max_slots - (1 if rule is not None and rule.route_token else 0)
    if rule is not None:
        rows, columns = _grid(config, rule)
        num_pictures = min(data.max_images, data.max_patches // rule.num_places(rows, columns),
                           (left - 1) // rule.num_tokens(rows, columns))
        pixels = np.zeros((rows * columns, 3 * rule.patch_size**2), np.uint8)
        parts += [Picture(pixels, rows, columns)] * num_pictures
        left -= num_pictures * rule.num_tokens(rows, columns)
    return _row(config, [*parts, Text([0] * left, True)])


def _grid(config: Train, rule: VisionTokenRule) -> tuple[int, int]:
    """Rows and columns of patches of a picture."""
    policy = config.data.image_policy
    side = policy.side // rule.patch_size
    if side and rule.num_places(side, side) <= config.data.max_patches:
        return side, side
    places = max(1, min(policy.max_patches, config.data.max_patches // config.data.max_images) - rule.cls)
    rows = math.isqrt(places)
    return rows, places // rows


def _row(config: Train, segment: list[Text | Picture]) -> Batch:
    data, rule = config.data, config.method.vision_tokens
    budgets = Budgets(data.max_slots)
    if rule is not None:
        budgets = Budgets(data.max_slots, data.max_patches, data.max_images, 3 * rule.patch_size**2)
    return stack([layout([segment], budgets, tally=np.zeros((len(data.sources), 3)), rule=rule)])
