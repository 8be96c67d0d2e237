"""Counts of values, to be merged and summed up."""
from collections import Counter
from typing import Any, Iterable, Mapping

Tallies = dict[str, Counter]  # of a quantity, how often each value was seen


def add(tallies: Tallies, **values: int) -> None:
    """Counts one value of each quantity."""
    for name, value in values.items():
        tallies.setdefault(name, Counter())[value] += 1


def stored(tallies: Tallies) -> dict[str, list[list[int]]]:
    """As JSON, in an order of its own: [value, times] pairs."""
    return {name: [[value, tally[value]] for value in sorted(tally)] for name, tally in sorted(tallies.items())}


def merged(stores: Iterable[Mapping[str, Any]]) -> Tallies:
    """What several `stored` tallies are together."""
    tallies: Tallies = {}
    for store in stores:
        for name, pairs in store.items():
            tally = tallies.setdefault(name, Counter())
            for value, times in pairs:
                tally[value] += times
    return tallies


def summary(tally: Mapping[int, int]) -> dict[str, int]:
    """Sum, min, median, p95 and max: values that were seen; p95 is the smallest that 95 % of all do not exceed."""
    values = sorted(tally)
    quantiles = {}
    for name, percent in (('median', 50), ('p95', 95)):
        below, needed = 0, sum(tally.values()) * percent
        for value in values:
            below += tally[value]
            if below * 100 >= needed:
                quantiles[name] = value
                break
    return {'sum': sum(value * times for value, times in tally.items()), 'min': values[0], **quantiles, 'max': values[-1]}
