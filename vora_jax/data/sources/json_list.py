"""Rows of a list of conversations.

LLaVA's format: one JSON list of `{id, image, conversations: [{from, value}, ...]}`, without `image` where a row is text.
Dual-LoRA's variant names the roles `form: question` and `form: answer`.
"""
import hashlib
import json
import pathlib
from typing import Any

from vora_jax.data.text.special_tokens import IMAGE
from vora_jax.types import UserError

ROLES = {'question': 'human', 'answer': 'gpt'}


class ListedRows:
    """The rows of the file by number, in the format of `conversation.check_record`; read into memory as a whole.

    As LLaVA's loader does: a first answer that nobody asked for is left out, and the picture of a question is moved in
    front of it, on a line of its own (where it has one).

    Attributes:
        path: the file.
        sha256: of its content.
    """

    def __init__(self, path: str):
        self.path = path
        try:
            content = pathlib.Path(path).read_bytes()
            self._rows = json.loads(content)
        except OSError as error:
            raise UserError(f'{path} cannot be read ({error.strerror}); correct the path.') from error
        except ValueError as error:
            raise UserError(f'{path} is not JSON ({error}); JSON lines are read by `vora prepare jsonl`.') from error
        if not isinstance(self._rows, list) or not self._rows:
            raise UserError(f'{path} is not a list of conversations; JSON lines are read by `vora prepare jsonl`.')
        self.sha256 = hashlib.sha256(content).hexdigest()

    def __len__(self) -> int:
        return len(self._rows)

    def where(self, row: int) -> str:
        """File and row (from 1), for messages."""
        return f'{self.path} row {row + 1}'

    def __getitem__(self, row: int) -> Any:
        """The row in our format; what is malformed stays so, for `check_record` to tell."""
        record = self._rows[row]
        if not isinstance(record, dict) or not isinstance(record.get('conversations'), list):
            return record
        turns = [_turn(turn) for turn in record['conversations']]
        if turns and isinstance(turns[0], dict) and turns[0].get('from') == 'gpt':
            turns = turns[1:]
        image = record.get('image')
        frames = {} if not image else {'frames': image if isinstance(image, list) else [image]}
        rest = {key: value for key, value in record.items() if key not in ('image', 'conversations')}
        return {**rest, **frames, 'conversations': turns}


def _turn(turn: Any) -> Any:
    if not isinstance(turn, dict):
        return turn
    role, value = turn.get('from', ROLES.get(turn.get('form'), turn.get('form'))), turn.get('value')
    if role == 'human' and isinstance(value, str) and value.count(IMAGE) == 1:
        value = f'{IMAGE}\n{value.replace(IMAGE, "").strip()}'.strip()
    return {'from': role, 'value': value}
