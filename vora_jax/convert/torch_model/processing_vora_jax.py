"""Questions and pictures to a model's inputs."""
import math

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.nn.utils.rnn import pad_sequence

PLACEHOLDER = '<image>'
CHATML = '<|im_start|>'
MAX_PIXELS = 1 << 27  # of a square that a picture is padded to
STRIP = 64  # times as long as it is wide
WHITE = (255, 255, 255)


def make_inputs(config, tokenizer, questions, images=None):
    """input_ids, attention_mask, pixel_values and image_grid of some questions, padded on the left.

    A row begins with `route_token_id`, where the configuration has one; each vector of a picture is an `image_token_id`.
    Where `image_policy` makes several squares of a picture, these stand in its place one after the other, each with rows
    and columns of its own in image_grid.

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
        shown = [[to_patches(square, size, config.image_policy) for square in to_squares(picture, config.image_policy)]
                 for picture in pictures]
        slots = iter([sum(int(tokens_per_picture(config, torch.tensor(grid))) for _, grid in squares) for squares in shown])
        patches, row = [square for squares in shown for square in squares], []
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


def to_squares(image, policy):
    """The PIL images that `policy` makes of one: itself, or its tiles."""
    if policy['kind'] != 'tiles':
        return [image]
    return cut_tiles(to_rgb(image, policy), policy['side'], policy['tiles'], policy['color'])


def to_patches(image, size, policy):
    """(u8[rows * cols, patch_dim], (rows, cols)): a PIL image in whole patches of `size` pixels, as `policy` says.

    Of the kind 'tiles' it is one of `to_squares`.
    """
    image = to_rgb(image, policy)
    if policy['kind'] == 'native':
        rows, cols = fit_grid(image.height, image.width, size, policy['min_patches'], policy['max_patches'])
    else:
        rows = cols = policy['side'] // size
        if policy['kind'] == 'square_pad':
            image = pad_to_square(image, policy['color'], policy['side'])
        elif policy['kind'] == 'square_crop':
            image = crop_to_square(image, policy['side'])
    if image.size != (cols * size, rows * size):
        image = image.resize((cols * size, rows * size), Image.Resampling.BICUBIC)
    patches = np.array(image).reshape(rows, size, cols, size, 3).transpose(0, 2, 1, 3, 4)
    return torch.from_numpy(patches.reshape(rows * cols, -1).copy()), (rows, cols)


def to_rgb(image, policy):
    """The picture upright, in 8 bits, transparency over the policy's background."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith('I'):  # 16 and 32 bit grey
        deep = np.asarray(image).astype(np.float64)
        image = Image.fromarray((deep / 257 if deep.max() > 255 else deep).clip(0, 255).astype(np.uint8))
    elif 'A' in image.getbands() or 'transparency' in image.info:
        above = image.convert('RGBA')
        image = Image.new('RGBA', above.size, (*policy.get('background', WHITE), 255))
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


def pad_to_square(image, color, side):
    """The picture in the middle of a square as large as its longer side.

    A strip whose square would be too large is brought to four times `side` first.
    """
    longer = max(image.size)
    if longer**2 > max(MAX_PIXELS, 2 * image.width * image.height):
        shrink = 4 * side / longer
        image = image.resize(tuple(max(1, round(edge * shrink)) for edge in image.size), Image.Resampling.BICUBIC)
        longer = max(image.size)
    square = Image.new('RGB', (longer, longer), tuple(color))
    square.paste(image, ((longer - image.width) // 2, (longer - image.height) // 2))
    return square


def crop_to_square(image, side):
    """The middle of the picture, its shorter side resized to `side` first; as CLIP's processor does it."""
    short = min(image.size)
    if max(image.size) > STRIP * short:  # resizing all of it would take too much memory
        image = crop_center(image, *(min(edge, 8 * short) for edge in image.size))
    size = tuple(side if edge == short else int(side * edge / short) for edge in image.size)
    if size != image.size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    return crop_center(image, side, side)


def crop_center(image, width, height):
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def fit_tiles(height, width, side, tiles):
    """(rows, cols) of `tiles` that show most of a picture's own pixels, and of these the one with least empty room.

    LLaVA-NeXT's rule; the first of equals.
    """
    def merit(tile):
        rows, cols = tile
        scale = min(cols * side / width, rows * side / height)
        shown = min(int(width * scale) * int(height * scale), width * height)
        return shown, shown - rows * cols * side * side
    return max(tiles, key=merit)


def cut_tiles(image, side, tiles, color):
    """The whole picture stretched to a square; then at its own aspect ratio, padded, cut into squares in reading order."""
    rows, cols = fit_tiles(image.height, image.width, side, tiles)
    width, height = cols * side, rows * side
    wide, high = width / image.width, height / image.height
    if wide < high:
        size = width, min(math.ceil(image.height * wide), height)
    else:
        size = min(math.ceil(image.width * high), width), height
    room = Image.new('RGB', (width, height), tuple(color))
    room.paste(image.resize(size, Image.Resampling.BICUBIC), ((width - size[0]) // 2, (height - size[1]) // 2))
    return [image.resize((side, side), Image.Resampling.BICUBIC),
            *(room.crop((left, top, left + side, top + side))
              for top in range(0, height, side) for left in range(0, width, side))]
