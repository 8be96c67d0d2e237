"""Writes YAML that every parser reads alike."""

import json
import re
from typing import Any

_PLAIN = re.compile(r'[A-Za-z][A-Za-z0-9_./-]*')


def dump(value: Any) -> str:
    """A document of dicts, lists, texts, numbers and booleans.

    Texts are JSON strings, which YAML contains, unless they are plain words; texts of several printable lines are literal
    blocks, so that scripts stay readable.
    """
    return '\n'.join(_lines(value)) + '\n'


def _lines(value: Any) -> list[str]:
    if isinstance(value, dict) and value:
        return [line for key, item in value.items() for line in _entry(_scalar(key) + ':', item, '  ')]
    if isinstance(value, list | tuple) and value:
        return [line for item in value for line in _entry('-', item, '  ')]
    return [_scalar(value)]


def _entry(head: str, item: Any, indent: str) -> list[str]:
    if isinstance(item, str) and _is_block(item):
        return [f'{head} |', *(indent + line if line else '' for line in item.removesuffix('\n').split('\n'))]
    lines = _lines(item)
    if not isinstance(item, dict | list | tuple) or not item:
        return [f'{head} {lines[0]}']
    if head == '-':
        return [f'- {lines[0]}', *(indent + line for line in lines[1:])]
    return [head, *(indent + line if line else '' for line in lines)]


def _is_block(text: str) -> bool:
    """A literal block keeps it: lines of printable ASCII, one line end at the end, no space in front of the first."""
    lines = text.removesuffix('\n').split('\n')
    return (
        text.endswith('\n')
        and len(lines) > 1
        and all(line.isascii() and line.isprintable() for line in lines)
        and bool(lines[0].strip())
        and bool(lines[-1].strip())
        and not lines[0].startswith(' ')
    )


def _scalar(value: Any) -> str:
    # 'yes', 'no', 'on', 'null' and the like are no texts for some parsers.
    if (
        isinstance(value, str)
        and _PLAIN.fullmatch(value)
        and value.lower() not in ('true', 'false', 'yes', 'no', 'on', 'off', 'null', 'y', 'n')
    ):
        return value
    return json.dumps(value)
