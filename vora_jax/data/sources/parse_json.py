"""One JSON value from any bytes."""
import json
from typing import Any, Iterable

from vora_jax.types import UserError

_MAX_DEPTH = 100


def parse_json(content: bytes, where: str) -> Any:
    """The value that is written there, as text in UTF-8. Of a key that occurs twice the last value counts.

    What it gives is text that can be encoded again, and nested so little that everything can walk it: the same bytes give
    the same answer in every thread and process, however deep its stack is.

    Args:
        content: bytes that may hold anything.
        where: file and row, for the message.
    Raises:
        UserError: it is not valid JSON.
    """
    try:
        value = json.loads(content.decode())
        if b'\\u' in content:  # half a surrogate pair is valid JSON but no text: nothing could encode it
            json.dumps(value, ensure_ascii=False).encode()
        if content.count(b'[') + content.count(b'{') > _MAX_DEPTH:
            _check_depth(value)
        return value
    except (ValueError, RecursionError, MemoryError) as error:
        raise UserError(f'{where}: not valid JSON ({error}); repair or remove it.') from error


def _check_depth(value: Any) -> None:
    level = _inner([value])
    for _ in range(_MAX_DEPTH):
        if not level:
            return
        level = [inner for outer in level for inner in _inner(outer.values() if isinstance(outer, dict) else outer)]
    if level:
        raise ValueError(f'lists and objects inside each other, more than {_MAX_DEPTH} deep')


def _inner(values: Iterable[Any]) -> list[dict | list]:
    return [value for value in values if isinstance(value, (dict, list))]
