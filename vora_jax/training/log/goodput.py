"""Productive time of a run, over its restarts.

A run's wall time begins with its first process. Productive is what the steps took that the run still has; the rest is
lost, and this file says to what.
"""
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from vora_jax.training.checkpoints.storage import Path
from vora_jax.training.log.clock import Split
from vora_jax.training.log.json_lines import JsonLines, read_rows, rewrite

FILE = 'history.jsonl'


class Goodput(NamedTuple):
    """Seconds; all but the first add up to it.

    wall: since the run's first start, without the time between its completion and a restart with more steps.
    productive: the steps that count, without what they waited for data and checkpoints.
    start: of each process, until its first step was complete: building, compiling, restoring.
    data: waited for batches.    save: stood still for checkpoints.
    repeated: steps done after the last checkpoint of a process that was killed: they were done again.
    stopped: all else: between processes, and starts and ends that nothing was written of.
    """

    wall: float
    productive: float
    start: float
    data: float
    save: float
    repeated: float
    stopped: float

    @property
    def share(self) -> float:
        """Productive / wall."""
        return self.productive / self.wall if self.wall > 0 else 0.0

    @property
    def lost(self) -> dict[str, float]:
        """Seconds lost, by reason."""
        return {name: getattr(self, name) for name in self._fields[2:]}

    def __str__(self) -> str:
        told = ', '.join(f'{name} {seconds:,.1f}' for name, seconds in self.lost.items() if seconds >= 0.05)
        return (f'goodput {self.share:.3f}: {self.productive:,.1f} of {self.wall:,.1f} s went into steps'
                + (f' (lost: {told})' if told else ''))


class History:
    """When the processes of a run started, stepped and ended: a few lines in workdir/history.jsonl.

    Each is on disk before what it tells of can be lost, so that `kill -9` costs nothing but the end.
    """

    def __init__(self, workdir: Path, begun: float, step: int, rows: Sequence[Mapping[str, Any]] = (),
                 now: Callable[[], float] = time.time):
        """Opens the history and adds this process.

        Args:
            begun: when it started, in seconds since 1970.
            step: after which it goes on.
            rows: of metrics.jsonl as the last process left it; those after `step` will be repeated.
        """
        self._now = now
        kept = [_split(row) for row in rows if row.get('step', 0) <= step]
        repeated = sum(_split(row).total for row in rows if row.get('step', 0) > step)
        self._spent = Split(*map(sum, zip(*kept))) if kept else Split(0.0, 0.0, 0.0, 0.0)
        self._events = read_rows(workdir / FILE)
        rewrite(workdir / FILE, self._events)  # without half a line of a killed process
        self._lines = JsonLines(workdir / FILE)
        self._add('start', begun, step=step, repeated_seconds=repeated)

    def stepping(self) -> None:
        """The first step of this process is complete."""
        self._add('stepping', self._now())

    def spend(self, split: Split) -> None:
        """Time since the first step, which is now in metrics.jsonl."""
        self._spent = Split(*map(sum, zip(self._spent, split)))

    def goodput(self) -> Goodput:
        """Of the run until now."""
        return account(self._events, self._spent, self._now())

    def close(self, complete: bool) -> None:
        self._add('complete' if complete else 'stopped', self._now())
        self._lines.close()

    def _add(self, event: str, at: float, **more: Any) -> None:
        self._events.append({'event': event, 'unix_seconds': at, **more})
        self._lines.write(self._events[-1])


def account(events: Sequence[Mapping[str, Any]], spent: Split, now: float) -> Goodput:
    """The goodput of a run.

    Args:
        events: its history, in order; 'start' comes first.
        spent: the time of all steps that the run still has, but for the first of each process.
        now: seconds since 1970, as the history has them.
    """
    wall, start, before = now - events[0]['unix_seconds'], 0.0, events[0]
    for event in events[1:]:
        passed = event['unix_seconds'] - before['unix_seconds']
        if before['event'] == 'complete':
            wall -= passed
        elif event['event'] == 'stepping':
            start += passed
        before = event
    repeated = sum(event.get('repeated_seconds', 0.0) for event in events)
    productive = spent.device + spent.host
    told = productive + start + spent.data + spent.save + repeated
    return Goodput(max(wall, told), productive, start, spent.data, spent.save, repeated, max(wall - told, 0.0))


def _split(row: Mapping[str, Any]) -> Split:
    """The time that a row tells of; none in rows without it."""
    count = row.get('num_timed_steps', 0)
    return Split(*(count * row.get(f'{name}_seconds', 0.0) for name in Split._fields))
