"""Distillation losses in torch against ours."""
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from vora_jax.batch import Batch
from vora_jax.convert.verify.prompts import our_pixels
from vora_jax.convert.verify.tensors import Comparison
from vora_jax.convert.verify.torch_side import Question, TorchSide, from_pretrained, import_torch
from vora_jax.model import VisionLanguageModel
from vora_jax.types import Params, UserError

TOLERANCE = 1e-4  # of a loss


def compare_distillation(params: Params, model: VisionLanguageModel, side: TorchSide, teacher: str,
                         questions: Sequence[Question], rows: Sequence[Batch], found: Comparison) -> None:
    """Each distilled layer's mean of 1 - cos over all vision tokens: student and teacher in torch, heads of the checkpoint.

    Args:
        params, model: the checkpoint, which distils.
        side: its export in our own layout.
        teacher: Hugging Face folder of the encoder.
        questions, rows: prompts, and a batch of one row for each.
    """
    if model.distillation is None:
        found.left_out.append('distillation losses: this checkpoint does not distil')
        return
    _, transformers = import_torch()
    embed = model.distillation.teacher.patch_embed
    encoder = from_pretrained(transformers.AutoModel, teacher).float().eval()
    heads = _heads(params, model)
    ours, theirs, count, skipped = 0.0, np.zeros(len(heads)), 0, 0
    for question, row in zip(questions, rows, strict=True):
        if not question.images:
            continue
        grids = {tuple(grid) for grid in row.patches.grid[0] if grid.any()}
        if grids != {(embed.table_rows, embed.table_cols)} and (len(grids) > 1 or embed.positions != 'sincos'):
            skipped += 1
            continue
        output = _losses(model, params, row)
        ours, count = ours + np.asarray(output.distill_sum), count + int(output.distill_count)
        theirs += _torch_losses(model, side, encoder, heads, question, row)
    if skipped:
        found.left_out.append(f'distillation losses of {skipped} prompts, whose pictures are not of the teacher\'s size')
    if not count:
        found.left_out.append('distillation losses: no prompt has pictures of the teacher\'s size')
        return
    for layer, one, other in zip(model.distillation.layers, ours / count, theirs / count):
        found.distill_losses.append((layer, float(one), float(other)))
        if not abs(one - other) <= TOLERANCE:
            found.problems.append(f'the distillation loss of layer {layer} is {one:.6f} here and {other:.6f} in torch')


@functools.partial(jax.jit, static_argnums=0)
def _losses(model: VisionLanguageModel, params: Params, batch: Batch) -> Any:
    with jax.default_matmul_precision('highest'):
        return model.apply({'params': params}, batch)


def _heads(params: Params, model: VisionLanguageModel) -> list[dict[str, np.ndarray]]:
    """Scale and kernel of each distilled layer's head, in order."""
    found = []
    for index, group in enumerate(model.groups):
        if group.side:
            side = params['decoder']['layers'][f'group_{index}']['side']
            found += [{'scale': np.array(side['norm']['scale'][layer], np.float32),
                       'kernel': np.array(side['kernel'][layer], np.float32)} for layer in range(group.num_layers)]
    return found


def _torch_losses(model: VisionLanguageModel, side: TorchSide, encoder: Any, heads: list, question: Question,
                  row: Batch) -> np.ndarray:
    """f64[L_distilled]: sums over the prompt's vision tokens."""
    import torch
    distillation, inputs = model.distillation, side.inputs([question])
    states: dict[int, Any] = {}
    entering = distillation.pairing == 'input_to_output'

    def keep(layer, _, arguments, output):
        states[layer] = arguments[0] if entering else output

    hooks = [side.model.model.layers[layer].register_forward_hook(functools.partial(keep, layer))
             for layer in distillation.layers]
    pixels = torch.from_numpy(our_pixels(row, [0], distillation.teacher.patch_embed))
    with torch.no_grad():
        side.model(**inputs)
        try:
            blocks = encoder(pixel_values=pixels, output_hidden_states=True).hidden_states
        except (RuntimeError, TypeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f'the teacher cannot read this checkpoint\'s pictures ({reason}); give the folder of the '
                            'encoder that it distils from.') from error
    for hook in hooks:
        hook.remove()
    is_image, sums = inputs['input_ids'][0] == side.image_token_id, []
    wanted = max(distillation.blocks) + 1, int(is_image.sum()), heads[0]['kernel'].shape[-1]
    targets = [block[:, int(distillation.teacher.patch_embed.cls_token):].flatten(0, 1) for block in blocks[1:]]
    given = len(targets), *targets[0].shape
    if given[0] < wanted[0] or given[1:] != wanted[1:]:
        raise UserError('the teacher gives {} blocks of {} x {} values, but the checkpoint distils from {} of {} x {}; give '
                        'the folder of the encoder that it distils from.'.format(*given, *wanted))
    for layer, block, head in zip(distillation.layers, distillation.blocks, heads):
        target = targets[block]
        x = states[layer][0][is_image]
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + distillation.head_eps) * torch.from_numpy(head['scale'])
        cosine = torch.nn.functional.cosine_similarity(x @ torch.from_numpy(head['kernel']), target, dim=-1)
        sums.append(float((1 - cosine).sum()))
    return np.asarray(sums)
