"""Our parameters as foreign tensors, one at a time.

As `name_map.to_foreign`, with parameters that are computed layer by layer, and a check of every value. What is computed,
cast or reshaped is so on the device, one compiled conversion for each shape.
"""
import concurrent.futures
import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from vora_jax.convert.export.exportable import Leaf
from vora_jax.convert.export.host_arrays import Scratch, is_finite, transposed
from vora_jax.convert.export.lazy_arrays import FoldedKernel, part
from vora_jax.convert.export.plan import Part
from vora_jax.convert.files.safetensors_header import Info
from vora_jax.convert.names.layouts import SAME, TRANSPOSED, Layout
from vora_jax.convert.names.mismatch import name_list
from vora_jax.convert.names.name_map import Entry, entries
from vora_jax.types import Array, UserError


def tensor_infos(content: Part, dtype: str) -> list[Info]:
    """(name, dtype, shape) of every tensor of a folder, in the order of `stream`."""
    return [(name, np.dtype(jnp.dtype(dtype)), _whole_shape(pieces)) for name, pieces in _tensors(content)]


def stream(content: Part, dtype: str, losses: 'Losses | None' = None) -> Iterator[tuple[str, np.ndarray]]:
    """(name, C-contiguous array) of every tensor, one at a time: the next but one may take its memory.

    After the first value that is not finite nothing more is given: the rest is only checked, to name them all.

    Args:
        losses: gathers what a cast loses.

    Raises:
        UserError: names the tensors with NaN or infinity, in the checkpoint or only as `dtype`; or parameters without a
            foreign name.
    """
    bad, scratches = [], itertools.cycle((Scratch(), Scratch()))
    for name, pieces in _tensors(content):
        sources = tuple(part(content.params[entry.path], entry.layer) for entry in pieces)
        whole, finite = _converted(sources, tuple(piece.layout for piece in pieces), dtype, next(scratches))
        if losses is not None:
            losses.add(name, content.params[pieces[0].path], pieces[0], sources)
        del sources
        if not finite:
            bad.append(name)
        if not bad:
            yield name, whole
        del whole
    if bad:
        raise UserError(f'the checkpoint\'s weights hold NaN or infinity as {dtype}: {name_list(bad)}; take an earlier '
                        'step, or another --dtype if they are only too large for this one.')


def ahead(tensors: Iterator[tuple[str, np.ndarray]]) -> Iterator[tuple[str, np.ndarray]]:
    """The same; while one is in use (written to a disk, say), a thread makes the next."""
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        following = thread.submit(next, tensors, None)
        while (tensor := following.result()) is not None:
            following = thread.submit(next, tensors, None)
            yield tensor
            del tensor  # so that no more than two exist


def _tensors(content: Part) -> Iterator[tuple[str, list[Entry]]]:
    """(name, its pieces) in order."""
    pieces: list[Entry] = []
    found = entries(content.shapes, content.table)
    for entry, following in zip(found, [*found[1:], None]):
        pieces.append(entry)
        if following is None or following.name != entry.name:
            yield entry.name, pieces
            pieces = []


def _whole_shape(pieces: Sequence[Entry]) -> tuple[int, ...]:
    last = pieces[-1]
    axis, shape = last.layout.axis, last.shape
    return (*shape[:axis], last.start + shape[axis], *shape[axis + 1:]) if shape else shape


def _converted(sources: tuple[Array, ...], layouts: tuple[Layout, ...], dtype: str,
               scratch: Scratch) -> tuple[np.ndarray, bool]:
    """(the foreign tensor, whether all of it is finite)."""
    source = sources[0]
    if isinstance(source, np.ndarray) and source.dtype == jnp.dtype(dtype) and layouts in ((SAME,), (TRANSPOSED,)):
        source = np.ascontiguousarray(source)
        return source if layouts == (SAME,) else transposed(source, scratch), is_finite(source)
    whole, finite = _convert(sources, layouts, jnp.dtype(dtype))
    return np.asarray(whole), bool(finite)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _convert(sources: tuple[jax.Array, ...], layouts: tuple[Layout, ...], dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    pieces = [layout.export(source.astype(dtype)) for source, layout in zip(sources, layouts, strict=True)]
    whole = pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=layouts[0].axis)
    return whole, jnp.stack([jnp.isfinite(source.astype(dtype)).all() for source in sources]).all()


@dataclasses.dataclass
class Losses:
    """What the cast of the weights lost, and what the adapters had changed; over adapted kernels, or over all tensors
    where there are no adapters.

    dtype: of the cast.
    largest, largest_at: weight change by the cast, and its tensor.    sum_squares, count: of all of them.
    change, change_at, change_squares: the same of the changes that the adapters made.
    """

    dtype: str
    largest: float = 0.0
    largest_at: str = ''
    sum_squares: float = 0.0
    count: int = 0
    change: float = 0.0
    change_at: str = ''
    change_squares: float = 0.0
    _folded: set[tuple[int, int | None]] = dataclasses.field(default_factory=set)
    _only_folded: bool = False

    @property
    def num_folded(self) -> int:
        """Adapters folded, each in each layer."""
        return len(self._folded)

    def add(self, name: str, leaf: Leaf, entry: Entry, sources: tuple[Array, ...]) -> None:
        """Counts one tensor in."""
        is_folded = isinstance(leaf, FoldedKernel)
        if is_folded and not self._only_folded:
            # Tensors before the first adapted one do not count any more.
            self._only_folded, self.largest, self.largest_at, self.sum_squares, self.count = True, 0.0, '', 0.0, 0
        if self._only_folded and not is_folded:
            return
        if is_folded:
            kernel = leaf.kernel[entry.layer]
            change, squares = map(float, _change(sources[0], kernel))
            # One on all slots is in the kernel of text and in that of vision, and the same dict of arrays in both.
            self._folded |= {(id(branch), entry.layer) for _, branch in leaf.branches}
            self.change_squares += squares
            if change >= self.change:
                self.change, self.change_at = change, name
        for source in sources:
            lost, squares = map(float, _lost(source, jnp.dtype(self.dtype)))
            self.sum_squares, self.count = self.sum_squares + squares, self.count + source.size
            if lost >= self.largest:
                self.largest, self.largest_at = lost, name


@functools.partial(jax.jit, static_argnums=1)
def _lost(x: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """(largest, sum of squares) of what the cast to `dtype` takes off."""
    wide = x.astype(jnp.float32)
    # The barrier keeps the compiler from dropping a cast there and back.
    return _size(wide - jax.lax.optimization_barrier(wide.astype(dtype)).astype(jnp.float32))


@jax.jit
def _change(folded: jax.Array, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _size(folded - kernel.astype(jnp.float32))


def _size(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.max(jnp.abs(x)), jnp.sum(x * x)
