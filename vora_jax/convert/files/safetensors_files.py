"""Reading and writing safetensors, tensor by tensor.

Neither side maps files into memory (mapped pages count as resident) nor holds more than the tensor at hand.
"""
import contextlib
import errno
import json
import math
import os
import pathlib
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from vora_jax.convert.files.ranged_read import part_bounds, read_part
from vora_jax.convert.files.safetensors_header import Info, TensorInfo, build_header
from vora_jax.convert.files.safetensors_index import find_tensors
from vora_jax.types import UserError

Slices = tuple[slice, ...]
Write = Callable[[bytes | memoryview, int], None]  # data, its place in the file

_CALL_BYTES = 1 << 20  # of one write; Linux fills its cache several times slower in calls of 64 MiB (measured, ext4)
_STEP_BYTES = 64 << 20  # between two calls of `on_bytes`
_PIECE_BYTES = 8 << 20  # of a non-contiguous array that are made contiguous at a time


def open_folder(folder: str | os.PathLike) -> 'Folder':
    """The tensors of a Hugging Face folder or of one .safetensors file, checked, none of them read.

    Raises:
        UserError: there are no weights, a shard is missing or damaged, or index and shards contradict each other.
    """
    return Folder(find_tensors(pathlib.Path(folder)))


class Folder:
    """Tensors to be read whole or in part; several threads may read. Files are open from first use to `close`.

    tensors: {name: TensorInfo(dtype, shape, file, start)}.
    """

    def __init__(self, tensors: dict[str, TensorInfo]):
        self.tensors = tensors
        self._descriptors: dict[pathlib.Path, int] = {}
        self._reads, self._closed, self._changed = 0, False, threading.Condition()

    def __enter__(self) -> 'Folder':
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Closes the files, once the reads under way have ended (a closed descriptor's number may be used anew)."""
        with self._changed:
            self._closed = True
            self._changed.wait_for(lambda: not self._reads)
            while self._descriptors:
                os.close(self._descriptors.popitem()[1])

    def read(self, name: str, index: Slices | None = None) -> np.ndarray:
        """A tensor, or a part of it, as a new C-contiguous array.

        Args:
            name: one of `tensors`.
            index: a slice of step 1 for each of the first dimensions; later ones are whole. None reads all.

        Raises:
            KeyError: no such tensor.    ValueError: other steps, too many slices, or the folder is closed.
            UserError: the file cannot be read or has become shorter.
        """
        info = self.tensors[name]
        bounds = part_bounds(name, info.shape, index or ())
        with self._changed:
            if self._closed:
                raise ValueError(f'{name}: the folder is closed')
            descriptor = self._descriptor(info.file)
            self._reads += 1
        try:
            return read_part(descriptor, info.file, info.start, info.shape, info.dtype, bounds)
        finally:
            with self._changed:
                self._reads -= 1
                self._changed.notify_all()

    def _descriptor(self, file: pathlib.Path) -> int:
        if file not in self._descriptors:
            try:
                self._descriptors[file] = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise UserError(f'{file} cannot be read ({error.strerror}); check that it is still there.') from error
        return self._descriptors[file]


def write_shards(folder: str | os.PathLike, tensors: Iterable[tuple[str, np.ndarray]], infos: Sequence[Info],
                 max_shard_bytes: int, file_stem: str = 'model',
                 on_bytes: Callable[[int], None] | None = None) -> dict[str, str]:
    """Writes STEM.safetensors, or numbered shards and STEM.safetensors.index.json; one tensor is in memory at a time.

    A shard's header is written when its last tensor is: before, it is no safetensors file. All is on the disk on
    return. Use it inside `new_folder`, which removes what a failure leaves.

    Args:
        folder: exists, and has none of these files.
        tensors: (name, array) in the order of `infos`; non-contiguous arrays cost copies of a few MiB.
        infos: (name, dtype, shape) of every tensor.
        max_shard_bytes: files grow to about this size; a larger tensor has its own.
        file_stem: `model` or `adapter_model`.
        on_bytes: is called with the number of bytes just written (tqdm's `update`).

    Returns:
        {tensor name: file name}.

    Raises:
        ValueError: tensors and infos differ, a name occurs twice, or a dtype has no code.
        UserError: the disk is full or cannot be written to.
    """
    if len({name for name, *_ in infos}) < len(infos) or any(name == '__metadata__' for name, *_ in infos):
        raise ValueError('names of tensors must differ, also from __metadata__')
    folder, shards = pathlib.Path(folder), _plan(infos, max_shard_bytes)
    headers = [build_header(shard) for shard in shards]
    files = [f'{file_stem}-{number:05}-of-{len(shards):05}.safetensors' for number in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = [f'{file_stem}.safetensors']
    weight_map = {name: file for file, shard in zip(files, shards) for name, *_ in shard}
    total = sum(map(_size, infos))
    index = json.dumps({'metadata': {'total_size': total}, 'weight_map': weight_map}, indent=2, ensure_ascii=False)
    contents = {f'{file_stem}.safetensors.index.json': f'{index}\n'.encode()} if len(shards) > 1 else {}
    needed = total + sum(len(header) for header, _ in headers) + sum(map(len, contents.values()))
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise _full(folder, needed, free)
    tensors = iter(tensors)
    for file, shard, (header, starts) in zip(files, shards, headers):
        with _output(folder / file, needed) as write:
            for info in shard:
                # No name here holds the array, so it is gone before the next one is made.
                _write_tensor(write, _expected(next(tensors, (None, None)), info), starts[info[0]], on_bytes)
            write(header, 0)
    if (extra := next(tensors, None)) is not None:
        raise ValueError(f'tensor {extra[0]} is one too many')
    for file, content in contents.items():
        with _output(folder / file, needed) as write:
            write(content, 0)
    return weight_map


def _plan(infos: Sequence[Info], max_shard_bytes: int) -> list[list[Info]]:
    shards, size = [[]], 0
    for info in infos:
        if shards[-1] and size + _size(info) > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(info)
        size += _size(info)
    return shards


def _size(info: Info) -> int:
    return math.prod(info[2]) * np.dtype(info[1]).itemsize


def _expected(item: tuple[str | None, np.ndarray], info: Info) -> np.ndarray:
    """The array of the announced tensor; ValueError where it is another one."""
    name, dtype, shape = info
    if item[0] != name:
        raise ValueError(f'tensor {name} was announced, but {item[0] or "nothing"} came')
    array = np.asarray(item[1])
    if array.dtype != dtype or array.shape != tuple(shape):
        raise ValueError(f'tensor {name} was announced as {np.dtype(dtype)} {list(shape)}, but came as '
                         f'{array.dtype} {list(array.shape)}')
    return array


def _write_tensor(write: Write, array: np.ndarray, start: int, on_bytes: Callable[[int], None] | None) -> None:
    for piece in _pieces(array):
        write(piece, start)
        start += len(piece)
        if on_bytes is not None:
            on_bytes(len(piece))


def _pieces(array: np.ndarray) -> Iterator[memoryview]:
    """The bytes of an array in C order."""
    if array.flags.c_contiguous:
        view = memoryview(array.reshape(-1).view(np.uint8))
        yield from (view[start:start + _STEP_BYTES] for start in range(0, len(view), _STEP_BYTES))
    elif array.size:
        num_rows = max(1, _PIECE_BYTES * len(array) // array.nbytes)
        for row in range(0, len(array), num_rows):
            yield from _pieces(np.ascontiguousarray(array[row:row + num_rows]))


@contextlib.contextmanager
def _output(file: pathlib.Path, needed: int) -> Iterator[Write]:
    """A function that writes (bytes, place) to a new file, which is on the disk when the block has ended."""
    def write(data: bytes | memoryview, start: int) -> None:
        view, done = memoryview(data), 0
        while done < len(view):
            try:
                done += os.pwrite(descriptor, view[done:done + _CALL_BYTES], start + done)
            except OSError as error:
                raise _cannot_write(file, needed, error) from error
        if hasattr(os, 'posix_fadvise'):
            # Linux starts to write these bytes out, so that the disk works while the next tensor is made.
            with contextlib.suppress(OSError):
                os.posix_fadvise(descriptor, start, done, os.POSIX_FADV_DONTNEED)

    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise _cannot_write(file, needed, error) from error
    try:
        yield write
        try:
            os.fsync(descriptor)
        except OSError as error:
            raise _cannot_write(file, needed, error) from error
    finally:
        os.close(descriptor)


def _cannot_write(file: pathlib.Path, needed: int, error: OSError) -> UserError:
    free = shutil.disk_usage(file.parent).free
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return _full(file, needed, free, error.strerror)
    return UserError(f'{file} cannot be written ({error.strerror}; {needed:,} bytes are needed, {free:,} are free); '
                     'choose another folder.')


def _full(where: pathlib.Path, needed: int, free: int, reason: str = 'the disk is too full') -> UserError:
    return UserError(f'{where} cannot be written ({reason}): the weights need {needed:,} bytes, {free:,} are free; '
                     'free some space or choose another disk.')
