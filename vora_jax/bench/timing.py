"""Times of calls that take turns."""
import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

# Short calls are repeated, so that waiting for the result does not count for much.
MIN_SECONDS = 0.02


def median_seconds(calls: Mapping[Any, Callable[[], Any]], repeats: int, on_call: Callable[[], Any] = lambda: None,
                   ) -> dict[Any, float]:
    """The median time of each call, in seconds, of so many rounds in which all take turns.

    Args:
        calls: return arrays, which are waited for, or are done when they return. They have run once: compilation is over.
        repeats: rounds; every other one runs backwards, so that none of them always follows the same one.
        on_call: is called after each measurement and once for each call before the first of them.
    """
    often = {}
    for name, call in calls.items():
        often[name] = max(1, math.ceil(MIN_SECONDS / _seconds(call, 1)))
        on_call()
    seconds = {name: [] for name in calls}
    for number in range(repeats):
        for name in list(calls)[::-1 if number % 2 else 1]:
            seconds[name].append(_seconds(calls[name], often[name]))
            on_call()
    return {name: statistics.median(times) for name, times in seconds.items()}


def _seconds(call: Callable[[], Any], often: int) -> float:
    start = time.perf_counter()
    for _ in range(often):
        result = call()
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / often
