"""Files of JSON lines, appended to."""
import json
import math
import time
from collections.abc import Mapping
from typing import Any

from vora_jax.training.checkpoints.storage import Path, is_remote, write_whole

REMOTE_SECONDS = 60  # between two writes of a file in an object store


class JsonLines:
    """A file to which rows are appended; a local one holds each as soon as `write` returns, also if the process is
    killed then.

    An object store cannot append: there the whole file is written anew, at most once a minute and when it is closed.
    """

    def __init__(self, path: Path):
        self._path, self._file, self._text, self._written = path, None, '', 0.0
        if is_remote(path):
            self._text = path.read_text() if path.exists() else ''
        else:
            self._file = open(path, 'a', encoding='utf-8')

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends a row; numbers that are not finite, which JSON does not know, become null."""
        line = json.dumps(_finite(row), allow_nan=False) + '\n'
        if self._file:
            self._file.write(line)
            self._file.flush()
            return
        self._text += line
        if time.monotonic() - self._written > REMOTE_SECONDS:
            self._upload()

    def close(self) -> None:
        if self._file:
            self._file.close()
        else:
            self._upload()

    def _upload(self) -> None:
        self._path.write_text(self._text)
        self._written = time.monotonic()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, none where it is not there; a line that a killed process left unfinished ends them."""
    rows: list[dict[str, Any]] = []
    for line in path.read_text(encoding='utf-8').splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            break
        if not isinstance(row, dict):
            break
        rows.append(row)
    return rows


def rewrite(path: Path, rows: list[dict[str, Any]]) -> None:
    """Makes these the rows of a file, in one stroke."""
    write_whole(path, ''.join(json.dumps(row) + '\n' for row in rows))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
