"""Sums a complete run up in summary.json."""
import json

from vora_jax.data.loader import Loader
from vora_jax.training.checkpoints.record import Record
from vora_jax.training.checkpoints.storage import Path
from vora_jax.training.log.goodput import Goodput
from vora_jax.training.log.metrics import Log
from vora_jax.training.losses import BY_SOURCE


def write_summary(folder: Path, record: Record, loss: float, num_params: tuple[int, int], progress: Log, goodput: Goodput,
                  data: Loader) -> None:
    """Writes folder/summary.json; called by the first process.

    Args:
        record: of the last step.
        loss: of the last row.
        num_params: trainable, all.
    """
    summary = {
        'steps': record.step, 'seconds': record.seconds, 'loss': loss,
        'trainable_params': num_params[0], 'total_params': num_params[1],
        'tokens_per_second': progress.tokens_per_second, **progress.padding,
        'goodput': goodput.share, 'wall_seconds': goodput.wall, 'lost_seconds': goodput.lost,
        'epochs': data.epoch(record.data),
        'num_samples': record.num_samples, 'bad_samples': record.bad_samples,
        **{name: dict(zip(data.source_names, counts)) for name, counts in zip(BY_SOURCE, record.by_source)},
    }
    (folder / 'summary.json').write_text(json.dumps(summary, indent=1) + '\n')
