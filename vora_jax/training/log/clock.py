"""Where the host's time goes."""
import time
from collections.abc import Callable
from typing import NamedTuple


class Split(NamedTuple):
    """Seconds by what the host did.

    data: waited for the next batch.    device: waited for the devices to finish a step.    save: stood still for a
    checkpoint.    host: all else (Python, dispatch, writing rows).
    """

    data: float
    device: float
    save: float
    host: float

    @property
    def total(self) -> float:
        return sum(self)


class Clock:
    """Splits the time since it was made, or since the last `take`.

        with clock.part('data'):
            batch = next(batches)

    The host runs ahead of the devices: what it waits for them is what its own work and the data leave of a step. On
    CPU a dispatch may itself run the step, which then counts as 'host'.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter):
        self._now, self._since = now, now()
        self._parts = {name: _Part(now) for name in Split._fields[:-1]}

    def part(self, name: str) -> '_Part':
        """A context whose time counts as `name`; contexts are not nested."""
        return self._parts[name]

    def take(self) -> Split:
        """The split until now; the next one starts here, so that none of the time is lost between two."""
        now = self._now()
        spent, self._since = now - self._since, now
        parts = [part.take() for part in self._parts.values()]
        return Split(*parts, host=spent - sum(parts))


class _Part:
    def __init__(self, now: Callable[[], float]):
        self._now, self._spent, self._begun = now, 0.0, 0.0

    def __enter__(self) -> None:
        self._begun = self._now()

    def __exit__(self, *_: object) -> None:
        self._spent += self._now() - self._begun

    def take(self) -> float:
        spent, self._spent = self._spent, 0.0
        return spent
