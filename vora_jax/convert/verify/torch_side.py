"""An exported folder, loaded as its users load it."""
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import PIL.Image

from vora_jax.batch import Batch
from vora_jax.convert.export.peft import BASE
from vora_jax.convert.names.mismatch import name_list
from vora_jax.types import PAD, TEXT, UserError


class Question(NamedTuple):
    """A prompt for the exported model. text: without template; images: picture files; where: what to call it."""

    text: str
    images: tuple[str, ...] = ()
    where: str = ''


class TorchSide(NamedTuple):
    """A loaded folder.

    model, tokenizer: of the libraries.    image_token_id: what stands for a patch in its ids; None: it cannot see.
    inputs: (questions) -> arguments of `model`, padded on the left.
    same_pixels: (batch, row, inputs) -> whether both sides read the same pictures.
    """

    model: Any
    tokenizer: Any
    image_token_id: int | None
    inputs: Callable[[Sequence[Question]], dict[str, Any]]
    same_pixels: Callable[[Batch, int, dict[str, Any]], bool]


def import_torch() -> tuple[Any, Any]:
    """(torch, transformers). UserError where they are not installed."""
    try:
        import torch  # an extra, so not at the top
        import transformers
    except ImportError:
        raise UserError('verify needs PyTorch and transformers, which are not installed; install them with '
                        "pip install 'vora_jax[torch]'.") from None
    transformers.utils.logging.disable_progress_bar()
    return torch, transformers


def from_pretrained(loader: Any, folder: str | pathlib.Path, **settings) -> Any:
    """What transformers makes of a folder; every tensor must come from it, and it must hold no other.

    Raises:
        UserError: it does not load, or tensors are missing or unexpected.
    """
    try:
        model, loading = loader.from_pretrained(str(folder), output_loading_info=True, **settings)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f'{folder} does not load ({reason}); export the checkpoint again.') from error
    wrong = [f'{kind.removesuffix("_keys")} {name_list(sorted(map(str, keys)))}'
             for kind, keys in loading.items() if keys]
    if wrong:
        raise UserError(f'{folder} does not hold the tensors of its model: {"; ".join(wrong)}; export it again.')
    return model


def open_tokenizer(loader: Any, folder: str | pathlib.Path, **settings) -> Any:
    """The tokenizer or processor of a folder. UserError where it does not load."""
    try:
        return loader.from_pretrained(str(folder), **settings)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(':. ')
        raise UserError(f'{folder}: its tokenizer or processor does not load ({reason}); export the checkpoint again.'
                        ) from error


def open_torch(folder: pathlib.Path, layout: str, sees: bool) -> TorchSide:
    """The folder's model in float32.

    Raises:
        UserError: a library is missing, or the folder does not hold exactly its model's tensors.
    """
    torch, transformers = import_torch()
    auto = transformers.AutoModelForCausalLM
    remote = {'trust_remote_code': True} if layout == 'own' or layout == 'peft' and sees else {}
    if layout == 'peft':
        base = from_pretrained(auto, folder / BASE, **remote).float()
        model = _peft_model(base, folder)
    elif layout == 'llava':
        base = model = from_pretrained(transformers.LlavaForConditionalGeneration, folder).float()
    else:
        base = model = from_pretrained(auto, folder, **remote).float()
    tokenizer = open_tokenizer(transformers.AutoTokenizer, folder, **remote)
    model = model.eval()
    if layout == 'llava':
        processor = open_tokenizer(transformers.AutoProcessor, folder)
        return TorchSide(model, tokenizer, base.config.image_token_id, _llava_inputs(processor), lambda *_: True)
    if hasattr(base, 'prepare_inputs'):
        def inputs(questions):
            return base.prepare_inputs(tokenizer, [question.text for question in questions], pictures(questions))
        return TorchSide(model, tokenizer, base.config.image_token_id, inputs, _same_patches)
    return TorchSide(model, tokenizer, None, _text_inputs(tokenizer), lambda *_: True)


def pictures(questions: Sequence[Question]) -> list[list[PIL.Image.Image]]:
    return [[PIL.Image.open(image) for image in question.images] for question in questions]


def _peft_model(base: Any, folder: pathlib.Path) -> Any:
    try:
        import peft
    except ImportError:
        raise UserError('verify needs the package peft to load this folder; install it with pip install peft.') from None
    model = peft.PeftModel.from_pretrained(base, str(folder)).float()
    there = set(peft.get_peft_model_state_dict(model))
    with open(folder / 'adapter_model.safetensors', 'rb') as file:
        given = set(_names(file))
    if there != given:
        raise UserError(f'{folder} does not hold the adapters that peft makes of its adapter_config.json: '
                        f'{name_list(sorted(there ^ given))}; export it again.')
    return model


def _names(file: Any) -> list[str]:
    import json
    header = json.loads(file.read(int.from_bytes(file.read(8), 'little')))
    return [name for name in header if name != '__metadata__']


def _text_inputs(tokenizer: Any) -> Callable:
    def inputs(questions: Sequence[Question]) -> dict[str, Any]:
        tokenizer.padding_side = 'left'
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        texts = [tokenizer.apply_chat_template([{'role': 'user', 'content': question.text}], tokenize=False,
                                               add_generation_prompt=True) for question in questions]
        made = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors='pt')
        return {name: made[name] for name in ('input_ids', 'attention_mask')}
    return inputs


def _llava_inputs(processor: Any) -> Callable:
    def inputs(questions: Sequence[Question]) -> dict[str, Any]:
        shown = [picture.convert('RGB') for row in pictures(questions) for picture in row]
        texts = []
        for question in questions:
            text = question.text
            if '<image>' not in text:
                text = '<image>\n' * len(question.images) + text
            texts.append(processor.apply_chat_template([{'role': 'user', 'content': text}], add_generation_prompt=True))
        made = processor(text=texts, images=shown or None, padding=True, add_special_tokens=False, return_tensors='pt')
        return {name: made[name] for name in ('input_ids', 'attention_mask', 'pixel_values') if name in made}
    return inputs


def same_ids(side: TorchSide, batch: Batch, row: int, inputs: dict[str, Any]) -> bool:
    """Whether both sides read the same text and the same pictures."""
    length = int(np.sum(batch.modality[row] != PAD))
    ids = inputs['input_ids'][0].numpy()
    is_text = batch.modality[row, :length] == TEXT
    ours = np.where(is_text, batch.tokens[row, :length], -1 if side.image_token_id is None else side.image_token_id)
    return len(ids) == length and np.array_equal(ids, ours) and side.same_pixels(batch, row, inputs)


def _same_patches(batch: Batch, row: int, inputs: dict[str, Any]) -> bool:
    """Byte for byte, for our own modeling code."""
    if 'pixel_values' not in inputs:
        return not (batch.patches is not None and (batch.patches.image_id[row] >= 0).any())
    grid, pixels = inputs['image_grid'][0].numpy(), inputs['pixel_values'][0].numpy()
    ours = batch.patches.pixels[row][batch.patches.row[row] >= 0]
    return np.array_equal(grid, batch.patches.grid[row, :len(grid)]) and np.array_equal(pixels, ours[:len(pixels)])
