"""Progress of a run in the terminal."""
import sys
from collections.abc import Mapping
from typing import Any

import tqdm

SLOW_DATA = 0.1  # share of a step from which waiting for data is told


class Progress:
    """A bar in a terminal; a log file gets a line for each row instead."""

    def __init__(self, start: int, steps: int):
        self._steps = steps
        self._bar = tqdm.tqdm(total=steps, initial=start, unit='step', dynamic_ncols=True, disable=None)

    def write(self, row: Mapping[str, Any]) -> None:
        seconds = row.get('seconds_per_step', 0.0)
        told = f'loss {row["loss"]:.4f}, {row.get("tokens_per_second", 0):,.0f} tokens/s'
        if 'mfu' in row:
            told += f', MFU {row["mfu"]:.1%}'
        if row.get('skipped_steps'):
            told += f', {row["skipped_steps"]} skipped'
        if seconds and row['data_seconds'] > SLOW_DATA * seconds:
            told += f', waits for data {row["data_seconds"] / seconds:.0%}'
        if not self._bar.disable:
            self._bar.set_postfix_str(told, refresh=False)
            self._bar.update(row['step'] - self._bar.n)
        else:
            left = tqdm.tqdm.format_interval((self._steps - row['step']) * seconds)
            print(f'step {row["step"]}/{self._steps}, {told}, {left} left', file=sys.stderr, flush=True)

    def close(self) -> None:
        self._bar.close()
