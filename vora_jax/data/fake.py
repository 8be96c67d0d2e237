"""Random but well-formed batches for tests."""
import numpy as np

from vora_jax.batch import Batch
from vora_jax.data.packing import Budgets, Picture, Text, layout, stack
from vora_jax.method import VisionTokenRule


def fake_batch(rows: int, slots: int, patches: int, patch_size: int, vocab_size: int, max_images: int,
               seed: int, text_only: bool = False, rule: VisionTokenRule | None = None) -> Batch:
    """A batch of random packed rows: several segments, pictures of random grids, supervised and plain text,
    padding.

    Args:
        rows, slots, patches, max_images: B, S, P and M of the batch.
        patch_size: side of a patch in pixels.
        vocab_size: token ids are drawn from 1 to vocab_size - 1.
        seed: the batch is a pure function of the arguments.
        text_only: no pictures and `patches=None`.
        rule: how pictures become slots.
    """
    rng = np.random.default_rng(seed)
    budgets = Budgets(slots) if text_only else Budgets(slots, patches, max_images, patch_size ** 2 * 3)
    return stack([layout(random_segments(rng, budgets, vocab_size, rule), budgets, rule=rule) for _ in range(rows)])


def random_segments(rng: np.random.Generator, budgets: Budgets, vocab_size: int,
                    rule: VisionTokenRule | None = None) -> list[list[Text | Picture]]:
    """Random segments that fit: pictures at the start, at the end, adjacent; a tail is often left empty."""
    slots = int(budgets.slots * rng.choice([1.0, 0.9, 0.6]))
    patches, images = (budgets.patches, budgets.images) if budgets.patch_dim else (0, 0)
    longest = max(2, min(budgets.slots // 4, 12))
    segments: list[list[Text | Picture]] = []
    rule = rule or VisionTokenRule(1)
    slots -= rule.route_token
    while slots > 0:
        segment: list[Text | Picture] = []
        for _ in range(rng.integers(1, 7)):
            if images and rng.random() < 0.4:
                rows, cols = (int(side) for side in rng.integers(1, max(2, int(budgets.patches ** 0.5)), 2))
                tokens, places = rule.num_tokens(rows, cols), rule.num_places(rows, cols)
                if tokens > slots or places > patches:
                    continue
                pixels = rng.integers(0, 256, (rows * cols, budgets.patch_dim)).astype(budgets.pixel_dtype)
                segment.append(Picture(pixels, rows, cols))
                slots, patches, images = slots - tokens, patches - places, images - 1
            elif slots:
                size = int(rng.integers(1, min(slots, longest) + 1))
                segment.append(Text(rng.integers(1, vocab_size, size).tolist(), bool(rng.random() < 0.5)))
                slots -= size
        if segment:
            segments.append(segment)
            slots -= rule.route_token
    return segments
