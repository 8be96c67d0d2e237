"""In what two configurations differ.

Which differences may be: a resumed run must agree with itself in all *identity* fields; *free* ones may change between
restarts, and are logged.
"""
import dataclasses
from collections.abc import Iterator
from typing import Any

import flax.linen as nn

from vora_jax.training.config import Train

# Fields that may change between restarts of one run; all others are identity. '*' stands for every field of a
# class. Where data lies on disk is free: the manifest hash tells whether rows, picture sizes and tokenizer are the same.
FREE = {
    'Train': ('steps', 'mesh', 'checkpoint', 'log_every', 'workers', 'attention', 'profile_steps', 'wandb', 'hang_seconds'),
    'Mesh': ('*',),
    'Checkpoint': ('*',),
    'Guard': ('max_skips',),
    'Data': ('tokenizer', 'max_bad_fraction', 'cache'),
    'Source': ('path', 'image_root'),
}
FREE_ANYWHERE = ('attend', 'remat')  # how a module computes, never what


@dataclasses.dataclass(frozen=True)
class Difference:
    """A field that differs: its path from the root, and both values."""

    path: str
    old: Any
    new: Any
    free: bool


def differences(old: Any, new: Any, path: str = 'Train', free: bool = False) -> Iterator[Difference]:
    """Every leaf in which two configurations differ, in the order of their fields."""
    if dataclasses.is_dataclass(old) and type(old) is type(new):
        table = FREE.get(type(old).__name__, ())
        for field in dataclasses.fields(old):
            if isinstance(old, nn.Module) and field.name in ('parent', 'name'):
                continue  # Linen's own bookkeeping
            is_free = free or '*' in table or field.name in table or field.name in FREE_ANYWHERE
            values = getattr(old, field.name), getattr(new, field.name)
            yield from differences(*values, f'{path}.{field.name}', is_free)
    elif isinstance(old, dict) and isinstance(new, dict) and list(old) == list(new):
        for key in old:
            yield from differences(old[key], new[key], f'{path}[{key!r}]', free)
    elif isinstance(old, tuple) and isinstance(new, tuple) and len(old) == len(new):
        for i, (a, b) in enumerate(zip(old, new, strict=True)):
            yield from differences(a, b, f'{path}[{i}]', free)
    elif callable(old) and callable(new):
        if getattr(old, '__qualname__', old) != getattr(new, '__qualname__', new):
            yield Difference(path, old, new, free)
    elif old != new:
        yield Difference(path, old, new, free)


def first_difference(old: Train, new: Train) -> Difference | None:
    """The first identity field in which `new` is not the run that `old` was, or None."""
    return next((difference for difference in differences(old, new) if not difference.free), None)


def changed_binding(before: str, now: str) -> tuple[str, str, str] | None:
    """(name, old value, new value) of the first binding of two resolved texts that differs and is not free: the name a
    user knows. None where no single line tells it."""
    old, new = (dict(line.split(' = ', 1) for line in text.splitlines() if ' = ' in line) for text in (before, now))
    for name in old:
        owner, _, field = name.rpartition('/')[2].rpartition('.')
        free = FREE.get(owner, ())
        if name in new and old[name] != new[name] and not {'*', field} & {*free} and field not in FREE_ANYWHERE:
            return name, old[name], new[name]
    return None
