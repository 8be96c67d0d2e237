"""Our parameter paths and foreign names.

A table of rows is read in both directions. Nothing is skipped: every parameter has a row, every foreign tensor is
used once, is an alias of a used one, or is ignored for a stated reason.
"""
import dataclasses
import fnmatch
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from vora_jax.convert.names.layouts import Layout, Shape
from vora_jax.convert.names.mismatch import Shapes, check, name_list
from vora_jax.types import Array, UserError

_GROUP, _ADAPTER = re.compile(r'group_(\d+)'), re.compile(r'adapter_(\d+)')


class Row(NamedTuple):
    """One parameter and its foreign name.

    path: ours. `*` stands for the layer group of a stack (`decoder/layers/*/block/q_proj/kernel`), `adapter_#` for any
        adapter.
    name: theirs. `{layer}` is the index over the whole stack, `#` the number of the adapter.
    layout: how the two relate.

    Rows of the same name are pieces of that tensor, concatenated along `layout.axis` in the order of the table.
    """

    path: str
    name: str
    layout: Layout


class Table(NamedTuple):
    """The names of one family of checkpoints. It may hold rows for parameters that only some of its models have.

    ignored: (fnmatch pattern of foreign names, why they are not needed).
    renames: (regex, replacement) for the beginning of foreign names, applied in this order: other spellings of the
        names become the table's.
    aliases: (foreign name, other foreign name): where no parameter needs the first, it may be there all the same, and
        must then equal the second byte for byte (the head of a model that ties it to its embedding).
    """

    rows: tuple[Row, ...]
    ignored: tuple[tuple[str, str], ...] = ()
    renames: tuple[tuple[str, str], ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()


def prefixed(table: Table, ours: str, theirs: str) -> Table:
    """The table of a model that is a part of a larger one: `ours` before our paths, `theirs` before their names."""
    return Table(tuple(Row(ours + row.path, theirs + row.name, row.layout) for row in table.rows),
                 tuple((theirs + pattern, reason) for pattern, reason in table.ignored),
                 tuple((re.escape(theirs) + regex, theirs + to) for regex, to in table.renames),
                 tuple((theirs + name, theirs + other) for name, other in table.aliases))


def joined(*tables: Table) -> Table:
    """One table of several; renames apply in the order given."""
    return Table(*(sum(parts, ()) for parts in zip(*tables)))


@dataclasses.dataclass(frozen=True)
class Entry:
    """One foreign tensor, or a piece of one.

    path: our parameter.    layer: index into its stacked first axis; None where it is not stacked.
    name: theirs.    ours: shape of our (one layer's) array.    layout: how the two relate.
    start: where this piece begins along `layout.axis` of the foreign tensor.
    """

    path: str
    layer: int | None
    name: str
    ours: Shape
    layout: Layout
    start: int = 0

    @property
    def shape(self) -> Shape:
        """This piece's shape on the foreign side."""
        return self.layout.shape(self.ours)

    @property
    def index(self) -> tuple[slice, ...]:
        """Where this piece lies in the foreign tensor."""
        axis = self.layout.axis
        return (slice(None),) * axis + (slice(self.start, self.start + self.shape[axis]),)


def entries(shapes: Shapes, table: Table) -> list[Entry]:
    """All pieces of foreign tensors of a model with these parameters; each layer of a stack is one.

    Every parameter occurs exactly once (once for each of its layers); pieces of one tensor in the order of the table.

    Args:
        shapes: {our path: shape}, layers stacked.

    Raises:
        UserError: parameters that have no foreign name.
    """
    rows, first_layer = {row.path: (place, row) for place, row in enumerate(table.rows)}, _first_layers(shapes)
    found, unknown = [], []
    for path, shape in shapes.items():
        group, number = _GROUP.search(path), _ADAPTER.search(path)
        key = _GROUP.sub('*', path, count=1)
        place, row = rows.get(key) or rows.get(_ADAPTER.sub('adapter_#', key), (0, None))
        if row is None:
            unknown.append(path)
            continue
        name = row.name.replace('#', number[1]) if number else row.name
        if group is None:
            found.append((place, Entry(path, None, name, tuple(shape), row.layout)))
            continue
        start = first_layer[path[:group.start()]][int(group[1])]
        found += [(place, Entry(path, layer, name.format(layer=start + layer), tuple(shape[1:]), row.layout))
                  for layer in range(shape[0])]
    if unknown:
        raise UserError(f'these parameters have no name in a Hugging Face folder: {name_list(unknown)}.')
    order = {}
    for _, entry in found:
        order.setdefault(entry.name, len(order))
    found.sort(key=lambda item: (order[item[1].name], item[0]))
    return _with_starts([entry for _, entry in found])


def foreign_shapes(pieces: Sequence[Entry]) -> dict[str, Shape]:
    """{foreign name: shape of the whole tensor}, in the order of `entries`."""
    shapes: dict[str, Shape] = {}
    for entry in pieces:
        shape, axis = entry.shape, entry.layout.axis
        shapes[entry.name] = (*shape[:axis], entry.start + shape[axis], *shape[axis + 1:])
    return shapes


def match_names(pieces: Sequence[Entry], given: Shapes, table: Table, where: str
                ) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """({foreign name: name in the folder}, [(name in the folder that is not used, why)]).

    Args:
        pieces: of `entries`.
        given: {name in the folder: shape}.
        table: for other spellings and for what is ignored; aliases are neither used nor listed, see `alias_pairs`.
        where: what to call the folder in errors.

    Raises:
        UserError: lists missing, unexpected and misshapen tensors and guesses why; or two spellings of one name.
    """
    expected, spelling, ignored = foreign_shapes(pieces), {}, []
    aliases = {name for name, _ in table.aliases}
    for name in given:
        ours = renamed(name, table)
        reason = next((reason for pattern, reason in table.ignored if fnmatch.fnmatchcase(ours, pattern)), None)
        if ours in expected or reason is None and ours not in aliases:
            if ours in spelling:
                raise UserError(f'{where} has both {spelling[ours]} and {name}, two spellings of one tensor; remove one.')
            spelling[ours] = name
        elif reason is not None:
            ignored.append((name, reason))
    check(expected, {ours: given[name] for ours, name in spelling.items()}, where)
    return {name: spelling[name] for name in expected}, ignored


def alias_pairs(pieces: Sequence[Entry], given: Shapes, table: Table) -> list[tuple[str, str]]:
    """[(name, other name)] in the folder: tensors that no parameter needs, and those that they must equal."""
    expected = {entry.name for entry in pieces}
    spelling = {renamed(name, table): name for name in given}
    return [(spelling[name], spelling[other]) for name, other in table.aliases
            if name not in expected and name in spelling and other in spelling]


def renamed(name: str, table: Table) -> str:
    """The table's spelling of a name in a folder."""
    for regex, replacement in table.renames:
        name = re.sub(f'^(?:{regex})', replacement, name)
    return name


def to_foreign(params: Mapping[str, Array], shapes: Shapes, table: Table,
               dtype: str | None = None) -> Iterator[tuple[str, np.ndarray]]:
    """(name, C-contiguous array) of every foreign tensor, one at a time, in the order of `foreign_shapes`.

    Args:
        params: our flat parameters.
        shapes: what the model expects; every parameter is used, and every expected one is there.
        dtype: of the result; None keeps that of `params`.

    Raises:
        UserError: lists missing, unexpected and misshapen parameters.
    """
    check(shapes, {path: leaf.shape for path, leaf in params.items()}, 'the checkpoint')
    pieces: list[Array] = []
    found = entries(shapes, table)
    for entry, following in zip(found, [*found[1:], None]):
        leaf = params[entry.path]
        # The layout changes in JAX, which transposes faster than NumPy; safetensors needs contiguous arrays.
        piece = jnp.asarray(leaf if entry.layer is None else leaf[entry.layer])
        pieces.append(entry.layout.export(piece.astype(dtype or piece.dtype)))
        if following is None or following.name != entry.name:
            whole = pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=entry.layout.axis)
            pieces.clear()
            yield entry.name, np.ascontiguousarray(np.asarray(whole))


def from_foreign(tensors: Mapping[str, Array], shapes: Shapes, table: Table,
                 where: str = 'the folder') -> dict[str, np.ndarray]:
    """Our flat parameters, layers stacked, from tensors in memory; every parameter is filled (see `match_names`).

    Raises:
        UserError: lists missing, unexpected and misshapen tensors.
    """
    found = entries(shapes, table)
    names, _ = match_names(found, {name: x.shape for name, x in tensors.items()}, table, where)
    parts: dict[str, dict[int | None, np.ndarray]] = {}
    for entry in found:
        piece = np.asarray(tensors[names[entry.name]])[entry.index]
        parts.setdefault(entry.path, {})[entry.layer] = entry.layout.restore(piece, entry.ours)
    return {path: np.ascontiguousarray(layers[None]) if None in layers else np.stack([layers[i] for i in sorted(layers)])
            for path, layers in parts.items()}


def _first_layers(shapes: Shapes) -> dict[str, dict[int, int]]:
    """{path of a stack: {group: its first layer}}, from the stacked shapes."""
    sizes: dict[str, dict[int, int]] = {}
    for path, shape in shapes.items():
        if match := _GROUP.search(path):
            sizes.setdefault(path[:match.start()], {})[int(match[1])] = shape[0]
    return {stack: {group: sum(groups[g] for g in groups if g < group) for group in groups}
            for stack, groups in sizes.items()}


def _with_starts(pieces: list[Entry]) -> list[Entry]:
    """The entries with the places of pieces of one tensor, which lie side by side here."""
    starts, found = {}, []
    for entry in pieces:
        start = starts.get(entry.name, 0)
        found.append(dataclasses.replace(entry, start=start) if start else entry)
        starts[entry.name] = start + entry.shape[entry.layout.axis]
    return found
