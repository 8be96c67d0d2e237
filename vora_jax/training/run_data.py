"""The batches of a run."""
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import tqdm

from vora_jax.data import loader
from vora_jax.training.checkpoints.storage import Path, local_side
from vora_jax.training.checkpoints.workdir import fetch_quarantine, quarantine_file
from vora_jax.training.config import Train
from vora_jax.training.mesh.row_shards import RowShard
from vora_jax.types import UserError

log = logging.getLogger(__name__)

LOOSE = 0.15  # share of padding from which another budget is proposed


def open_data(config: Train, folder: Path, shard: RowShard, alive: Callable[[], None] = lambda: None) -> loader.Loader:
    """This process's share of the batches, at their beginning; tells how large an epoch is.

    Args:
        config: the run.
        shard: the rows that this process reads.
        folder: its workdir: keeps `data/`, the index and plans, and `quarantine.jsonl`, what could not be used. For a remote
            one they lie on this machine, and the second is copied there with each checkpoint.
        alive: is called now and then while samples are measured, which may take hours.
    Raises:
        UserError: the data cannot be used, or its tokenizer has more ids than the model.
    """
    index, count = jax.process_index(), jax.process_count()

    def progress(chunks: Iterable, **told: Any) -> Iterator:
        for chunk in tqdm.tqdm(chunks, leave=False, disable=None if index == 0 else True, unit='chunk', **told):
            alive()
            yield chunk

    fetch_quarantine(folder)
    folder = local_side(folder)
    folder.mkdir(parents=True, exist_ok=True)
    data = loader.batches(
        config.data, config.method.vision_tokens, config.batch_rows, config.seed, shard, config.workers,
        process=(index, count), quarantine=str(folder / quarantine_file()), cache=str(folder / 'data'), progress=progress)
    vocab_size = config.method.stage(config.stage).model.vocab_size
    if data.vocab_size > vocab_size:
        raise UserError(f'{config.data.tokenizer} is a tokenizer of {data.vocab_size} ids, but the model has '
                        f'vocab_size = {vocab_size}; give the model at least as many.')
    slots, patches = data.padding
    log.info('an epoch is %s of %s samples in %s rows, %.1f steps; padding: %.1f %% of slots, %.1f %% of patches',
             f'{data.epoch_samples:,}', f'{data.num_samples:,}', f'{data.num_rows:,}', data.num_rows / config.batch_rows,
             100 * slots, 100 * patches)
    if config.data.pack and patches > LOOSE and data.max_patches_hint < config.data.max_patches:
        log.info('Data.max_patches = %d would hold as many pictures with less padding', data.max_patches_hint)
    return data
