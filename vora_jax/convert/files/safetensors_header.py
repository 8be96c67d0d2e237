"""The header of one safetensors file.

A file is 8 bytes (little-endian length of the header), the header (JSON: name -> dtype, shape, offsets) and the
tensors' bytes, C-contiguous, in the order of their offsets, without gaps.
"""
import json
import math
import os
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import ml_dtypes
import numpy as np

from vora_jax.types import UserError

DTYPES = {name: np.dtype(dtype) for name, dtype in {
    'F64': np.float64, 'F32': np.float32, 'F16': np.float16, 'BF16': ml_dtypes.bfloat16,
    'F8_E4M3': ml_dtypes.float8_e4m3fn, 'F8_E5M2': ml_dtypes.float8_e5m2, 'F8_E8M0': ml_dtypes.float8_e8m0fnu,
    'F8_E4M3FNUZ': ml_dtypes.float8_e4m3fnuz, 'F8_E5M2FNUZ': ml_dtypes.float8_e5m2fnuz,
    'I64': np.int64, 'I32': np.int32, 'I16': np.int16, 'I8': np.int8, 'U64': np.uint64, 'U32': np.uint32,
    'U16': np.uint16, 'U8': np.uint8, 'BOOL': np.bool_, 'C64': np.complex64}.items()}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_MAX_HEADER_BYTES = 100_000_000  # the safetensors library's limit

Info = tuple[str, np.dtype, tuple[int, ...]]  # name, dtype (or its name), shape


class TensorInfo(NamedTuple):
    """Where one tensor lies.

    dtype, shape: of the tensor.    file: holds it.    start: its first byte's place in the file.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    file: pathlib.Path
    start: int

    @property
    def num_bytes(self) -> int:
        """Size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(file: pathlib.Path) -> dict[str, TensorInfo]:
    """{name: where it lies} in the order of the file; no tensor is read, but all of the layout is checked.

    Raises:
        UserError: the file is missing, truncated, too long, or its header contradicts itself.
    """
    try:
        with open(file, 'rb') as stream:
            found = os.fstat(stream.fileno()).st_size
            first = stream.read(8)
            length = int.from_bytes(first, 'little')
            if first == b'version ' or found < 8 or not 2 <= length <= _MAX_HEADER_BYTES:
                raise UserError(_no_safetensors(file, first, found))
            if 8 + length > found:
                raise _damaged(file, f'is truncated (its header alone takes {8 + length} bytes, found {found})')
            text = stream.read(length)
    except OSError as error:
        raise UserError(f'{file} cannot be read ({error.strerror}); check the path and its permissions.') from error
    tensors, end = _parse(file, text), 8 + length
    for name, info in tensors.items():
        if info.start != end:
            what = 'overlaps the one before' if info.start < end else f'starts {info.start - end} bytes too late'
            raise _damaged(file, f'has a damaged header (tensor {name} {what})')
        end += info.num_bytes
    if end != found:
        what = 'is truncated' if found < end else 'has bytes after its last tensor'
        raise _damaged(file, f'{what} (expected {end} bytes, found {found})')
    return tensors


def _parse(file: pathlib.Path, text: bytes) -> dict[str, TensorInfo]:
    """The header's tensors, sorted by place; each alone is consistent."""

    def no_duplicates(pairs: list) -> dict:
        if len(dict(pairs)) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f'{next(name for name in names if names.count(name) > 1)} occurs twice')
        return dict(pairs)

    try:
        header = json.loads(text, object_pairs_hook=no_duplicates)
        if not isinstance(header, dict):
            raise ValueError('no table of tensors')
    except (ValueError, RecursionError) as error:
        raise _damaged(file, f'has an unreadable header ({error})') from error
    header.pop('__metadata__', None)
    places = {}
    for name, entry in header.items():
        try:
            code, shape, (start, stop) = entry['dtype'], tuple(entry['shape']), entry['data_offsets']
        except (TypeError, KeyError, ValueError) as error:
            raise _damaged(file, f'has a damaged header (tensor {name} lacks dtype, shape or offsets)') from error
        if not isinstance(code, str) or code not in DTYPES:
            raise UserError(f'{file}: tensor {name} has dtype {code!r}, which is not supported; convert it to one of '
                            f'{", ".join(DTYPES)}.')
        if not all(type(number) is int and number >= 0 for number in (*shape, start, stop)):
            raise _damaged(file, f'has a damaged header (tensor {name} has shape {list(shape)} at {start} to {stop})')
        places[name] = stop, TensorInfo(DTYPES[code], shape, file, 8 + len(text) + start)
        if stop - start != places[name][1].num_bytes:
            raise _damaged(file, f'has a damaged header (tensor {name}, {code} {list(shape)}, takes '
                                 f'{places[name][1].num_bytes} bytes, but has {stop - start})')
    # Empty tensors share their start with the next one.
    order = sorted(places, key=lambda name: (places[name][1].start, places[name][0]))
    return {name: places[name][1] for name in order}


def build_header(infos: Sequence[Info]) -> tuple[bytes, dict[str, int]]:
    """The first bytes of a file that holds these tensors, and {name: its first byte's place}.

    Wider dtypes come first, as in the library's files, so that every tensor is aligned to its own width; otherwise
    the order is kept. The header ends at a multiple of 8 bytes.

    Raises:
        ValueError: a dtype has no code.
    """
    table, starts, end = {'__metadata__': {'format': 'pt'}}, {}, 0
    for name, dtype, shape in sorted(infos, key=lambda info: -np.dtype(info[1]).itemsize):
        dtype = np.dtype(dtype)
        if dtype not in _CODES:
            raise ValueError(f'{name} has dtype {dtype}, which safetensors cannot hold')
        starts[name], end = end, end + math.prod(shape) * dtype.itemsize
        table[name] = {'dtype': _CODES[dtype], 'shape': list(shape), 'data_offsets': [starts[name], end]}
    text = json.dumps(table, separators=(',', ':'), ensure_ascii=False).encode()
    text += b' ' * (-len(text) % 8)
    if len(text) > _MAX_HEADER_BYTES:
        raise ValueError(f'a header of {len(text)} bytes is too long; use smaller shards')
    return len(text).to_bytes(8, 'little') + text, {name: 8 + len(text) + start for name, start in starts.items()}


def _damaged(file: pathlib.Path, what: str) -> UserError:
    return UserError(f'{file} {what}; download it again.')


def _no_safetensors(file: pathlib.Path, first: bytes, found: int) -> str:
    if first == b'version ':
        return f'{file} is a Git LFS pointer instead of the weights; run `git lfs pull` in its folder.'
    if not first.strip(b'\0'):
        return f'{file} has no header ({found} bytes, unfinished or empty); download or write it again.'
    return f'{file} is no safetensors file or is damaged (impossible header length); download it again.'
