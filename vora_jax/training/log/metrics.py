"""Where the rows of a run go: metrics.jsonl, TensorBoard, W&B, terminal."""
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from vora_jax.training.checkpoints.storage import Path, local_side
from vora_jax.training.checkpoints.workdir import send_logs
from vora_jax.training.log import json_lines, wandb_run
from vora_jax.training.log.board import open_board
from vora_jax.training.log.clock import Clock, Split
from vora_jax.training.log.goodput import Goodput, History
from vora_jax.training.log.progress import Progress
from vora_jax.training.log.rows import median, memory, summarise, timing
from vora_jax.training.log.yardstick import Yardstick

PADDING = ('pad_fraction', 'patch_pad_fraction')


class Log:
    """Turns steps into rows and hands them on; only the first process writes.

    Rows after the resumed step are cut off: they will be written again.
    """

    def __init__(self, workdir: Path, start: int, steps: int, yardstick: Yardstick, clock: Clock,
                 begun: float | None = None, project: str = '', config_text: str = ''):
        """Opens the files of a run.

        Args:
            start, steps: steps done, steps of the whole run.
            clock: whose time the rows tell of; the caller marks its parts.
            begun: when the process started, in seconds since 1970; now, if None.
            project, config_text: as `wandb_run.open_run` has them.
        """
        self._workdir, self._yardstick, self._clock = workdir, yardstick, clock
        self._rates: list[float] = []
        self._shares: dict[str, list[float]] = {name: [] for name in PADDING}
        self._untimed, self._running = 0, False
        self._sinks, self._history = [], None
        if jax.process_index() == 0:
            path = workdir / 'metrics.jsonl'
            rows = json_lines.read_rows(path)
            # First, so that a process killed in between leaves at worst the same rows to count again.
            self._history = History(workdir, time.time() if begun is None else begun, start, rows)
            json_lines.rewrite(path, [row for row in rows if row.get('step', start + 1) <= start])
            sinks = (json_lines.JsonLines(path), open_board(str(local_side(workdir) / 'tensorboard'), start),
                     wandb_run.open_run(project, workdir, config_text), Progress(start, steps))
            self._sinks = [sink for sink in sinks if sink]

    @property
    def tokens_per_second(self) -> float:
        """Median over the rows so far; 0 before there is one."""
        return median(self._rates)

    @property
    def padding(self) -> dict[str, float]:
        """Mean shares of slots, and of places for patches where there are any, that are padding."""
        return {name: float(np.mean(values)) for name, values in self._shares.items() if values}

    @property
    def goodput(self) -> Goodput | None:
        """Of the run until now; None but in the first process."""
        return self._history.goodput() if self._history else None

    @property
    def waits_for_first_step(self) -> bool:
        """True until `start_clock`."""
        return not self._running

    def start_clock(self) -> None:
        """Call when the first step is complete: it held the compilation and does not count."""
        self._untimed, self._running = 1, True
        self._clock.take()
        if self._history:
            self._history.stepping()

    def write(self, step: int, steps: Sequence[Mapping[str, np.ndarray]]) -> dict[str, Any]:
        """Adds and returns one row for the given steps, which end with number `step` and are complete."""
        split, timed = self._clock.take(), steps[self._untimed:]
        self._untimed = 0
        row = {'step': step, **summarise(steps), **timing(timed, split, self._yardstick), **memory()}
        for name, values in self._shares.items():
            values += [float(one[name]) for one in steps if name in one]
        if 'tokens_per_second' in row:
            self._rates.append(row['tokens_per_second'])
        if self._history:
            if timed:  # else nothing tells the next process of this time
                self._history.spend(split)
            row['goodput'] = self._history.goodput().share
        for sink in self._sinks:
            sink.write(row)
        return row

    def close(self, complete: bool) -> Goodput | None:
        """Ends all files; the run's goodput, in the first process."""
        goodput = None
        for sink in self._sinks:
            sink.close()
        if self._history:
            self._history.spend(Split(0.0, 0.0, self._clock.take().save, 0.0))  # the last checkpoint
            goodput = self._history.goodput()
            self._history.close(complete)
            send_logs(self._workdir)  # what was written since the last checkpoint
        return goodput
