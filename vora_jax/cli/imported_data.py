"""What a foreign folder says about questions and pictures."""
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any, NamedTuple

from vora_jax.data.config import Data, ImagePolicy
from vora_jax.data.text.special_tokens import IM_START, read_json
from vora_jax.data.text.templates import TEMPLATES, jinja
from vora_jax.data.text.tokenizer import load_tokenizer
from vora_jax.method import VisionTokenRule

TOKENIZERS = ('tokenizer.json', 'tokenizer.model', 'vocab.json')  # any of them makes a folder one with a tokenizer
BESIDE = ('merges.txt', 'added_tokens.json', 'special_tokens_map.json', 'tokenizer_config.json', 'chat_template.jinja',
          'chat_template.json', 'generation_config.json', 'config.json')
MAX_SLOTS = 2048  # of a training row, where the model could take more

# What a chat template says in its own language -> our name for it, the more telling first.
_SIGNS = (('<|start_header_id|>', 'llama3'), ('[INST]', 'llama2'), ('named SmolLM', 'smollm2'),
          ('You are Qwen', 'qwen2.5'), ('You are a helpful assistant', 'chatml_system'), (IM_START, 'chatml'),
          ('ASSISTANT:', 'vicuna_v1'))


class Guess(NamedTuple):
    """The name of a chat template, and where it comes from."""

    name: str
    reason: str


def copy_tokenizer_files(source: pathlib.Path, to: pathlib.Path) -> bool:
    """Copies what tokenizes text, and nothing else; False where the folder has no tokenizer."""
    if not any((source / name).is_file() for name in TOKENIZERS):
        return False
    for name in (*TOKENIZERS, *BESIDE):
        if (source / name).is_file():
            shutil.copyfile(source / name, to / name)
    return True


def guess_template(folder: pathlib.Path, hint: str | None) -> Guess:
    """The chat template of a folder with a tokenizer.

    Args:
        hint: name of the template this family of models was tuned with, if that is known.
    """
    text = _chat_template(folder)
    if not text:
        return Guess(hint, 'usual for this family') if hint else Guess('chatml', 'the folder has none')
    tokenizer = load_tokenizer(str(folder))
    for name in sorted(TEMPLATES, key=lambda name: name != hint):
        if _rendered(TEMPLATES[name], tokenizer) == text:
            return Guess(name, 'the folder has this one')
    found = next((name for sign, name in _SIGNS if sign in text), None)
    if found:
        return Guess(found, 'the closest to the one in the folder')
    return Guess(hint or 'chatml', 'the one in the folder is none of ours')


def imported_data(hints: Mapping[str, Any], rule: VisionTokenRule | None, tokenizer: str, template: str) -> Data:
    """Budgets for one sample, and how pictures are resized; no sources."""
    slots = min(hints.get('max_positions', MAX_SLOTS), MAX_SLOTS)
    image = ImagePolicy(**hints.get('image', {}))
    if rule is None:
        return Data((), tokenizer, template, max_slots=slots, image=image)
    most, squares = image.max_patches, 1
    if image.kind != 'native':
        squares += max((rows * cols for rows, cols in image.tiles), default=0)
        most = squares * (image.side // rule.patch_size) ** 2
    return Data((), tokenizer, template, max_slots=slots, max_patches=most + squares * rule.cls, max_images=max(8, squares),
                image=image)


def _chat_template(folder: pathlib.Path) -> str:
    """In the template language of `transformers`; '' where the folder has none."""
    if (folder / 'chat_template.jinja').is_file():
        return (folder / 'chat_template.jinja').read_text(encoding='utf-8')
    for file in ('chat_template.json', 'tokenizer_config.json'):
        found = read_json(folder / file).get('chat_template')
        if isinstance(found, list):  # several, each with a name
            found = next((each.get('template') for each in found if each.get('name') == 'default'), None)
        if isinstance(found, str):
            return found
    return ''


def _rendered(template, tokenizer) -> str | None:
    try:
        return jinja(template, tokenizer)
    except ValueError:  # the tokenizer lacks a token of this template
        return None
