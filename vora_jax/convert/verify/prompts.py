"""Logits and greedy answers of both sides."""
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

from vora_jax.batch import Batch
from vora_jax.convert.verify.tensors import Comparison
from vora_jax.convert.verify.torch_side import Question, TorchSide, same_ids
from vora_jax.llm.generate import greedy
from vora_jax.model import VisionLanguageModel
from vora_jax.types import Params

# Where the two best logits are closer than this, rounding may choose either.
TIE = 1e-4
# A stock processor resizes with other code than Pillow: what a byte of a pixel may differ by.
_MAX_BYTES = 3


def compare_prompts(model: VisionLanguageModel, params: Params, batches: Iterable[Batch], side: TorchSide,
                    questions: Sequence[Question], *, eos_id: int, max_new_tokens: int, tolerance: float,
                    stock_pixels: bool, same_pictures: bool, found: Comparison) -> None:
    """Compares all questions, given as rows of our own code and as the folder's own inputs.

    Args:
        model, params: with float32 activations and the exported weights as float32.
        stock_pixels: the folder's processor is a stock one: pictures may differ a little, and both sides get ours.
        same_pictures: its pictures must be nearly ours all the same.
        found: is filled in.
    """
    rest = list(questions)
    for batch in batches:
        asked, rest = rest[:len(batch.tokens)], rest[len(batch.tokens):]
        if not asked:
            continue
        with jax.default_matmul_precision('highest'):
            hidden = np.asarray(hidden_states(model, params, batch))
            answers = np.asarray(greedy(model, params, batch, max_new_tokens=max_new_tokens, eos_id=eos_id))
        rows = _compare_logits(model, params, batch, hidden, side, asked, tolerance, (stock_pixels, same_pictures), found)
        if rows:
            _compare_answers(answers, batch, model, side, {row: asked[row] for row in rows}, eos_id, stock_pixels, found)


def _compare_logits(model, params, batch, hidden, side, questions, tolerance, pixels, found) -> list[int]:
    """The rows that both sides read alike."""
    import torch
    stock_pixels, same_pictures = pixels
    head, same = np.asarray(model.unembedding(params)), []
    for row, question in enumerate(questions):
        found.num_prompts += 1
        inputs = side.inputs([question])
        if not same_ids(side, batch, row, inputs):
            found.problems.append(f'{describe(question)} becomes other token ids or other pixels')
            continue
        if stock_pixels and not _with_our_pixels(inputs, [row], batch, model) and same_pictures:
            found.problems.append(f'{describe(question)}: the folder\'s processor makes other pixels')
        same.append(row)
        with torch.no_grad():
            theirs = side.model(**inputs).logits[0].numpy()
        difference = float(np.max(np.abs(hidden[row, :len(theirs)] @ head - theirs)))
        if not difference <= tolerance:  # also NaN
            found.problems.append(f'logits of {describe(question)} differ by {difference:.2e}, more than {tolerance:g}')
        if not found.worst or not difference <= found.max_abs_logit_diff:
            found.max_abs_logit_diff, found.worst = difference, describe(question)
    return same


def _compare_answers(answers, batch, model, side: TorchSide, questions: dict[int, Question], eos_id: int,
                     stock_pixels: bool, found: Comparison) -> None:
    """Greedy answers, all prompts of the batch generated together."""
    inputs = side.inputs(list(questions.values()))
    if stock_pixels:
        _with_our_pixels(inputs, list(questions), batch, model)
    output = side.model.generate(**inputs, max_new_tokens=answers.shape[1], do_sample=False)
    theirs = output[:, inputs['input_ids'].shape[1]:].numpy()
    for (row, question), answer in zip(questions.items(), theirs):
        ours, other = _until(answers[row], eos_id), _until(answer, eos_id)
        if ours == other:
            found.same_answers += 1
            continue
        same = next(i for i, (a, b) in enumerate(zip([*ours, -1], [*other, -1])) if a != b)
        gap = _gap(side, question, row, batch, model, ours[:same], stock_pixels)
        if gap <= TIE:
            found.near_ties += 1
            found.gaps.append(f'{describe(question)}: token {same + 1} was chosen by {gap:.1e}')
        else:
            found.problems.append(f'answers to {describe(question)} differ: {side.tokenizer.decode(ours)!r} here, '
                                  f'{side.tokenizer.decode(other)!r} in the folder, whose best logits are {gap:.2e} apart')


@functools.partial(jax.jit, static_argnames='model')
def hidden_states(model: VisionLanguageModel, params: Params, batch: Batch) -> jax.Array:
    return model.apply({'params': params}, batch).hidden


def _gap(side, question, row, batch, model, answer: list[int], stock_pixels: bool) -> float:
    """Distance of the two best logits after the prompt and a beginning of the answer."""
    import torch
    inputs = side.inputs([question])
    if stock_pixels:
        _with_our_pixels(inputs, [row], batch, model)
    beginning = torch.tensor([answer], dtype=torch.long)
    inputs['input_ids'] = torch.cat([inputs['input_ids'], beginning], dim=1)
    inputs['attention_mask'] = torch.ones_like(inputs['input_ids'])
    with torch.no_grad():
        best = side.model(**inputs).logits[0, -1].topk(2).values
    return float(best[0] - best[1])


def _with_our_pixels(inputs: dict[str, Any], rows: Sequence[int], batch: Batch, model: VisionLanguageModel) -> bool:
    """Puts our pictures in the place of the processor's; whether both were nearly equal."""
    if 'pixel_values' not in inputs:
        return True
    ours = our_pixels(batch, rows, model.vision.patch_embed)
    std = np.asarray(model.vision.patch_embed.std).reshape(3, 1, 1)
    theirs, inputs['pixel_values'] = inputs['pixel_values'], _tensor(ours)
    if tuple(theirs.shape) != ours.shape:
        return False
    # Resizing differs at edges: the mean over a picture tells whether it is the same one.
    return bool(np.mean(np.abs(theirs.numpy() - ours) * std * 255) <= _MAX_BYTES)


def our_pixels(batch: Batch, rows: Sequence[int], embed) -> np.ndarray:
    """f32[n, 3, H, W]: the normalised pictures of these rows, all of one size."""
    found, size = [], embed.patch_size
    mean, std = (np.asarray(values, np.float32) for values in (embed.mean, embed.std))
    for row in rows:
        for image in range(int(batch.patches.image_id[row].max(initial=-1)) + 1):
            is_here = (batch.patches.image_id[row] == image) & (batch.patches.row[row] >= 0)
            height, width = batch.patches.grid[row, image]
            pixels = batch.patches.pixels[row][is_here].reshape(height, width, size, size, 3)
            picture = pixels.transpose(0, 2, 1, 3, 4).reshape(height * size, width * size, 3)
            if pixels.dtype == np.uint8:
                picture = (picture.astype(np.float32) / 255 - mean) / std
            found.append(picture.transpose(2, 0, 1))
    return np.stack(found)


def _tensor(array: np.ndarray) -> Any:
    import torch
    return torch.from_numpy(np.ascontiguousarray(array))


def _until(ids: Sequence[int], eos_id: int) -> list[int]:
    """The ids up to and including the first `eos_id`."""
    ids = [int(token) for token in ids]
    return ids[:ids.index(eos_id) + 1] if eos_id in ids else ids


def describe(question: Question) -> str:
    return f'{question.text!r} ({question.where})' if question.where else repr(question.text)
