"""A converted model, about to be a folder."""
import json
import pathlib
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import numpy as np

from vora_jax.convert.files.safetensors_files import write_shards
from vora_jax.types import UserError

_MAX_SHARD_BYTES = 4 << 30


class ForeignModel(NamedTuple):
    """The content of a Hugging Face folder.

    infos: (name, dtype, shape) of every tensor.
    tensors: gives (name, array) in that order; each is made when it is asked for.
    files: {file name: JSON content, or text}.
    """

    infos: list[tuple[str, np.dtype, tuple[int, ...]]]
    tensors: Callable[[], Iterator[tuple[str, np.ndarray]]]
    files: dict[str, Any]

    @property
    def counts(self) -> dict[str, int]:
        """Number of tensors, of parameters, and of bytes."""
        sizes = [int(np.prod(shape, dtype=np.int64)) for _, _, shape in self.infos]
        num_bytes = sum(size * dtype.itemsize for size, (_, dtype, _) in zip(sizes, self.infos))
        return {'tensors': len(sizes), 'parameters': sum(sizes), 'bytes': num_bytes}

    def write(self, folder: pathlib.Path, on_bytes: Callable[[int], None] | None = None) -> None:
        """Writes everything into an existing folder.

        Args:
            on_bytes: is called with the number of bytes of weights just written.
        """
        for name, content in self.files.items():
            text = content if isinstance(content, str) else json.dumps(content, indent=2, ensure_ascii=False) + '\n'
            (folder / name).write_text(text, encoding='utf-8')
        write_shards(folder, self.tensors(), self.infos, _MAX_SHARD_BYTES, on_bytes=on_bytes)


def check_names(where: str, expected: Collection[str], found: Collection[str]) -> None:
    """UserError naming the file and the tensors that are missing or too many."""
    missing, unexpected = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    lists = [f'{len(names)} {word} ({", ".join(names[:5])}{", ..." if len(names) > 5 else ""})'
             for word, names in (('missing', missing), ('unexpected', unexpected)) if names]
    if lists:
        raise UserError(f'{where} holds another model than its metadata says: tensors are {" and ".join(lists)}.')
