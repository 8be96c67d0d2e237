"""Samples to rows, in plain NumPy.

`plan` decides which samples share a row; `layout` writes one row: slots, shifted targets, key ranges,
patches.
"""
from typing import NamedTuple, Sequence

import numpy as np

from vora_jax.batch import Batch, Patches
from vora_jax.method import VisionTokenRule
from vora_jax.types import ROUTE, TEXT, VISION, Array


class Text(NamedTuple):
    """A run of text. ids: token ids; supervised: learned (answers and end marks), not only read."""

    ids: Sequence[int]
    supervised: bool = False


class Picture(NamedTuple):
    """A decoded picture. pixels: u8|f32[rows * cols, patch_dim], in reading order. rows, cols: grid."""

    pixels: Array
    rows: int
    cols: int


class Budgets(NamedTuple):
    """Static sizes of a row: slots S, patches P with [cls] slots, images M. patch_dim 0: no pictures."""

    slots: int
    patches: int = 0
    images: int = 0
    patch_dim: int = 0
    pixel_dtype: str = 'uint8'


def layout(segments: Sequence[Sequence[Text | Picture]], budgets: Budgets, tally: Array | None = None,
           rule: VisionTokenRule | None = None, pixels: Array | None = None) -> Batch:
    """One row (a `Batch` without its leading dimension) that holds the segments one after the other.

    Text sees its segment up to itself; a picture's slots see their segment up to the picture's end, unless the rule
    says otherwise (None: its defaults). A slot's target is the next slot's token where that token is supervised, so the
    last slot of a question predicts the first of its answer.

    Example: [[Text([7]), Picture(1 x 2), Text([8], supervised=True)], [Text([9])]] with 6 slots

        slot       0 1 2 3 4 5         query 0  x . . . . .
        tokens     7 0 0 8 9 0               1  x x x . . .
        modality   T V V T T -               2  x x x . . .
        targets    0 0 8 0 0 0               3  x x x x . .
        key_start  0 0 0 0 4 0               4  . . . . x .
        key_stop   1 3 3 4 5 0               5  . . . . . .

    Args:
        segments: each is a sample.
        budgets: sizes of the row.
        tally: see `Batch`; None counts the segments as good samples of one source.
        rule: how pictures become slots.
        pixels: u8|f32[P, patch_dim] receives the pixels, for rows that are written into a batch; None allocates them.
    Raises:
        ValueError: the segments exceed a budget, or a picture's pixels do not fit its grid or the row's
            dtype.
    """
    num_slots, num_patches, num_images, patch_dim, pixel_dtype = budgets
    if not patch_dim:
        num_patches = num_images = 0
    tokens, targets, key_start, key_stop, positions, segment_id = np.zeros((6, num_slots), np.int32)
    supervised = np.zeros(num_slots, bool)
    loss_mask = np.zeros(num_slots, np.float32)
    modality = np.zeros(num_slots, np.int8)
    rule = rule or VisionTokenRule(1)
    num_tokens = rule.max_tokens(num_patches, num_images)
    route_slot = np.arange(num_slots, dtype=np.int32)
    vision_slot = np.full(num_tokens, -1, np.int32)
    vision_source = np.zeros(num_tokens, np.int32)
    if pixels is None:
        pixels = np.empty((num_patches, patch_dim), pixel_dtype)
    patch_row, patch_col = np.full((2, num_patches), -1, np.int16)
    image_id = np.full(num_patches, -1, np.int32)
    patch_start, patch_stop = np.zeros((2, num_patches), np.int32)
    grid = np.zeros((num_images, 2), np.int32)

    slot = patch = image = token = 0
    for number, segment in enumerate(segments, 1):
        first, block = slot, None  # block: first slot of the pictures that see each other
        if rule.route_token:
            if slot >= num_slots:
                raise ValueError(f'{slot + 1} slots do not fit into a row of {num_slots}.')
            tokens[slot] = any(isinstance(part, Picture) for part in segment)
            modality[slot], key_stop[slot] = ROUTE, slot + 1
            slot += 1
        for part in segment:
            size = len(part.ids) if isinstance(part, Text) else rule.num_tokens(part.rows, part.cols)
            end = slot + size
            if end > num_slots:
                raise ValueError(f'{end} slots do not fit into a row of {num_slots}.')
            here = slice(slot, end)
            if isinstance(part, Text):
                tokens[here] = part.ids
                supervised[here] = part.supervised
                modality[here] = TEXT
                key_stop[here] = np.arange(slot + 1, end + 1)
                block = None
            else:
                places = slice(patch, patch + rule.num_places(part.rows, part.cols))
                _check_picture(part, places.stop, image + 1, budgets)
                modality[here] = VISION
                key_stop[here] = np.arange(slot + 1, end + 1)
                if rule.bidirectional:
                    block = block if block is not None and rule.join_adjacent else slot
                    key_stop[block:end] = end
                there = slice(places.start + rule.cls, places.stop)
                vision_slot[token:token + size] = np.arange(slot, end)
                vision_source[token:token + size] = rule.sources(part.rows, part.cols, places.start, image)
                pixels[places.start:there.start] = 0
                pixels[there] = part.pixels
                patch_row[there], patch_col[there] = np.divmod(np.arange(len(part.pixels)), part.cols)
                image_id[places] = image
                patch_start[places], patch_stop[places] = places.start, places.stop
                grid[image] = part.rows, part.cols
                patch, image, token = places.stop, image + 1, token + size
            slot = end
        key_start[first:slot] = first
        if rule.route_token:
            key_start[first + 1:slot], route_slot[first:slot] = first + 1, first
        positions[first:slot] = np.arange(slot - first)
        segment_id[first:slot] = number
        if slot > first:
            learned = supervised[first + 1:slot]
            targets[first:slot - 1] = tokens[first + 1:slot] * learned
            loss_mask[first:slot - 1] = learned

    pixels[patch:] = 0
    patches = Patches(pixels, patch_row, patch_col, image_id, grid, patch_start, patch_stop)
    return Batch(
        tokens=tokens, targets=targets, loss_mask=loss_mask, modality=modality,
        key_start=key_start, key_stop=key_stop, positions=positions,
        route_slot=route_slot, segment_id=segment_id,
        vision_slot=vision_slot, vision_source=vision_source,
        patches=patches if patch_dim else None,
        tally=np.asarray([[len(segments), 0, 0]] if tally is None else tally, np.int32))


def _check_picture(picture: Picture, patches: int, images: int, budgets: Budgets) -> None:
    if patches > budgets.patches or images > budgets.images:
        raise ValueError(f'{patches} patches of {images} images do not fit into a row of {budgets.patches} '
                         f'patches and {budgets.images} images.')
    expected = (picture.rows * picture.cols, budgets.patch_dim)
    if picture.pixels.shape != expected or picture.pixels.dtype != budgets.pixel_dtype:
        raise ValueError(f'a picture of {picture.rows} x {picture.cols} patches needs pixels '
                         f'{budgets.pixel_dtype}{list(expected)}; these are '
                         f'{picture.pixels.dtype}{list(picture.pixels.shape)}.')


def stack(rows: Sequence[Batch], pixels: Array | None = None) -> Batch:
    """The rows as one batch: every leaf gets a leading dimension B.

    pixels: u8|f32[B, P, patch_dim] those of all rows, where the rows' own are views of them.
    """
    patches = None
    if rows[0].patches is not None:
        own, *others = zip(*(row.patches for row in rows))
        patches = Patches(np.stack(own) if pixels is None else pixels, *map(np.stack, others))
    leaves = [np.stack(leaves) for leaves in zip(*(row._replace(patches=0) for row in rows))]
    return Batch(*leaves)._replace(patches=patches)


class Plan(NamedTuple):
    """Which samples share a row.

    starts: i64[rows + 1] where the rows begin in `samples`.    samples: i64[n] samples of all rows.
    """

    starts: Array
    samples: Array


def plan(lengths: Array, budgets: Budgets, seed: int | tuple[int, ...], *, pack: bool = True, max_open: int = 64) -> Plan:
    """Every sample in exactly one row, the rows in random order; a pure function of its arguments.

    The samples come in an order drawn from the seed; each goes to the row that has the fewest slots left among the open ones
    with room for it, or opens a new one (at most `max_open` are open: the fullest is closed).

    Args:
        lengths: i[n, 3] slots, patches and images of each sample.
        budgets: sizes of a row.
        seed: of the order.
        pack: False gives each sample a row of its own.
        max_open: rows considered at a time; more fill rows better and take longer.
    Raises:
        ValueError: a sample is larger than a row.
    """
    lengths = np.asarray(lengths).reshape(-1, 3)
    limits = budgets.slots, budgets.patches, budgets.images
    too_large = (lengths > limits).any(1)
    if too_large.any():
        raise ValueError(f'sample {int(too_large.argmax())} is larger than a row of {list(limits)}.')
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(lengths))
    if not pack:
        return Plan(np.arange(len(order) + 1), order)
    rows = _best_fit(lengths, order, limits, max_open)
    rows = [rows[number] for number in rng.permutation(len(rows))]  # the last ones are less full than the others
    starts = np.cumsum([0, *map(len, rows)])
    return Plan(starts, np.concatenate([np.zeros(0, np.int64), *rows]))


def _best_fit(lengths: Array, order: Array, limits: tuple[int, int, int], max_open: int) -> list[Array]:
    rows: list[Array] = []
    opened: list[list[int]] = [[] for _ in range(max_open)]
    slots, patches, images = room = np.tile(np.array(limits)[:, None], (1, max_open))
    none = limits[0] + 1
    for block in range(0, len(order), 1 << 16):  # Python numbers of all samples at once would take much memory
        samples = order[block:block + (1 << 16)]
        for sample, (some_slots, some_patches, some_images) in zip(samples.tolist(), lengths[samples].tolist()):
            fits = (slots >= some_slots) & (patches >= some_patches) & (images >= some_images)
            # Empty rows have the most room, so they are taken only when no started row fits.
            left = np.where(fits, slots, none)
            best = int(left.argmin())
            if left[best] == none:
                best = int(slots.argmin())
                rows.append(np.array(opened[best], np.int64))
                opened[best] = []
                room[:, best] = limits
            opened[best].append(sample)
            slots[best] -= some_slots
            patches[best] -= some_patches
            images[best] -= some_images
    return rows + [np.array(row, np.int64) for row in opened if row]
