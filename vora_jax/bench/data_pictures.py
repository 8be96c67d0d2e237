"""Generated photographs with questions, as a data set on disk."""
import json
import pathlib
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import PIL.Image

from vora_jax.data.text.tokenizer import train_sentencepiece
from vora_jax.types import Array

# Amplitudes of photographs fall with about this power of the frequency; a file of 640 x 480 pixels then takes 120 kB.
FALL, QUALITY = 1.3, 90
QUESTIONS = ('what is shown in this picture?', 'is there more light on the left or on the right?',
             'which colour does most of the picture have?')
ANSWERS = ('some soft clouds of colour.', 'on the left, but only a little.', 'a pale grey, with green and violet in it.')


class Photographs(NamedTuple):
    """files: of the pictures. rows: JSON lines, a question about each. tokenizer: its folder. mean_bytes: of a file."""

    files: tuple[str, ...]
    rows: str
    tokenizer: str
    mean_bytes: float


def write_photographs(folder: pathlib.Path, count: int, height: int, width: int, seed: int,
                      progress: Callable[[Iterable], Iterable] = iter) -> Photographs:
    """Writes JPEG files of smooth noise (4:2:0, quality 90), a question about each, and a tokenizer for the questions.

    The files are a pure function of the arguments.

    Args:
        folder: empty, of this call alone.
        count, height, width: pictures, and pixels of each.
        progress: goes through the pictures.
    """
    files, lines = [], []
    for number in progress(range(count)):
        path = folder / f'{number:06}.jpg'
        photograph(height, width, np.random.default_rng([seed, number])).save(path, quality=QUALITY, subsampling='4:2:0')
        turns = [{'from': 'human', 'value': '<image>\n' + QUESTIONS[number % len(QUESTIONS)]},
                 {'from': 'gpt', 'value': ANSWERS[number % len(ANSWERS)]}]
        lines.append(json.dumps({'id': str(number), 'frames': [path.name], 'conversations': turns}) + '\n')
        files.append(path)
    rows, tokenizer = folder / 'rows.jsonl', folder / 'tokenizer'
    rows.write_text(''.join(lines), encoding='utf-8')
    train_sentencepiece([*QUESTIONS, *ANSWERS, 'user', 'assistant'] * 9, str(tokenizer), 320)
    size = sum(file.stat().st_size for file in files) / count
    return Photographs(tuple(map(str, files)), str(rows), str(tokenizer), size)


def photograph(height: int, width: int, rng: np.random.Generator) -> PIL.Image.Image:
    """A picture with the spectrum of a photograph: strong in brightness, weak and softer in colour."""
    half = -(-height // 2), -(-width // 2)
    planes = [_noise(height, width, FALL, rng), *(0.35 * _noise(*half, FALL + 0.3, rng) for _ in range(2))]
    bands = [PIL.Image.fromarray(np.clip(128 + 50 * plane, 0, 255).astype(np.uint8)) for plane in planes]
    return PIL.Image.merge('YCbCr', [band.resize((width, height)) for band in bands])


def _noise(height: int, width: int, fall: float, rng: np.random.Generator) -> Array:
    """f32[height, width] of mean 0 and deviation 1 whose amplitudes fall with the given power of the frequency."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)).astype(np.float32)
    frequency[0, 0] = np.inf
    waves = rng.standard_normal((*frequency.shape, 2), np.float32).view(np.complex64)[..., 0] * frequency ** -fall
    noise = np.fft.irfft2(waves, (height, width))
    return (noise / max(float(noise.std()), 1e-9)).astype(np.float32)
