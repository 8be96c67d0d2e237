"""Pictures a second: a bare decode-and-resize loop, and the loader that feeds training."""
import concurrent.futures
import itertools
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import PIL.Image

from vora_jax.bench.data_pictures import Photographs
from vora_jax.bench.data_turns import Side
from vora_jax.data.config import Data, ImagePolicy, Source

# A row holds so many pictures, and so many slots for the text beside each of them.
ROW_PICTURES, TEXT_SLOTS = 4, 64
# Batches whose mean time tells how long a new one takes, waits for a new one that show empty buffers, and the most batches
# taken out of them.
WARM, WAITS, MAX_BUFFERED = 6, 4, 200


def data_config(photographs: Photographs, side: int, patch_size: int, decoder: str) -> Data:
    """Square pictures of `side` pixels, four a row."""
    patches = (side // patch_size) ** 2
    image = ImagePolicy(kind='square_stretch', side=side, max_patches=patches, decoder=decoder)
    return Data((Source(photographs.rows),), photographs.tokenizer, max_slots=ROW_PICTURES * (patches + TEXT_SLOTS),
                max_patches=ROW_PICTURES * patches, max_images=ROW_PICTURES, image=image)


def bare(files: Sequence[str], count: int, side: int, decoder: str, threads: int = 1) -> Side:
    """`count` pictures read, decoded and resized, nothing else; the next ones with each call."""
    endless = itertools.cycle(files)
    read = BARE[decoder]

    def loop(names: Sequence[str]) -> None:
        for name in names:
            read(name, side)

    def call() -> int:
        names = list(itertools.islice(endless, count))
        if threads == 1:
            loop(names)
        else:
            with concurrent.futures.ThreadPoolExecutor(threads) as pool:
                list(pool.map(loop, [names[first::threads] for first in range(threads)]))
        return count
    return Side(call)


def fed(loader: Iterator[Any], count: int) -> Side:
    """`count` pictures or a few more, as batches of a loader that keeps no decoded pictures."""
    next(loader)  # starts the workers
    start = time.perf_counter()
    for _ in range(WARM):
        next(loader)
    usual = (time.perf_counter() - start) / WARM

    def call() -> int:
        pictures = 0
        while pictures < count:
            pictures += num_pictures(next(loader))
        return pictures
    return Side(call, lambda: empty_buffers(lambda: next(loader), usual))


def empty_buffers(take: Callable[[], Any], usual: float) -> None:
    """Takes out what was read ahead, so that what comes next is as new as in the long run; `usual`: seconds of a new one."""
    waits = 0
    for _ in range(MAX_BUFFERED):
        start = time.perf_counter()
        take()
        waits += time.perf_counter() - start > usual / 2
        if waits == WAITS:
            return


def num_pictures(batch: Any) -> int:
    """Pictures in a batch."""
    return 0 if batch.patches is None else int((np.asarray(batch.patches.grid)[..., 0] > 0).sum())


def _pillow(name: str, side: int) -> Any:
    return PIL.Image.open(name).convert('RGB').resize((side, side), PIL.Image.Resampling.BICUBIC)


def _simplejpeg(name: str, side: int) -> Any:
    import simplejpeg
    pixels = simplejpeg.decode_jpeg(pathlib.Path(name).read_bytes(), 'RGB')
    return PIL.Image.fromarray(pixels).resize((side, side), PIL.Image.Resampling.BICUBIC)


BARE = {'pillow': _pillow, 'simplejpeg': _simplejpeg}
