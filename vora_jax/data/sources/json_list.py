"""Random access to one JSON list.

LLaVA's format: one list of `{id, image, conversations: [{from, value}, ...]}`, without `image` where a row is text.
Dual-LoRA's variant names the roles `form: question` and `form: answer`.
"""
from typing import Any

from vora_jax.data.sources.json_elements import SPACE, find_elements
from vora_jax.data.sources.parse_json import parse_json
from vora_jax.data.sources.span_index import SpanIndex
from vora_jax.data.text.special_tokens import IMAGE
from vora_jax.types import UserError

ROLES = {'question': 'human', 'answer': 'gpt'}


class JsonList:
    """The rows of a JSON list by number, without reading the file into memory, in the format of `records.check_record`.

    As LLaVA's loader does: a first answer that nobody asked for is left out, and in rows with an `image` the picture of a
    question that has one is moved in front of it, on a line of its own. Picklable and safe to share between threads, see
    `SpanIndex`.

    Args:
        path: the file, local or remote.
        cache: local folder that keeps the index; '' keeps nothing.
    Attributes:
        path: the file.
        sha256: of its content.
    Raises:
        UserError: the file does not exist, cannot be read, or is not one list of at least one row. A row that is not JSON
            itself is told when it is read.
    """

    def __init__(self, path: str, cache: str = ''):
        self._spans = SpanIndex(path, cache, 'list', find_elements)
        self.path, self.sha256 = path, self._spans.sha256
        if len(self) == 1 and not self._spans.read(0, self.where(0)).strip(SPACE):
            raise UserError(f'{path} is not a list of conversations: it is empty; it needs at least one row.')

    def __len__(self) -> int:
        return len(self._spans)

    def where(self, row: int) -> str:
        """File and row (from 1), for messages."""
        return f'{self.path} row {self._spans.place(row)}'

    def __getitem__(self, row: int) -> Any:
        """The row in our format; what is malformed stays so, for `check_record` to tell. UserError if it is not JSON."""
        where = self.where(row)
        record = parse_json(self._spans.read(row, where), where)
        if not isinstance(record, dict) or not isinstance(record.get('conversations'), list):
            return record
        moves = bool(record.get('image'))
        turns = [_turn(turn, moves) for turn in record['conversations']]
        if turns and isinstance(turns[0], dict) and turns[0].get('from') == 'gpt':
            turns = turns[1:]
        return {**record, 'conversations': turns}


def _turn(turn: Any, moves: bool) -> Any:
    if not isinstance(turn, dict) or not {'from', 'form'} & set(turn):
        return turn
    role, value = turn.get('from'), turn.get('value')
    if role is None:
        role = turn.get('form')
        role = ROLES.get(role, role) if isinstance(role, str) else role  # a malformed one may be no key
    if moves and role == 'human' and isinstance(value, str) and value.count(IMAGE) == 1:
        value = f'{IMAGE}\n{value.replace(IMAGE, "").strip()}'.strip()
    rest = {key: part for key, part in turn.items() if key not in ('from', 'form', 'value')}
    return {'from': role, **({'value': value} if 'value' in turn else {}), **rest}
