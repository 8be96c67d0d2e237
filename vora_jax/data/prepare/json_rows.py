"""Checks rows of conversations and keeps the good ones."""
import json
import os
import pathlib
from typing import Any, Callable, Iterable, Protocol

from vora_jax.data.images.decode import decode
from vora_jax.data.text.conversation import check_record
from vora_jax.data.text.tokenizer import train_sentencepiece
from vora_jax.types import UserError

ROWS = 'data.jsonl'


class Rows(Protocol):
    """Numbered rows of a file: `sources.JsonLines`, `listed_rows.ListedRows`."""

    path: str
    sha256: str

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> Any: ...

    def where(self, row: int) -> str: ...


def convert(rows: Rows, image_root: str, folder: pathlib.Path, progress: Callable[..., Iterable],
            vocab_size: int = 0) -> dict[str, Any]:
    """Writes the good rows to `folder/data.jsonl`, frames as absolute paths; returns the manifest's content.

    A row is bad if it is not in the format of `conversation.check_record`, or a picture is missing or cannot
    be decoded to its last byte.

    Args:
        rows: of the file.
        image_root: folder the frames are relative to; '' is the folder of the file.
        folder: an existing empty folder.
        progress: wraps an iterable to show progress; takes `desc`.
        vocab_size: trains a tokenizer of this size on the texts; 0 trains none.
    """
    root = os.path.abspath(image_root or os.path.dirname(rows.path))
    seen: dict[str, str | None] = {}
    dropped, kept, texts = [], [], []
    for number in progress(range(len(rows)), desc=os.path.basename(rows.path)):
        try:
            record = rows[number]
            _, exchanges, frames = check_record(record, rows.where(number))
            files = [os.path.join(root, frame) for frame in frames]
            for file in files:
                _check_picture(file, rows.where(number), seen)
        except UserError as error:
            dropped.append(str(error).rstrip('.'))
            continue
        kept.append({**record, 'frames': files} if frames else record)
        texts += [text for exchange in exchanges for text in exchange]
    lines = ''.join(json.dumps(record, ensure_ascii=False) + '\n' for record in kept)
    (folder / ROWS).write_text(lines, encoding='utf-8')
    content = {'source': source(rows, image_root, vocab_size), 'rows': len(rows),
               'counts': {'data': len(kept)}, 'dropped': dropped}
    if vocab_size and kept:
        content['vocab_size'] = train_sentencepiece(texts, str(folder / 'tokenizer'), vocab_size).vocab_size
    return content


def source(rows: Rows, image_root: str, vocab_size: int) -> dict[str, Any]:
    """What identifies the result: two equal sources give the same folder."""
    return {'name': os.path.basename(rows.path), 'sha256': rows.sha256, 'vocab_size': vocab_size,
            'image_root': os.path.abspath(image_root or os.path.dirname(rows.path))}


def _check_picture(file: str, where: str, seen: dict[str, str | None]) -> None:
    if file not in seen:
        try:
            decode(file)
            seen[file] = None
        except UserError as error:
            seen[file] = str(error)
    if seen[file] is not None:
        raise UserError(f'{where}: {seen[file]}')
