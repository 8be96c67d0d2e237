"""What of a checkpoint an export holds."""
import dataclasses
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vora_jax.batch import Batch, Patches
from vora_jax.convert.name_map import Shapes, check
from vora_jax.model import VisionLanguageModel
from vora_jax.params import flatten
from vora_jax.types import TEXT, Array, Params, UserError


class Exportable(NamedTuple):
    """A model as others run it.

    model: without distillation; adapters stay.    params: its flat parameters.    shapes: those the model expects.
    dropped: one phrase for each part that served training only.
    """

    model: VisionLanguageModel
    params: dict[str, Array]
    shapes: Shapes
    dropped: tuple[str, ...]


def exportable(params: Params, model: VisionLanguageModel) -> Exportable:
    """Leaves out the distillation heads and the teacher.

    Raises:
        UserError: the model is no language model, or its parameters are not the ones given.
    """
    if not isinstance(model, VisionLanguageModel):
        raise UserError(f'a {type(model).__name__} is no language model and has no Hugging Face form; export a '
                        'checkpoint of a language or vision-language stage.')
    flat = flatten(params)
    parts = {'the distillation heads': [path for path in flat if '/side/' in path],
             'the teacher': [path for path in flat if path.startswith('teacher/')]}
    for paths in parts.values():
        for path in paths:
            del flat[path]
    groups = tuple(dataclasses.replace(group, side=False) for group in model.groups)
    model = model.clone(groups=groups, distillation=None)
    shapes = parameter_shapes(model)
    check(shapes, {path: leaf.shape for path, leaf in flat.items()}, 'the checkpoint')
    return Exportable(model, flat, shapes, tuple(part for part, paths in parts.items() if paths))


def parameter_shapes(model: VisionLanguageModel) -> Shapes:
    """{path: shape} of all parameters; computes nothing."""
    variables = jax.eval_shape(model.init, jax.random.key(0), smallest_batch(model))
    return {path: tuple(leaf.shape) for path, leaf in flatten(nn.unbox(variables['params'])).items()}


def cast(params: dict[str, Array], dtype: str) -> dict[str, Array]:
    """The flat parameters in another dtype."""
    return {path: leaf if leaf.dtype == jnp.dtype(dtype) else jnp.asarray(leaf).astype(dtype)
            for path, leaf in params.items()}


def smallest_batch(model: VisionLanguageModel) -> Batch:
    """The smallest batch: one text slot, and one empty patch if the model sees."""
    ids, none = np.zeros((1, 1), np.int32), np.full((1, 1), -1, np.int32)
    patches = None
    if model.vision is not None:
        pixels = np.zeros((1, 1, 3 * model.vision.patch_embed.patch_size**2), np.uint8)
        place = none.astype(np.int16)
        patches = Patches(pixels, place, place, none, np.zeros((1, 1, 2), np.int32), ids, ids)
    return Batch(tokens=ids, targets=ids, loss_mask=ids.astype(np.float32), modality=np.full((1, 1), TEXT, np.int8),
                 key_start=ids, key_stop=ids + 1, positions=ids, route_slot=ids, segment_id=ids + 1,
                 vision_slot=none, vision_source=ids, patches=patches, bad_samples=ids[0])
