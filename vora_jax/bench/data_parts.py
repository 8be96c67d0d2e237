"""Where the CPU time of a packed picture goes, part by part, in one thread."""
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from vora_jax.batch import Batch
from vora_jax.bench.data_pictures import Photographs
from vora_jax.data.config import Data
from vora_jax.data.images.decode import decode
from vora_jax.data.images.patches import load_pictures
from vora_jax.data.packing import Budgets, Text, layout, stack
from vora_jax.data.sources.open_rows import open_rows
from vora_jax.data.text.conversation import render_turns
from vora_jax.data.text.templates import find_template
from vora_jax.data.text.tokenizer import load_tokenizer
from vora_jax.method import VisionTokenRule

REPEATS = 5


def cpu_parts(photographs: Photographs, data: Data, rule: VisionTokenRule, batch_rows: int) -> dict[str, float]:
    """CPU seconds a picture of each part: medians of `REPEATS` passes over the pictures of one batch.

    Args:
        photographs, data, rule: what `loader.batches` would read.
        batch_rows: rows of a batch.
    """
    numbers = np.arange(batch_rows * data.max_images) % len(photographs.files)
    files = [photographs.files[number] for number in numbers]
    source, tokenizer, template = open_rows(photographs.rows), load_tokenizer(data.tokenizer), find_template(data.template)
    budgets = Budgets(data.max_slots, data.max_patches, data.max_images, 3 * rule.patch_size ** 2)
    decoder = data.image.decoder

    def load() -> list[list[Any]]:
        return [load_pictures(file, rule.patch_size, data.image) for file in files]

    def lay_out() -> Batch:
        pixels = np.empty((batch_rows, budgets.patches, budgets.patch_dim), np.uint8)
        return stack([layout(segments[row * data.max_images:(row + 1) * data.max_images], budgets, None, rule, pixels[row])
                      for row in range(batch_rows)], pixels)
    segments = [[*pictures, Text([1] * 40, True)] for pictures in load()]
    batch = lay_out()
    found = _cpu_seconds({
        'decode': lambda: [decode(file, decoder=decoder) for file in files],
        'resize, cut into patches': load,  # with decoding, which is taken off below
        'row and tokens': lambda: [render_turns(source[int(n)], tokenizer, template, photographs.rows) for n in numbers],
        'lay out a batch': lay_out,
        'copy from a worker': lambda: [np.array(leaf) for leaf in batch.patches],
    })
    found['resize, cut into patches'] -= found['decode']
    return {name: seconds / len(files) for name, seconds in found.items()}


def _cpu_seconds(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(REPEATS):
        for name, call in calls.items():
            start = time.thread_time()
            call()
            times[name].append(time.thread_time() - start)
    return {name: statistics.median(seconds) for name, seconds in times.items()}
