"""What a bindable takes and gives, from its annotations."""

import dataclasses
import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Parameter(NamedTuple):
    """One parameter of a bindable.

    hint: its annotation.
    default: `dataclasses.MISSING` if there is none.
    wired: name of the bindable that is built for it where nothing is bound; '' for none.
    """

    hint: Any
    default: Any
    wired: str


def parameters(target: Callable, names: Mapping[str, Callable]) -> dict[str, Parameter]:
    """What a bindable takes, in the order of its signature."""
    hints = typing.get_type_hints(target)
    if dataclasses.is_dataclass(target):
        defaults = {
            f.name: f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
            for f in dataclasses.fields(target)
            if f.init
        }
    else:
        defaults = {
            p.name: dataclasses.MISSING if p.default is p.empty else p.default
            for p in inspect.signature(target).parameters.values()
            if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        }
    return {
        name: Parameter(hints.get(name, Any), default, _wired(hints.get(name, Any), default, names))
        for name, default in defaults.items()
    }


def result(target: Callable) -> Any:
    """What calling `target` gives: the class itself, or a function's return annotation."""
    return target if isinstance(target, type) else typing.get_type_hints(target).get('return')


def _wired(hint: Any, default: Any, names: Mapping[str, Callable]) -> str:
    wanted = hint if default is dataclasses.MISSING else type(default)
    for name, target in names.items():
        if target is wanted:
            try:
                return name if default is dataclasses.MISSING or default == target() else ''
            except (TypeError, ValueError):  # X needs arguments, so the default is not a plain X()
                return ''
    return ''
