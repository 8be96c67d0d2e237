"""Patches of a row back to pictures."""
from collections.abc import Sequence

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from vora_jax.batch import Patches
from vora_jax.types import Array

SHEET, GAP, LINE = 1024, 12, 18  # pixels: width of a sheet, space around pictures, height of a line of text
PAPER, INK, EDGE = (255, 255, 255), (32, 32, 32), (190, 60, 60)


def pictures_of(patches: Patches) -> list[Array]:
    """The pictures of a row (without its leading dimension), u8[height, width, 3] each, as the model gets them.

    Args:
        patches: pixels u8; places of [cls] slots are passed over.
    """
    side = round((patches.pixels.shape[-1] // 3) ** 0.5)
    found = []
    for number, (rows, cols) in enumerate(patches.grid.tolist()):
        if not rows:
            continue
        here = np.flatnonzero((patches.image_id == number) & (patches.row >= 0))
        picture = np.zeros((rows, cols, side, side, 3), np.uint8)
        picture[patches.row[here], patches.col[here]] = patches.pixels[here].reshape(-1, side, side, 3)
        found.append(picture.swapaxes(1, 2).reshape(rows * side, cols * side, 3))
    return found


def contact_sheet(pictures: Sequence[Array], captions: Sequence[str]) -> PIL.Image.Image:
    """The pictures side by side in their own size, each framed, with its caption above it."""
    font = PIL.ImageFont.load_default(13)
    spots, x, y, below = [], GAP, GAP, GAP
    for picture, caption in zip(pictures, captions, strict=True):
        height, width = picture.shape[0] + LINE, max(picture.shape[1], int(font.getlength(caption)) + 1)
        if x > GAP and x + width + GAP > SHEET:
            x, y = GAP, below
        spots.append((x, y))
        x, below = x + width + GAP, max(below, y + height + GAP)
    wide = max([SHEET, *(x + picture.shape[1] + GAP for (x, _), picture in zip(spots, pictures))])
    sheet = PIL.Image.new('RGB', (wide, below + GAP), PAPER)
    draw = PIL.ImageDraw.Draw(sheet)
    for (x, y), picture, caption in zip(spots, pictures, captions):
        draw.text((x, y), caption, INK, font)
        height, width = picture.shape[:2]
        draw.rectangle((x - 1, y + LINE - 1, x + width, y + LINE + height), outline=EDGE)
        sheet.paste(PIL.Image.fromarray(picture), (x, y + LINE))
    return sheet
