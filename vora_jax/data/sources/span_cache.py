"""Keeps the places of rows on disk.

Two files: `NAME.npy`, which is memory-mapped so that all processes of a machine share its pages, and `NAME.json`, written
last, which describes it.
"""
import json
import logging
import os
import pathlib
import zlib
from typing import Any, NamedTuple

import numpy as np

from vora_jax.data.whole_file import write_whole

log = logging.getLogger(__name__)


class Spans(NamedTuple):
    """Where the rows of a file are.

    sha256: of the file.
    table: i64[rows, 2] first byte of each row, and the one past its last.
    gaps: i64[gaps, 2] a row, and how many places without a row are before it and the rows that follow; ascending.

    Example: of four lines the second is empty; the rows are 0, 1, 2, and `gaps` is [[1, 1]].
    """

    sha256: str
    table: np.ndarray
    gaps: np.ndarray


def save(name: str, spans: Spans) -> bool:
    """Writes the two files, each at once; False, and a warning in the log, if they cannot be written."""
    content = np.concatenate([spans.table, spans.gaps]) if len(spans.gaps) else spans.table
    about = {'sha256': spans.sha256, 'rows': len(spans.table)}
    about['crc32'] = _checksum(about, content)
    try:
        os.makedirs(os.path.dirname(name), exist_ok=True)
        write_whole(pathlib.Path(f'{name}.npy'), lambda file: np.save(file, content))
        write_whole(pathlib.Path(f'{name}.json'), lambda file: file.write(json.dumps(about).encode()))
    except OSError as error:
        log.warning('%s cannot be written (%s); the data is indexed again next time.', name, error.strerror)
        return False
    return True


def load(name: str, check: bool = True) -> Spans | None:
    """What `save` wrote, memory-mapped; None if there is nothing, and if it is damaged, which is a warning in the log.

    Args:
        name: of the two files, without their endings.
        check: read everything once and compare its checksum.
    """
    try:
        with open(f'{name}.json', encoding='utf-8') as file:
            about = json.load(file)
        content = np.asarray(np.load(f'{name}.npy', mmap_mode='r', allow_pickle=False))
        if content.dtype != np.int64 or content.ndim != 2 or content.shape[1] != 2 or len(content) < about['rows']:
            raise ValueError('unexpected shape')
        if check and _checksum(about, content) != about['crc32']:
            raise ValueError('wrong checksum')
        return Spans(str(about['sha256']), content[:about['rows']], content[about['rows']:])
    except FileNotFoundError:
        return None
    except Exception as error:  # whatever reading damaged files raises: the file itself is still there to be indexed
        log.warning('%s cannot be used (%s); the data is indexed again.', name, error)
        return None


def _checksum(about: dict[str, Any], content: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(content), zlib.crc32(f'{about["sha256"]} {about["rows"]}'.encode()))
