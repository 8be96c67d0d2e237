"""Foreign tensors onto our devices, streamed.

A process reads the parts of each tensor that its own devices hold. Layouts change on the device, in place in the
stacked parameter, so the host never holds more than the tensors under way.
"""
import functools
import time
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from vora_jax.convert.files.safetensors_files import Folder
from vora_jax.convert.names.layouts import SAME, TRANSPOSED, Layout, Shape
from vora_jax.convert.names.mismatch import name_list
from vora_jax.convert.names.name_map import Entry
from vora_jax.types import UserError

OnRead = Callable[[int, float], None]

_FLOATS = {np.dtype(dtype) for dtype in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)}
_UNDER_WAY_BYTES = 256 << 20  # read, but not yet in place: reading goes on while the devices work
_PIECE_BYTES = 64 << 20  # of two tensors that are compared


def load(folder: Folder, entries: Sequence[Entry], names: Mapping[str, str],
         targets: Mapping[str, jax.ShapeDtypeStruct], dtype: str | None = None,
         on_read: OnRead = lambda count, seconds: None) -> dict[str, jax.Array]:
    """Our flat parameters, layers stacked, on the devices.

    Beyond them the host holds 256 MiB of tensors, or one larger one, and what the reader needs.

    Args:
        folder: open.
        entries, names: of `name_map.entries` and `match_names`; they fill every target.
        targets: {path: shape with a `NamedSharding`}; their dtypes are not read.
        dtype: of the result; None keeps the files' (float64 becomes float32, the layers of a stack the widest of theirs).
        on_read: is called with the bytes of each tensor in the file and the seconds its reading took.

    Raises:
        UserError: names tensors that are no floating-point numbers, or hold NaN or infinity.
    """
    kept = _kept_dtypes(folder, entries, names)
    dtypes = {path: np.dtype(dtype or kept[path]) for path in kept}
    # In the order of the files, for disks that read ahead.
    order = sorted(entries, key=lambda entry: (*folder.tensors[names[entry.name]][2:], entry.start))
    params: dict[str, jax.Array] = {}
    finite: list[tuple[str, jax.Array]] = []
    under_way: list[tuple[int, jax.Array]] = []
    # Of several processes each waits for every tensor: programs that reduce over all may not overtake each other.
    limit = _UNDER_WAY_BYTES if jax.process_count() == 1 else 0
    for entry in order:
        target, name = targets[entry.path], names[entry.name]
        num_bytes = int(np.prod(entry.shape, dtype=np.int64)) * folder.tensors[name].dtype.itemsize
        while under_way and sum(count for count, _ in under_way) + num_bytes > limit:
            under_way.pop(0)[1].block_until_ready()
        source, seconds = _read(folder, name, entry, _source_sharding(entry, target))
        array, good = _restorer(entry.layout, entry.ours, dtypes[entry.path], _row_sharding(entry, target))(source)
        if entry.layer is None:
            params[entry.path] = array
        else:
            if entry.path not in params:
                params[entry.path] = jnp.zeros(target.shape, array.dtype, device=target.sharding)
            params[entry.path] = _putter(target.sharding)(params[entry.path], array, np.int32(entry.layer))
        del source, array
        finite.append((name, good))
        under_way.append((num_bytes, good))
        on_read(num_bytes, seconds)
    _check_finite(folder, finite, dtype)
    return {path: _from_bits(dtypes[path], array.sharding)(array) for path, array in params.items()}


def check_equal(folder: Folder, pairs: Sequence[tuple[str, str]]) -> None:
    """UserError unless the two tensors of each pair (`name_map.alias_pairs`) are equal, byte for byte."""
    for name, other in pairs:
        first, second = folder.tensors[name], folder.tensors[other]
        equal = (first.shape, first.dtype) == (second.shape, second.dtype)
        rows = max(1, _PIECE_BYTES * first.shape[0] // max(1, first.num_bytes)) if equal and first.shape else 1
        for start in range(0, first.shape[0] if equal and first.shape else 1, rows):
            part = (slice(start, start + rows),) if first.shape else None
            if not equal or folder.read(name, part).tobytes() != folder.read(other, part).tobytes():
                raise UserError(f'{first.file}: {name} differs from {other}, but the configuration says that they are one '
                                'tensor; correct tie_word_embeddings in config.json.')


def _kept_dtypes(folder: Folder, entries: Sequence[Entry], names: Mapping[str, str]) -> dict[str, np.dtype]:
    """{path: dtype that holds the values of all its tensors}."""
    kept: dict[str, np.dtype] = {}
    for entry in entries:
        info = folder.tensors[names[entry.name]]
        if info.dtype not in _FLOATS:
            raise UserError(f'{info.file}: {names[entry.name]} is of dtype {info.dtype}; quantised weights cannot be '
                            'imported, take the folder in float16, bfloat16 or float32.')
        own = np.dtype(np.float32) if info.dtype == np.float64 else info.dtype
        kept[entry.path] = jnp.promote_types(kept.get(entry.path, own), own)
    return kept


def _read(folder: Folder, name: str, entry: Entry, sharding: NamedSharding) -> tuple[jax.Array, float]:
    """(the piece as it lies in the file, seconds of reading)."""
    seconds = 0.0

    def part(index: tuple[slice, ...]) -> np.ndarray:
        nonlocal seconds
        started = time.perf_counter()
        bounds = [each.indices(size)[:2] for each, size in zip(index, entry.shape)]
        if bounds:  # where the piece begins
            low, high = bounds[entry.layout.axis]
            bounds[entry.layout.axis] = low + entry.start, high + entry.start
        array = folder.read(name, tuple(slice(*bound) for bound in bounds))
        seconds += time.perf_counter() - started
        return array.astype(np.float32) if array.dtype == np.float64 else array

    return jax.make_array_from_callback(entry.shape, sharding, part), seconds


def _row_sharding(entry: Entry, target: jax.ShapeDtypeStruct) -> NamedSharding:
    """How our array of one layer lies on the devices."""
    spec = [*target.sharding.spec, *[None] * (len(target.shape) - len(target.sharding.spec))]
    return NamedSharding(target.sharding.mesh, PartitionSpec(*spec[entry.layer is not None:]))


def _source_sharding(entry: Entry, target: jax.ShapeDtypeStruct) -> NamedSharding:
    """How the foreign piece lies on them: cut as ours where its dimensions are ours, else whole on each."""
    ours = _row_sharding(entry, target)
    spec = {SAME: ours.spec, TRANSPOSED: ours.spec[::-1]}.get(entry.layout, ())
    return NamedSharding(ours.mesh, PartitionSpec(*spec))


# Two programs: XLA's CPU backend transposes several times slower where it fuses that with the write into the stack.
# Numbers of two bytes are stacked as their bits: for a bfloat16 it would rewrite the whole stack, via float32.
@functools.cache
def _restorer(layout: Layout, ours: Shape, dtype: np.dtype, sharding: NamedSharding) -> Callable:
    """The compiled (foreign array) -> (our array's bits, whether all of it is finite)."""

    def restore(source: jax.Array) -> tuple[jax.Array, jax.Array]:
        source = source.astype(dtype)
        bits = jax.lax.bitcast_convert_type(source, _bits(dtype))
        # 0 * x is NaN just where x is NaN or infinite; a sum is several times faster here than `isfinite` and `all`.
        return layout.restore(bits, ours), jnp.isfinite(jnp.sum(source.astype(jnp.float32) * 0))

    return jax.jit(restore, out_shardings=(sharding, NamedSharding(sharding.mesh, PartitionSpec())))


@functools.cache
def _putter(sharding: NamedSharding) -> Callable:
    """The compiled (stack, array, layer) -> stack, in place."""
    put = functools.partial(jax.lax.dynamic_update_index_in_dim, axis=0)
    return jax.jit(put, donate_argnums=0, out_shardings=sharding)


@functools.cache
def _from_bits(dtype: np.dtype, sharding: NamedSharding) -> Callable:
    """The compiled (bits) -> numbers, in place."""
    if _bits(dtype) == dtype:
        return lambda array: array
    if next(iter(sharding.device_set)).platform == 'cpu':
        return functools.partial(_viewed, dtype)  # the same memory; the program below takes 1 s a GB
    return jax.jit(functools.partial(jax.lax.bitcast_convert_type, new_dtype=dtype), donate_argnums=0,
                   out_shardings=sharding)


def _viewed(dtype: np.dtype, array: jax.Array) -> jax.Array:
    parts = [jax.device_put(np.asarray(shard.data).view(dtype), shard.device) for shard in array.addressable_shards]
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, parts)


def _bits(dtype: np.dtype) -> np.dtype:
    return np.dtype(np.uint16) if dtype.itemsize == 2 else dtype


def _check_finite(folder: Folder, finite: Sequence[tuple[str, jax.Array]], dtype: str | None) -> None:
    bad = list(dict.fromkeys(name for (name, _), good in zip(finite, jax.device_get([flag for _, flag in finite]))
                             if not good))
    if bad:
        cast = f' as {dtype}' if dtype else ''
        raise UserError(f'{folder.tensors[bad[0]].file}: {len(bad)} tensors hold NaN or infinity{cast}: {name_list(bad)}; '
                        'download them again, or repair the run that wrote them.')
