"""An exported encoder's features against ours."""
import pathlib

import jax
import numpy as np

from vora_jax.batch import Patches
from vora_jax.convert.verify.prompts import our_pixels
from vora_jax.convert.verify.tensors import Comparison
from vora_jax.convert.verify.torch_side import from_pretrained, import_torch
from vora_jax.types import Params
from vora_jax.vision.image_encoder import ImageEncoder
from vora_jax.vision.vit import Features, VisionTransformer

TOLERANCE = 1e-3  # of features, relative to the largest


def compare_features(model: ImageEncoder, params: Params, folder: pathlib.Path, found: Comparison) -> None:
    """Compares every block's output, and the normed output where the stock model has it, on a random picture."""
    torch, transformers = import_torch()
    embed = model.vit.patch_embed
    patches = _random_picture(embed.table_rows, embed.table_cols, embed.patch_size, embed.cls_token)
    with jax.default_matmul_precision('highest'):
        ours: Features = jax.jit(VisionTransformer(model.vit).apply)({'params': params['encoder']}, patches)
    theirs = from_pretrained(transformers.AutoModel, folder).float().eval()
    pixels = torch.from_numpy(our_pixels(_Holder(patches), [0], embed))
    with torch.no_grad():
        output = theirs(pixel_values=pixels, output_hidden_states=True)
    pairs = [(f'block {index}', ours.blocks[index, 0], output.hidden_states[index + 1][0])
             for index in range(model.vit.num_layers)]
    if theirs.config.model_type == 'clip_vision_model':  # its last state is not normed, its pooled [cls] is
        pairs.append(('the norm', ours.output[0, 0], output.pooler_output[0]))
    else:
        pairs.append(('the norm', ours.output[0], output.last_hidden_state[0]))
    if ours.pooled is not None:
        pairs.append(('the pooled vector', ours.pooled[0, 0], output.pooler_output[0]))
    found.max_abs_feature_diff = 0.0
    for name, one, other in pairs:
        difference = float(np.max(np.abs(np.asarray(one) - other.numpy())))
        if not difference <= found.max_abs_feature_diff or not found.worst:
            found.max_abs_feature_diff, found.worst = difference, name
        if not difference <= TOLERANCE * max(1.0, float(np.max(np.abs(np.asarray(one))))):
            found.problems.append(f'features of {name} differ by {difference:.2e}')


class _Holder:
    """What `our_pixels` reads of a batch."""

    def __init__(self, patches: Patches):
        self.patches = patches


def _random_picture(rows: int, cols: int, size: int, cls: bool) -> Patches:
    """One row of `Patches` with one picture, its [cls] slot first."""
    count = rows * cols + cls
    pixels = np.random.default_rng(0).integers(0, 256, (1, count, 3 * size**2), np.uint8)
    place = np.arange(rows * cols)
    row, col = (np.concatenate([np.full(int(cls), -1), values]).astype(np.int16)[None]
                for values in (place // cols, place % cols))
    ids = np.zeros((1, count), np.int32)
    return Patches(pixels, row, col, ids, np.asarray([[[rows, cols]]], np.int32), ids, ids + count)
