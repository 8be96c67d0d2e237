"""Compares a model with its exported folder."""
import dataclasses
import functools
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import PIL.Image

from vora_jax.batch import Batch
from vora_jax.convert.exportable import Exportable, cast, exportable
from vora_jax.convert.name_map import name_list, to_foreign
from vora_jax.convert.to_hf import is_export
from vora_jax.llm.generate import greedy
from vora_jax.model import VisionLanguageModel
from vora_jax.params import unflatten
from vora_jax.types import PAD, TEXT, Params, UserError

# Where the two best logits are closer than this, rounding may choose either.
TIE = 1e-4


class Question(NamedTuple):
    """A prompt for the exported model. text: without template; images: picture files; where: what to call it."""

    text: str
    images: tuple[str, ...] = ()
    where: str = ''


@dataclasses.dataclass
class Comparison:
    """What `verify` found.

    tensors: exported tensors compared bit for bit.    dtype: of the exported weights.
    num_prompts: prompts compared.    max_abs_logit_diff: over all slots of all prompts, both sides in float32.
    same_answers: prompts with equal greedy answers.    near_ties: others where the two best logits lay within `TIE`.
    worst: the prompt with the largest difference.
    problems: a sentence for each thing that is not equal; empty where the folder passes.
    """

    tensors: int = 0
    dtype: str = ''
    num_prompts: int = 0
    max_abs_logit_diff: float = 0.0
    same_answers: int = 0
    near_ties: int = 0
    worst: str = ''
    problems: list[str] = dataclasses.field(default_factory=list)


def verify(params: Params, model: VisionLanguageModel, folder: str, questions: Sequence[Question],
           batches: Iterable[Batch], *, eos_id: int, max_new_tokens: int = 16, tolerance: float = 1e-3) -> Comparison:
    """Loads the folder as its users do and compares weights, token ids, logits and greedy answers.

    Both sides compute in float32 with the exported weights, so an export in bfloat16 is held to the same tolerance.

    Args:
        params, model: the checkpoint.
        folder: its export.
        questions: prompts for the folder's own tokenizer, template and picture code.
        batches: the same prompts as rows of the training code, in the same order; surplus rows are left out.
        eos_id: id that ends an answer.
        max_new_tokens: length of the compared answers.
        tolerance: largest accepted difference of a logit.

    Raises:
        UserError: torch is missing, or the folder is not an export.
    """
    torch_model, tokenizer = load_folder(folder)
    what, found = exportable(params, model), Comparison()
    _compare_tensors(what, torch_model, found)
    reference = _in_float32(what, found.dtype)
    torch_model = torch_model.float().eval()
    rest = list(questions)
    for batch in batches:
        asked, rest = rest[:len(batch.tokens)], rest[len(batch.tokens):]
        if asked:
            _compare_prompts(reference, batch, torch_model, tokenizer, asked, eos_id, max_new_tokens, tolerance,
                             found)
    return found


def load_folder(folder: str) -> tuple[Any, Any]:
    """(model, tokenizer) of an export, by `from_pretrained`; every weight must come from the folder.

    Raises:
        UserError: torch is missing, or the folder is not an export or does not hold exactly the model's tensors.
    """
    try:
        import torch  # noqa: F401  an extra, so not at the top
        import transformers
    except ImportError:
        raise UserError('verify needs PyTorch and transformers, which are not installed; install them with '
                        "pip install 'vora_jax[torch]'.") from None
    if not is_export(pathlib.Path(folder)):
        raise UserError(f'{folder} is not a folder that `vora export` wrote; export the checkpoint first.')
    transformers.utils.logging.disable_progress_bar()
    try:
        model, loading = transformers.AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=True, output_loading_info=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f'{folder} does not load ({reason}); export the checkpoint again.') from error
    wrong = [f'{kind.removesuffix("_keys")} {name_list(sorted(map(str, keys)))}'
             for kind, keys in loading.items() if keys]
    if wrong:
        raise UserError(f'{folder} does not hold the tensors of its model: {"; ".join(wrong)}; export it again.')
    return model, tokenizer


def _compare_tensors(what: Exportable, torch_model: Any, found: Comparison) -> None:
    """Bit for bit; the exported tensors must be the checkpoint's in the folder's dtype."""
    import torch
    found.dtype = str(torch_model.dtype).removeprefix('torch.')
    theirs = torch_model.state_dict()
    if what.model.llm.tied_head:
        del theirs['lm_head.weight']  # the embedding, which is compared under its own name
    lacking, different = [], []
    for name, array in to_foreign(what.params, what.shapes, found.dtype):
        tensor = theirs.pop(name, None)
        found.tensors += 1
        if tensor is None:
            lacking.append(name)
        elif tuple(tensor.shape) != array.shape or not np.array_equal(
                tensor.contiguous().view(torch.uint8).numpy(), array.view(np.uint8)):
            different.append(name)
    for names, problem in ((lacking, 'are not in the folder'), (sorted(theirs), 'are not in the checkpoint'),
                           (different, 'differ')):
        if names:
            found.problems.append(f'tensors that {problem} ({len(names)}): {name_list(names)}')


def _in_float32(what: Exportable, dtype: str) -> Exportable:
    """The checkpoint with the export's rounding of weights and float32 activations."""
    model = what.model.clone(llm=dataclasses.replace(what.model.llm, activation_dtype='float32'))
    return what._replace(model=model, params=cast(cast(what.params, dtype), 'float32'))


def _compare_prompts(what: Exportable, batch: Batch, torch_model: Any, tokenizer: Any,
                     questions: Sequence[Question], eos_id: int, max_new_tokens: int, tolerance: float,
                     found: Comparison) -> None:
    import torch
    model, params = what.model, unflatten(what.params)
    with jax.default_matmul_precision('highest'):
        hidden = np.asarray(_hidden(model, params, batch))
        answers = np.asarray(greedy(model, params, batch, max_new_tokens=max_new_tokens, eos_id=eos_id))
    head = np.asarray(model.unembedding(params))
    same_ids = []
    for row, question in enumerate(questions):
        found.num_prompts += 1
        inputs = _inputs(torch_model, tokenizer, [question])
        if not _same_ids(batch, row, inputs, torch_model.config.image_token_id):
            found.problems.append(f'{_describe(question)} becomes other token ids or other pixels')
            continue
        same_ids.append(row)
        with torch.no_grad():
            theirs = torch_model(**inputs).logits[0].numpy()
        difference = float(np.max(np.abs(hidden[row, :len(theirs)] @ head - theirs)))
        if not difference <= tolerance:  # also NaN
            found.problems.append(f'logits of {_describe(question)} differ by {difference:.2e}, more than {tolerance:g}')
        if not found.worst or not difference <= found.max_abs_logit_diff:
            found.max_abs_logit_diff, found.worst = difference, _describe(question)
    if same_ids:
        _compare_answers(answers, torch_model, tokenizer, {row: questions[row] for row in same_ids}, eos_id, found)


def _compare_answers(answers: np.ndarray, torch_model: Any, tokenizer: Any, questions: dict[int, Question],
                     eos_id: int, found: Comparison) -> None:
    """Greedy answers, all prompts of the batch generated together."""
    inputs = _inputs(torch_model, tokenizer, list(questions.values()))
    output = torch_model.generate(**inputs, max_new_tokens=answers.shape[1], do_sample=False)
    theirs = output[:, inputs['input_ids'].shape[1]:].numpy()
    for (row, question), answer in zip(questions.items(), theirs):
        ours, other = _until(answers[row], eos_id), _until(answer, eos_id)
        if ours == other:
            found.same_answers += 1
            continue
        same = next(i for i, (a, b) in enumerate(zip([*ours, -1], [*other, -1])) if a != b)
        gap = _gap(torch_model, tokenizer, question, ours[:same])
        if gap <= TIE:
            found.near_ties += 1
        else:
            found.problems.append(f'answers to {_describe(question)} differ: {tokenizer.decode(ours)!r} here, '
                                  f'{tokenizer.decode(other)!r} in the folder, whose best logits are {gap:.2e} apart')


@functools.partial(jax.jit, static_argnames='model')
def _hidden(model: VisionLanguageModel, params: Params, batch: Batch) -> jax.Array:
    return model.apply({'params': params}, batch).hidden


def _gap(torch_model: Any, tokenizer: Any, question: Question, answer: list[int]) -> float:
    """Distance of the two best logits after the prompt and a beginning of the answer."""
    import torch
    inputs = _inputs(torch_model, tokenizer, [question])
    beginning = torch.tensor([answer], dtype=torch.long)
    inputs['input_ids'] = torch.cat([inputs['input_ids'], beginning], dim=1)
    inputs['attention_mask'] = torch.ones_like(inputs['input_ids'])
    with torch.no_grad():
        best = torch_model(**inputs).logits[0, -1].topk(2).values
    return float(best[0] - best[1])


def _inputs(torch_model: Any, tokenizer: Any, questions: Sequence[Question]) -> dict[str, Any]:
    pictures = [[PIL.Image.open(image) for image in question.images] for question in questions]
    return torch_model.prepare_inputs(tokenizer, [question.text for question in questions], pictures)


def _same_ids(batch: Batch, row: int, inputs: dict[str, Any], image_token_id: int) -> bool:
    """Whether both sides read the same text and the same bytes of pictures."""
    length = int(np.sum(batch.modality[row] != PAD))
    ids = inputs['input_ids'][0].numpy()
    is_text = batch.modality[row, :length] == TEXT
    if len(ids) != length or not np.array_equal(ids, np.where(is_text, batch.tokens[row, :length], image_token_id)):
        return False
    if 'pixel_values' not in inputs:
        return bool(is_text.all())
    pixels = inputs['pixel_values'][0].numpy()
    grid = inputs['image_grid'][0].numpy()
    return np.array_equal(grid, batch.patches.grid[row, :len(grid)]) and np.array_equal(
        pixels, batch.patches.pixels[row, :len(pixels)])


def _until(ids: Sequence[int], eos_id: int) -> list[int]:
    """The ids up to and including the first `eos_id`."""
    ids = [int(token) for token in ids]
    return ids[:ids.index(eos_id) + 1] if eos_id in ids else ids


def _describe(question: Question) -> str:
    return f'{question.text!r} ({question.where})' if question.where else repr(question.text)
