"""Questions and pictures to a model's inputs."""
import math

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.nn.utils.rnn import pad_sequence

PLACEHOLDER = '<image>'
CHATML = '<|im_start|>'


def make_inputs(config, tokenizer, questions, images=None):
    """input_ids, attention_mask, pixel_values and image_grid of some questions, padded on the left.

    A row begins with `route_token_id`, where the configuration has one; each vector of a picture is an `image_token_id`.

    config: a VoraJaxConfig.    tokenizer: of the same folder.
    questions: texts; `<image>` marks where a picture goes, else each gets a line of its own in front.
    images: for each question a PIL image, a list of them, or None.
    """
    ids, pixels, grids = [], [], []
    for question, pictures in zip(questions, images or [None] * len(questions), strict=True):
        pictures = pictures if isinstance(pictures, (list, tuple)) else [pictures] if pictures else []
        if PLACEHOLDER not in question:
            question = f'{PLACEHOLDER}\n' * len(pictures) + question
        if question.count(PLACEHOLDER) != len(pictures) or (pictures and not config.vision):
            raise ValueError(f'{len(pictures)} images do not fit the question {question!r} of this model.')
        text = tokenizer.apply_chat_template([{'role': 'user', 'content': question}], tokenize=False,
                                             add_generation_prompt=True)
        size = config.vision['patch_embed']['patch_size'] if config.vision else 1
        patches = [to_patches(picture, size, config.image_policy) for picture in pictures]
        slots = iter([int(tokens_per_picture(config, torch.tensor(grid))) for _, grid in patches])
        row = []
        for token in encode(tokenizer, text, config.image_token_id):
            row += [token] * next(slots) if patches and token == config.image_token_id else [token]
        route = [] if config.route_token_id is None else [config.route_token_id]
        ids.append(torch.tensor(route + row, dtype=torch.long))
        pixels.append(torch.cat([torch.zeros(0, 3 * size**2, dtype=torch.uint8), *(picture for picture, _ in patches)]))
        grids.append(torch.tensor([grid for _, grid in patches], dtype=torch.long).view(-1, 2))
    inputs = {'input_ids': pad_sequence(ids, True, tokenizer.pad_token_id, 'left'),
              'attention_mask': pad_sequence([torch.ones_like(row) for row in ids], True, 0, 'left')}
    if any(map(len, grids)):
        inputs |= {'pixel_values': pad_sequence(pixels, True), 'image_grid': pad_sequence(grids, True)}
    return inputs


def encode(tokenizer, text, image_token_id):
    """Ids of a rendered prompt, with one `image_token_id` for each `<image>`, which is a special token of the tokenizer."""
    if text.startswith(CHATML) and tokenizer.convert_tokens_to_ids(CHATML) in (None, tokenizer.unk_token_id):
        # A ChatML whose marks are no special tokens: its stretches between pictures are texts of their own.
        first, *others = (tokenizer(part, add_special_tokens=False)['input_ids'] for part in text.split(PLACEHOLDER))
        return first + [token for other in others for token in (image_token_id, *other)]
    return tokenizer(text, add_special_tokens=False)['input_ids']


def tokens_per_picture(config, grid):
    """i64[...]: slots that a picture takes, of its rows and columns grid [..., 2]; 0 where there is none."""
    rule = config.vision_tokens
    windows = (-(-grid // rule['pool'])).prod(-1)
    return rule['tokens_per_place'] * (windows if rule['select'] == 'patch' else windows.clamp(max=1))


def to_patches(image, size, policy):
    """(u8[rows * cols, patch_dim], (rows, cols)): a PIL image in whole patches of `size` pixels, as `policy` says."""
    image = to_rgb(image)
    if policy['kind'] == 'native':
        rows, cols = fit_grid(image.height, image.width, size, policy['min_patches'], policy['max_patches'])
    else:
        rows = cols = policy['side'] // size
        if policy['kind'] == 'square_pad':
            image = pad_to_square(image, policy['color'])
        elif policy['kind'] == 'square_crop':
            image = crop_to_square(image, policy['side'])
    if image.size != (cols * size, rows * size):
        image = image.resize((cols * size, rows * size), Image.Resampling.BICUBIC)
    patches = np.array(image).reshape(rows, size, cols, size, 3).transpose(0, 2, 1, 3, 4)
    return torch.from_numpy(patches.reshape(rows * cols, -1).copy()), (rows, cols)


def to_rgb(image):
    """The picture upright, in 8 bits, transparency over white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith('I'):  # 16 and 32 bit grey
        deep = np.asarray(image).astype(np.float64)
        image = Image.fromarray((deep / 257 if deep.max() > 255 else deep).clip(0, 255).astype(np.uint8))
    elif 'A' in image.getbands() or 'transparency' in image.info:
        above = image.convert('RGBA')
        image = Image.new('RGBA', above.size, 'white')
        image.alpha_composite(above)
    return image.convert('RGB')


def fit_grid(height, width, size, least, most):
    """(rows, cols): least to most patches of `size` pixels for a picture of these pixels, near its aspect ratio."""
    rows, cols = max(1, round(height / size)), max(1, round(width / size))
    area = height * width / size**2
    if rows * cols > most:
        shrink = math.sqrt(most / area)
        rows, cols = (max(1, math.floor(side / size * shrink)) for side in (height, width))
        rows, cols = min(rows, most), min(cols, most)  # a strip stuck at one patch on one side
    elif rows * cols < least:
        grow = math.sqrt(least / area)
        rows, cols = (math.ceil(side / size * grow) for side in (height, width))
        rows = min(rows, most)
        cols = min(cols, most // rows)
    return rows, cols


def pad_to_square(image, color):
    """The picture in the middle of a square as large as its longer side."""
    side = max(image.size)
    square = Image.new('RGB', (side, side), tuple(color))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def crop_to_square(image, side):
    """The middle of the picture, its shorter side resized to `side` first; as CLIP's processor does it."""
    short = min(image.size)
    size = tuple(side if edge == short else int(side * edge / short) for edge in image.size)
    if size != image.size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))
