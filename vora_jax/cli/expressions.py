"""What bindings are made of: keys, references, macros."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple


class Key(NamedTuple):
    """What a binding binds: `scope/name.parameter`; a macro has no parameter."""

    scope: str
    name: str
    parameter: str

    def __str__(self) -> str:
        scoped = f'{self.scope}/{self.name}' if self.scope else self.name
        return f'{scoped}.{self.parameter}' if self.parameter else scoped


class Binding(NamedTuple):
    """A bound expression and where it stands, `file:line` or `--gin.NAME`."""

    value: Any
    where: str


class Reference(NamedTuple):
    """`@scope/name()`, or `@name` without brackets if not `called`."""

    scope: str
    name: str
    called: bool

    def __str__(self) -> str:
        return f'@{Key(self.scope, self.name, "")}()'


class Macro(NamedTuple):
    """`%name`."""

    name: str


def map_parts(value: Any, function: Callable) -> Any:
    """`value` with `function` applied to the elements, if it is a container."""
    if type(value) in (list, tuple):
        return type(value)(function(v) for v in value)
    if type(value) is dict:
        return {function(k): function(v) for k, v in value.items()}
    return value


def leaves(value: Any) -> list:
    """Everything inside `value` that is not itself a container."""
    if type(value) is dict:
        return [leaf for pair in value.items() for part in pair for leaf in leaves(part)]
    return [leaf for part in value for leaf in leaves(part)] if type(value) in (list, tuple) else [value]


def written(value: Any, width: int = 100) -> str | None:
    """`value` in gin's syntax; None for what has none (an object that a default holds)."""
    if isinstance(value, Reference):
        return str(value)
    if type(value) is float and not math.isfinite(value):
        return None if math.isnan(value) else ('1e999' if value > 0 else '-1e999')
    if type(value) in (list, tuple, dict):
        pairs = value.items() if type(value) is dict else [(v,) for v in value]
        parts = [[written(part, width - 4) for part in pair] for pair in pairs]
        if any(part is None for pair in parts for part in pair):
            return None
        opening, closing = {list: '[]', tuple: '()', dict: '{}'}[type(value)]
        items = [': '.join(pair).replace('\n', '\n    ') for pair in parts]
        line = (
            opening + ', '.join(items) + (',' if type(value) is tuple and len(items) == 1 else '') + closing
        )
        broken = ''.join(f'    {item},\n' for item in items)
        return line if len(line) <= width else f'{opening}\n{broken}{closing}'
    return repr(value) if type(value) in (int, float, str, bool, type(None)) else None
