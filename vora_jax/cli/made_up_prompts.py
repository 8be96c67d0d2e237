"""Prompts of random words and pictures."""
import pathlib
import random
import tempfile

import numpy as np
import PIL.Image

from vora_jax.batch import Batch
from vora_jax.data.config import Data
from vora_jax.data.text.tokenizer import Tokenizer
from vora_jax.evaluation.prompts import Prompt, PromptRows
from vora_jax.method import VisionTokenRule

WORDS = ('what', 'is', 'the', 'colour', 'of', 'this shape', 'how many', 'are there?', '12', '3.5', '(yes)', 'Zürich', '東京',
         '🙂')
_PROBES = 4


def made_up_prompts(num: int, rule: VisionTokenRule | None, folder: pathlib.Path, side: int = 0) -> list[Prompt]:
    """`num` prompts of random words; where the model sees, also with none to two random pictures, written to `folder`.

    Args:
        rule: of the method; None for a model that reads text only.
        side: of square pictures, pixels; 0 makes them of any shape.
    """
    rng, pixels, prompts = random.Random(0), np.random.default_rng(0), []
    for number in range(num):
        question, images = ' '.join(rng.choices(WORDS, k=rng.randint(1, 12))), []
        for _ in range(number % 3 if rule is not None else 0):
            height, width = (side or rng.randint(1, 10) * rule.patch_size + rng.randint(0, 3) for _ in range(2))
            images.append(str(folder / f'{number}-{len(images)}.png'))
            PIL.Image.fromarray(pixels.integers(0, 256, (height, width, 3), np.uint8)).save(images[-1])
        prompts.append(Prompt(question, tuple(images), where=f'made-up prompt {number} with {len(images)} pictures'))
    return prompts


def probe_batch(data: Data, rule: VisionTokenRule | None, tokenizer: Tokenizer) -> Batch:
    """A few made-up prompts as one batch."""
    with tempfile.TemporaryDirectory() as folder:
        prompts = made_up_prompts(_PROBES, rule, pathlib.Path(folder))
        return next(PromptRows(prompts, data, rule, tokenizer).batches(_PROBES))
