"""Values checked against type annotations.

The configuration loader compares what a user wrote with the annotation of the parameter, before the call.
"""

import collections.abc
import difflib
import types
import typing
from typing import Any

_UNIONS = (typing.Union, types.UnionType)
_LISTS = (list, collections.abc.Sequence, collections.abc.Iterable)


def convert(value: Any, hint: Any) -> Any:
    """`value` as the annotation wants it: lists become tuples and ints floats where those are asked for.

    Args:
        value: a gin literal or an object that gin built.
        hint: an annotation as `typing.get_type_hints` gives it. What has no check (`Any`, protocols) passes.

    Raises:
        TypeError: the value does not fit; the message is `must be int, got 'x'.`, or ends with a suggestion.
    """
    origin, arms = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return convert(value, arms[0])
    if origin in _UNIONS:
        return _convert_union(value, hint, arms)
    if origin is typing.Literal:
        if not any(value == arm and type(value) is type(arm) for arm in arms):
            raise _mismatch(value, hint)
        return value
    plain = origin or hint
    if plain is tuple:
        return _convert_tuple(value, hint, arms)
    if plain in _LISTS:
        if not isinstance(value, (list, tuple)):
            raise _mismatch(value, hint)
        return [_convert_element(v, arms[0], i) for i, v in enumerate(value)] if arms else list(value)
    if plain in (dict, collections.abc.Mapping):
        if not isinstance(value, dict):
            raise _mismatch(value, hint)
        return (
            {convert(k, arms[0]): _convert_element(v, arms[1], k) for k, v in value.items()}
            if arms
            else dict(value)
        )
    if not isinstance(plain, type) or plain is object or getattr(plain, '_is_protocol', False):
        return value
    if plain is float and type(value) is int:
        return float(value)
    if not isinstance(value, plain) or (isinstance(value, bool) and plain in (int, float)):
        raise _mismatch(value, hint)
    return value


def fits(value: Any, hint: Any) -> bool:
    """Whether `convert` accepts the value."""
    try:
        convert(value, hint)
    except TypeError:
        return False
    return True


def describe(hint: Any) -> str:
    """A reader's words for an annotation: `int or None`, `a list of Source`, `one of 'all', 'vision'`."""
    origin, arms = typing.get_origin(hint), typing.get_args(hint)
    if hint is type(None):
        return 'None'
    if origin is typing.Annotated:
        return describe(arms[0])
    if origin in _UNIONS:
        return ' or '.join(describe(arm) for arm in arms)
    if origin is typing.Literal:
        return f'one of {", ".join(map(repr, arms))}' if len(arms) > 1 else repr(arms[0])
    if origin is tuple and arms and arms[-1] is not Ellipsis:
        return f'({", ".join(map(describe, arms))})'
    if origin in (tuple, *_LISTS) and arms:
        return f'a list of {describe(arms[0])}'
    if origin in (dict, collections.abc.Mapping) and arms:
        return f'a dict of {describe(arms[0])} to {describe(arms[1])}'
    return 'a list' if hint is tuple else getattr(hint, '__name__', str(hint))


def classes(hint: Any) -> set[type]:
    """Every class an annotation mentions, at any depth."""
    inner = set().union(*(classes(arm) for arm in typing.get_args(hint) if not isinstance(arm, (str, int))))
    return inner | ({hint} if isinstance(hint, type) else set())


def did_you_mean(word: str, known: typing.Iterable[str]) -> str:
    """`; did you mean 'rank'?` for the closest known word (or one that contains it), or a full stop."""
    known = list(known)
    close = difflib.get_close_matches(word, known, 1) or [
        k for k in known if len(word) > 2 and word.lower() in k.lower()
    ]
    return f'; did you mean {close[0]!r}?' if close else '.'


def _convert_union(value, hint, arms):
    fitting = []
    for arm in arms:
        try:
            fitting.append(convert(value, arm))
        except TypeError:
            continue
    if not fitting:
        raise _mismatch(value, hint)
    return next((v for v in fitting if type(v) is type(value)), fitting[0])  # 3 stays 3 for `float | int`


def _convert_tuple(value, hint, arms):
    if not isinstance(value, (list, tuple)):
        raise _mismatch(value, hint)
    if not arms:
        return tuple(value)
    if arms[-1] is Ellipsis:
        arms = arms[:1] * len(value)
    elif arms == ((),) or len(arms) != len(value):  # tuple[()] has the argument () up to Python 3.10
        raise TypeError(f'must be {describe(hint)}, got {len(value)} values in {_shown(value)}.')
    return tuple(_convert_element(v, arm, i) for i, (v, arm) in enumerate(zip(value, arms)))


def _convert_element(value, hint, place):
    try:
        return convert(value, hint)
    except TypeError as error:
        raise TypeError(f'at [{place!r}] {error}') from None


def _mismatch(value, hint) -> TypeError:
    suggestion = '.'
    if isinstance(value, str) and value.lower() in ('true', 'false', 'none'):
        suggestion = f'; did you mean {value.capitalize()}?'
    elif isinstance(value, str) and typing.get_origin(hint) is typing.Literal:
        suggestion = did_you_mean(value, [arm for arm in typing.get_args(hint) if isinstance(arm, str)])
    elif type(value) is float and value.is_integer() and int in classes(hint):
        suggestion = f'; did you mean {int(value)}?'
    elif type(value) in (int, float) and hint is str:
        suggestion = f'; did you mean "\'{value}\'"?'
    return TypeError(f'must be {describe(hint)}, got {_shown(value)}{suggestion}')


def _shown(value) -> str:
    literal = isinstance(value, (str, int, float, list, tuple, dict, type(None)))
    return repr(value) if literal and len(repr(value)) < 80 else f'a {type(value).__name__}'
