"""Rows of metrics, made from steps."""
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from vora_jax.training.log.clock import Split
from vora_jax.training.log.yardstick import Yardstick
from vora_jax.training.losses import BY_SOURCE

SUMS = ('num_target_tokens', 'num_text_tokens', 'num_vision_tokens', 'num_samples', 'bad_samples', 'dropped_turns',
        'skipped_steps', *BY_SOURCE)
LATEST = ('lr',)
GIB = 2 ** 30

Step = Mapping[str, np.ndarray]


def summarise(steps: Sequence[Step]) -> dict[str, Any]:
    """One row for several steps: counts are summed, the learning rate is the last, all else is the mean.

    A skipped step changed nothing, and its loss may be NaN: means leave it out, unless there is no other.
    """
    kept = [step for step in steps if not np.any(step.get('skipped_steps', 0))] or steps
    row: dict[str, Any] = {}
    for name in steps[0]:
        values = np.stack([np.asarray(step[name]) for step in (steps if name in SUMS else kept)])
        if name in SUMS:
            row[name] = values.sum(axis=0).tolist()
        elif name in LATEST:
            row[name] = float(np.asarray(steps[-1][name]))
        else:
            row[name] = values.mean(axis=0, dtype=np.float64).tolist()
    return row


def timing(steps: Sequence[Step], split: Split, yardstick: Yardstick) -> dict[str, float]:
    """What a row tells of time: seconds per step and its parts, which add up to it, and rates.

    Args:
        steps: those that the split timed; may be none.
        split: of their whole time.
    """
    count, seconds = len(steps), split.total
    row: dict[str, float] = {'num_timed_steps': count}
    if not count or seconds <= 0:
        return row
    row['seconds_per_step'] = seconds / count
    row |= {f'{name}_seconds': spent / count for name, spent in split._asdict().items()}
    text, vision = (sum(int(step[name]) for step in steps) for name in ('num_text_tokens', 'num_vision_tokens'))
    tokens = {'text': text, 'vision': vision,
              'pad': sum(float(step['pad_fraction']) for step in steps) * yardstick.num_slots}
    row['tokens_per_second'] = (text + vision) / seconds
    row |= {f'{kind}_tokens_per_second_per_chip': number / seconds / yardstick.num_chips for kind, number in tokens.items()}
    if yardstick.flops and yardstick.peak_flops:
        numbers = [name for name, value in steps[0].items() if np.ndim(value) == 0]
        model, executed = yardstick.flops({name: sum(float(step[name]) for step in steps) / count for name in numbers})
        possible = yardstick.peak_flops * yardstick.num_chips * seconds / count
        row |= {'mfu': model / possible, 'hfu': executed / possible}
    return row


def memory() -> dict[str, float]:
    """GiB in use, now and at most so far, on the fullest device of this process; nothing where devices do not tell."""
    stats = [found for device in jax.local_devices() if (found := device.memory_stats())]
    names = {'memory_gib': 'bytes_in_use', 'peak_memory_gib': 'peak_bytes_in_use'}
    return {name: max(one[key] for one in stats) / GIB for name, key in names.items() if stats and key in stats[0]}


def scalars(row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """(tag, value) of everything in a row; the values of a list have tags of their own: `name/0`, `name/1`, ..."""
    for name, value in row.items():
        if isinstance(value, list):
            yield from ((f'{name}/{number}', float(one)) for number, one in enumerate(value))
        else:
            yield name, float(value)


def median(values: Sequence[float]) -> float:
    """0 where there is none."""
    return statistics.median(values) if values else 0.0
