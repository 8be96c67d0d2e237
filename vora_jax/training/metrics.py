"""Metrics: JSON lines, TensorBoard, progress bar."""
import json
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import tqdm

from vora_jax.training.losses import BY_SOURCE

SUMS = ('num_target_tokens', 'num_text_tokens', 'num_vision_tokens', 'num_samples', 'bad_samples', 'dropped_turns',
        *BY_SOURCE)
LATEST = ('lr',)


def summarise(rows: Sequence[Mapping[str, np.ndarray]]) -> dict[str, Any]:
    """One row for several steps: counts are summed, the learning rate is the last, all else is the mean."""
    row: dict[str, Any] = {}
    for name in rows[0]:
        values = np.stack([np.asarray(step[name]) for step in rows])
        if name in SUMS:
            row[name] = values.sum(axis=0).tolist()
        elif name in LATEST:
            row[name] = float(values[-1])
        else:
            row[name] = values.mean(axis=0, dtype=np.float64).tolist()
    return row


class Log:
    """Where the rows of a run go: workdir/metrics.jsonl, TensorBoard if it is installed, and the terminal.

    Only the first process writes. Rows after the resumed step are cut off: they will be written again.
    """

    def __init__(self, workdir: pathlib.Path, start: int, steps: int):
        self._rates: list[float] = []
        self._pad: dict[str, list[float]] = {'pad_fraction': [], 'patch_pad_fraction': []}
        self._steps, self._untimed, self._since = steps, 0, None
        self._on = jax.process_index() == 0
        if self._on:
            path = workdir / 'metrics.jsonl'
            _truncate(path, start)
            self._file = open(path, 'a', encoding='utf-8')
            self._board = _Board.open(workdir / 'tensorboard', start)
            # A bar needs a terminal; a log file gets a line for each row instead.
            self._bar = tqdm.tqdm(total=steps, initial=start, unit='step', dynamic_ncols=True, disable=None)

    @property
    def tokens_per_second(self) -> float:
        """Median over the rows so far; 0 before there is one."""
        return statistics.median(self._rates) if self._rates else 0.0

    @property
    def padding(self) -> dict[str, float]:
        """Mean shares of slots, and of places for patches where there are any, that are padding."""
        return {name: statistics.fmean(values) for name, values in self._pad.items() if values}

    @property
    def waits_for_first_step(self) -> bool:
        """True until `start_clock`."""
        return self._since is None

    def start_clock(self) -> None:
        """Call when the first step is complete: it held the compilation and does not count."""
        self._untimed, self._since = 1, time.perf_counter()

    def write(self, step: int, steps: Sequence[Mapping[str, np.ndarray]]) -> dict[str, Any]:
        """Adds and returns one row for the given steps, which end with number `step`."""
        row = {'step': step, **summarise(steps)}
        now = time.perf_counter()
        timed, elapsed = steps[self._untimed:], now - self._since
        self._untimed, self._since = 0, now
        for name, values in self._pad.items():
            values += [float(one[name]) for one in steps if name in one]
        if timed:
            tokens = sum(int(one['num_text_tokens']) + int(one['num_vision_tokens']) for one in timed)
            row['tokens_per_second'] = tokens / elapsed
            self._rates.append(tokens / elapsed)
        if self._on:
            self._file.write(json.dumps(row) + '\n')
            self._file.flush()
            if self._board:
                self._board.write(step, row)
            self._show(row, elapsed / len(timed) if timed else 0.0)
        return row

    def close(self) -> None:
        if self._on:
            self._bar.close()
            self._file.close()
            if self._board:
                self._board.close()

    def _show(self, row: dict[str, Any], seconds_per_step: float) -> None:
        told = f'loss {row["loss"]:.4f}, {row.get("tokens_per_second", 0):,.0f} tokens/s'
        if not self._bar.disable:
            self._bar.set_postfix_str(told, refresh=False)
            self._bar.update(row['step'] - self._bar.n)
        else:
            left = tqdm.tqdm.format_interval((self._steps - row['step']) * seconds_per_step)
            print(f'step {row["step"]}/{self._steps}, {told}, {left} left', file=sys.stderr, flush=True)


def _truncate(path: pathlib.Path, last: int) -> None:
    """Keeps the rows up to step `last`; a line that a killed process left unfinished goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding='utf-8').splitlines():
        try:
            if json.loads(line)['step'] <= last:
                kept.append(line + '\n')
        except (ValueError, KeyError, TypeError):
            break
    temporary = path.with_suffix('.tmp')
    temporary.write_text(''.join(kept), encoding='utf-8')
    os.replace(temporary, path)


class _Board:
    """TensorBoard event files, by TensorBoard's own writer (no TensorFlow)."""

    def __init__(self, folder: pathlib.Path, start: int, writer: Any, event_pb2: Any, summary_pb2: Any):
        self._writer = writer.EventFileWriter(str(folder))
        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        # Tells TensorBoard to forget what an earlier process wrote for later steps.
        restart = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._writer.add_event(self._event(wall_time=time.time(), step=start + 1, session_log=restart))

    @staticmethod
    def open(folder: pathlib.Path, start: int) -> '_Board | None':
        """None where the `tensorboard` extra is not installed."""
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer import event_file_writer
        except ImportError:
            return None
        return _Board(folder, start, event_file_writer, event_pb2, summary_pb2)

    def write(self, step: int, row: Mapping[str, Any]) -> None:
        values = []
        for name, value in row.items():
            many = value if isinstance(value, list) else [value]
            for i, one in enumerate(many):
                tag = f'{name}/{i}' if isinstance(value, list) else name
                values.append(self._summary.Value(tag=tag, simple_value=float(one)))
        event = self._event(wall_time=time.time(), step=step, summary=self._summary(value=values))
        self._writer.add_event(event)

    def close(self) -> None:
        self._writer.close()
