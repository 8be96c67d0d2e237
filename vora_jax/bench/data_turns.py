"""Wall and CPU time of pipelines that take turns."""
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from vora_jax.bench.cpu_clock import cpu_seconds, settle


class Side(NamedTuple):
    """Something to measure.

    call() -> how many units (pictures, steps) it has done when it returns.
    prepare() is called before it and not timed: a pipeline that has read ahead must not hand that out as work done.
    """

    call: Callable[[], int]
    prepare: Callable[[], Any] = lambda: None


class Cost(NamedTuple):
    """Of one unit. seconds: on the wall. cpu_seconds: of all threads and worker processes of this program."""

    seconds: float
    cpu_seconds: float


def take_turns(sides: Mapping[Any, Side], repeats: int, on_call: Callable[[], Any] = lambda: None) -> dict[Any, Cost]:
    """The median cost of a unit of each side, of so many rounds in which all take turns.

    Before each call the program comes to rest, so that nothing that one side reads ahead falls into another one's time.

    Args:
        sides: by name. Each was warmed up.
        repeats: rounds; every other one runs backwards, so that none of them always follows the same one.
        on_call: is called after each measurement.
    """
    costs: dict[Any, list[Cost]] = {name: [] for name in sides}
    for number in range(repeats):
        for name in list(sides)[::-1 if number % 2 else 1]:
            settle()
            sides[name].prepare()
            costs[name].append(measure(sides[name].call))
            on_call()
    return {name: Cost(*map(statistics.median, zip(*found))) for name, found in costs.items()}


def measure(call: Callable[[], int]) -> Cost:
    """The cost of a unit of one call."""
    wall, cpu = time.perf_counter(), cpu_seconds()
    units = call()
    return Cost((time.perf_counter() - wall) / units, (cpu_seconds() - cpu) / units)
