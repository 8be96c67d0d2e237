"""Files of JSON lines, appended to."""
import json
import logging
import math
import time
from collections.abc import Mapping
from typing import Any

from vora_jax.training.checkpoints.storage import Path, is_remote, write_whole
from vora_jax.training.checkpoints.trouble import WAITS, first_line, patiently

log = logging.getLogger(__name__)

REMOTE_SECONDS = 60  # between two writes of a file in an object store


class JsonLines:
    """A file to which rows are appended; a local one holds each as soon as `write` returns, also if the process is
    killed then.

    An object store cannot append: there the whole file is written anew, at most once a minute and when it is closed. If
    that fails, the run goes on: it is told once, and tried again a minute later.
    """

    def __init__(self, path: Path):
        self._path, self._file, self._text, self._written, self._failed = path, None, '', 0.0, False
        if is_remote(path):
            self._text = _read(path)
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
            return
        self._upload()
        for wait in WAITS:  # there will be no next row
            if self._failed:
                time.sleep(wait)
                self._upload()

    def _upload(self) -> None:
        self._written = time.monotonic()
        try:
            self._path.write_text(self._text)
            self._failed = False
        except Exception as error:  # each library has errors of its own
            if not self._failed:
                log.warning('%s could not be written: %s; the next row after %d s tries again.', self._path,
                            first_line(error), REMOTE_SECONDS)
            self._failed = True


def _read(path: Path) -> str:
    return patiently(lambda: path.read_text(encoding='utf-8') if path.exists() else '', path)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, none where it is not there; a line that a killed process left unfinished ends them."""
    rows: list[dict[str, Any]] = []
    for line in _read(path).splitlines():
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
