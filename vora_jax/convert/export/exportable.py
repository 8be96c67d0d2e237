"""What of a checkpoint an export holds."""
import dataclasses
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vora_jax.batch import Batch, Patches
from vora_jax.convert.export.lazy_arrays import Computed, FoldedKernel
from vora_jax.convert.names.name_map import Shapes, check
from vora_jax.merge import fold_adapters, has_low_rank, raise_if_unfoldable
from vora_jax.model import VisionLanguageModel
from vora_jax.params import flatten
from vora_jax.types import TEXT, Array, Params, UserError
from vora_jax.vision.image_encoder import ImageEncoder
from vora_jax.vision.token_classifier import TokenClassifier

Model = VisionLanguageModel | ImageEncoder
Leaf = Array | Computed | FoldedKernel


class Exportable(NamedTuple):
    """A model as others run it.

    model: without distillation; adapters stay.    params: its flat parameters.    shapes: those the model expects.
    dropped: one phrase for each part that served training only.
    """

    model: Model
    params: dict[str, Leaf]
    shapes: Shapes
    dropped: tuple[str, ...]

    @property
    def has_adapters(self) -> bool:
        return isinstance(self.model, VisionLanguageModel) and any(
            group.adapters or group.mixtures or group.prompts for group in self.model.groups)

    @property
    def is_merged(self) -> bool:
        """No adapters but kernels of their own, which stay."""
        return not self.has_adapters or not any(
            has_low_rank(group) or group.mixtures or group.prompts for group in self.model.groups)

    @property
    def dtype(self) -> str:
        """The narrowest dtype that holds all parameters exactly."""
        return str(jnp.result_type(*{jnp.dtype(leaf.dtype) for leaf in self.params.values()}))


def exportable(params: Params, model: nn.Module, *, keep_distillation: bool = False) -> Exportable:
    """Leaves out the distillation heads and the teacher, unless asked to keep them; of a classifier, its head.

    Raises:
        UserError: the model is neither language model nor encoder, or its parameters are not the ones given.
    """
    flat, parts = flatten(params), {}
    if isinstance(model, TokenClassifier):
        parts, model = {'the classifier\'s head': ('head',)}, ImageEncoder(model.vit)
    elif isinstance(model, VisionLanguageModel) and not keep_distillation:
        parts = {'the distillation heads': [path for path in flat if '/side/' in path],
                 'the teacher': [path for path in flat if path.startswith('teacher/')]}
        groups = tuple(dataclasses.replace(group, side=False) for group in model.groups)
        model = model.clone(groups=groups, distillation=None)
    elif not isinstance(model, (VisionLanguageModel, ImageEncoder)):
        raise UserError(f'a {type(model).__name__} is no language model and no encoder, so it has no Hugging Face form; '
                        'export a checkpoint of another stage.')
    dropped = tuple(part for part, paths in parts.items() if any(path in flat for path in paths))
    for path in sum(map(list, parts.values()), []):
        flat.pop(path, None)
    shapes = parameter_shapes(model)
    check(shapes, {path: leaf.shape for path, leaf in flat.items()}, 'the checkpoint')
    return Exportable(model, flat, shapes, dropped)


def folded(what: Exportable) -> Exportable:
    """The same model with its adapters folded into its kernels (in f32, one layer at a time, when they are read).

    What acts on vision slots only becomes a kernel of theirs. The layer groups stay as they were, so that nothing is copied;
    distillation must have been left out.

    Raises:
        UserError: an adapter that no kernel can express.
    """
    for group in what.model.groups:
        raise_if_unfoldable(group)
    if not any(map(has_low_rank, what.model.groups)):
        return what
    params, groups = fold_adapters(what.params, what.model.groups, FoldedKernel)
    shapes = {path: tuple(leaf.shape) for path, leaf in params.items()}
    return what._replace(model=what.model.clone(groups=groups), params=params, shapes=shapes)


def parameter_shapes(model: Model) -> Shapes:
    """{path: shape} of all parameters; computes nothing."""
    variables = jax.eval_shape(model.init, jax.random.key(0), smallest_batch(model))
    return {path: tuple(leaf.shape) for path, leaf in flatten(nn.unbox(variables['params'])).items()}


def cast(params: dict[str, Array], dtype: str) -> dict[str, Array]:
    """The flat parameters in another dtype."""
    return {path: leaf if leaf.dtype == jnp.dtype(dtype) else jnp.asarray(leaf).astype(dtype)
            for path, leaf in params.items()}


def smallest_batch(model: Model) -> Batch:
    """The smallest batch: one text slot, and one empty patch if the model sees."""
    ids, none = np.zeros((1, 1), np.int32), np.full((1, 1), -1, np.int32)
    patches = None
    vision = model.vision if isinstance(model, VisionLanguageModel) else model.vit
    if vision is not None:
        pixels = np.zeros((1, 1, 3 * vision.patch_embed.patch_size**2), np.uint8)
        place = none.astype(np.int16)
        patches = Patches(pixels, place, place, none, np.zeros((1, 1, 2), np.int32), ids, ids)
    return Batch(tokens=ids, targets=ids, loss_mask=ids.astype(np.float32), modality=np.full((1, 1), TEXT, np.int8),
                 key_start=ids, key_stop=ids + 1, positions=ids, route_slot=ids, segment_id=ids + 1,
                 vision_slot=none, vision_source=ids, patches=patches, tally=ids)
