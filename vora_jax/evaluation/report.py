"""A picture grid of questions, answers and predictions."""
import textwrap
from collections.abc import Sequence

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from vora_jax.data.images.decode import decode
from vora_jax.data.text.conversation import IMAGE
from vora_jax.evaluation.tasks import Prediction

CELL, PICTURE, MARGIN, LINE = 212, 132, 12, 18  # pixels; four columns are as wide as a README's text
RIGHT, WRONG, INK, PAPER = (24, 128, 56), (196, 30, 30), (32, 32, 32), (255, 255, 255)
QUESTION_LINES = 2


def choose_examples(predictions: Sequence[Prediction], count: int, seed: int) -> list[Prediction]:
    """Up to `count` predictions with a picture, kinds in turn; drawn from the seed, right or wrong."""
    rng = np.random.default_rng(seed)
    kinds: dict[str, list[Prediction]] = {}
    for index in rng.permutation(len(predictions)):
        if predictions[index].question.images:
            kinds.setdefault(predictions[index].question.kind, []).append(predictions[index])
    chosen: list[Prediction] = []
    while len(chosen) < count and any(kinds.values()):
        chosen += [kinds[kind].pop() for kind in sorted(kinds) if kinds[kind]]
    return chosen[:count]


def draw_grid(predictions: Sequence[Prediction], columns: int = 4) -> PIL.Image.Image:
    """The predictions as cells: picture, question, answer, and what the model said, green or red."""
    columns = max(1, min(columns, len(predictions)))
    rows = -(-len(predictions) // columns)
    height = PICTURE + (QUESTION_LINES + 2) * LINE + 3 * MARGIN
    grid = PIL.Image.new('RGB', (columns * CELL, rows * height), PAPER)
    draw = PIL.ImageDraw.Draw(grid)
    font, small = PIL.ImageFont.load_default(15), PIL.ImageFont.load_default(13)
    for index, prediction in enumerate(predictions):
        row, column = divmod(index, columns)
        _draw_cell(grid, draw, column * CELL, row * height, prediction, font, small)
    return grid


def _draw_cell(grid, draw, left: int, top: int, prediction: Prediction, font, small) -> None:
    asked, colour = prediction.question, RIGHT if prediction.correct else WRONG
    picture = _fit(decode(asked.images[0]))
    x, y = left + (CELL - picture.width) // 2, top + MARGIN + (PICTURE - picture.height) // 2
    grid.paste(picture, (x, y))
    draw.rectangle((x - 2, y - 2, x + picture.width + 1, y + picture.height + 1), outline=colour, width=2)
    text = ' '.join(asked.question.replace(IMAGE, ' ').split())
    y = top + PICTURE + 2 * MARGIN
    for line in textwrap.wrap(text, 27, max_lines=QUESTION_LINES, placeholder=' ...'):
        draw.text((left + MARGIN, y), line, INK, small)
        y += LINE
    y = top + PICTURE + 2 * MARGIN + QUESTION_LINES * LINE
    verdict = '' if prediction.correct else '  (wrong)'  # colour alone does not reach everyone
    said = ' '.join(prediction.prediction.split()) or '(nothing)'
    draw.text((left + MARGIN, y), _short(f'answer: {asked.answer}', font), INK, font)
    draw.text((left + MARGIN, y + LINE), _short(f'model: {said}', font, verdict), colour, font)


def _fit(picture: PIL.Image.Image) -> PIL.Image.Image:
    """The picture scaled into the cell; a small one is enlarged unsmoothed, as the model sees it."""
    scale = PICTURE / max(picture.size)
    size = tuple(max(1, round(side * scale)) for side in picture.size)
    return picture.resize(size, PIL.Image.Resampling.NEAREST if scale > 1 else PIL.Image.Resampling.LANCZOS)


def _short(text: str, font, tail: str = '') -> str:
    """The text, cut so that it and the tail fit the cell."""
    kept = text
    while kept and font.getlength(kept + tail) > CELL - 2 * MARGIN:
        kept = kept[:-4] + '...' if kept.endswith('...') else kept[:-1] + '...'
    return kept + tail
