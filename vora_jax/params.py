"""Parameter trees: paths, partition, layer regrouping."""
import fnmatch
import re
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from vora_jax.types import Array, Params, UserError

Flat = dict[str, Array]


def flatten(params: Params) -> Flat:
    """{'decoder/norm/scale': array, ...} of a nested dict, in sorted order."""
    flat = {}

    def walk(node, path):
        if isinstance(node, Mapping):
            for key in sorted(node):
                walk(node[key], (*path, key))
        else:
            flat['/'.join(path)] = node

    walk(params, ())
    return flat


def unflatten(flat: Mapping[str, Array]) -> Params:
    """The nested dict of `flatten`."""
    nested: Params = {}
    for path, leaf in flat.items():
        *parents, name = path.split('/')
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return nested


def matches(path: str, patterns: Sequence[str]) -> bool:
    """True where a path matches any pattern; `*` also spans `/`."""
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


def check_patterns(params: Params, patterns: Sequence[str], where: str) -> None:
    """UserError, naming `where`, if a pattern matches no parameter."""
    paths = list(flatten(params))
    for pattern in patterns:
        if not any(matches(path, (pattern,)) for path in paths):
            raise UserError(f'{where}: the pattern {pattern!r} matches no parameter; paths look like '
                            f'{", ".join(paths[:: max(1, len(paths) // 4)][:4])}.')


def partition(params: Params, patterns: Sequence[str]) -> tuple[Params, Params]:
    """(trainable, frozen): nested dicts that share no leaf. UserError if a pattern matches nothing."""
    check_patterns(params, patterns, 'trainable')
    flat = flatten(params)
    trainable = {path: leaf for path, leaf in flat.items() if matches(path, patterns)}
    frozen = {path: leaf for path, leaf in flat.items() if path not in trainable}
    return unflatten(trainable), unflatten(frozen)


def combine(*parts: Params) -> Params:
    """The tree whose leaves are those of all parts; a leaf in two parts raises ValueError."""
    flat: Flat = {}
    for part in parts:
        leaves = flatten(part)
        twice = flat.keys() & leaves.keys()
        if twice:
            raise ValueError(f'combine: {sorted(twice)[0]} stands in two parts.')
        flat |= leaves
    return unflatten(flat)


def count(params: Params) -> int:
    """Number of parameters; takes arrays or ShapeDtypeStructs."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


_COPY = re.compile(r'(.*)/adapter_\d+/(kernel|bias)')


def starts_as(path: str) -> str | None:
    """The path of the parameter that this one starts as a copy of, or None: a `ModalityKernel` is a copy of its linear.

    starts_as('.../q_proj/adapter_0/kernel') is '.../q_proj/kernel'.
    """
    match = _COPY.fullmatch(path)
    return f'{match[1]}/{match[2]}' if match else None


_LAYERS = re.compile(r'(?P<stack>.*/)group_(?P<index>\d+)/(?P<leaf>.*)')


def regroup(params: Params, sizes: Sequence[int], stack: str = 'decoder/layers/') -> Params:
    """The same layers, re-cut into groups of `sizes` layers.

    Args:
        params: a tree whose `{stack}group_i/...` leaves are stacked over layers, [L_i, ...].
        sizes: layers of each new group.
        stack: path prefix of the layer stack.

    A leaf that only some layers of a new group have (an adapter, a distillation head) is left out of that group.

    Raises:
        UserError: the layer counts differ.
    """
    flat = flatten(params)
    groups: dict[int, Flat] = {}
    rest: Flat = {}
    for path, leaf in flat.items():
        match = _LAYERS.fullmatch(path)
        if match and match['stack'] == stack:
            groups.setdefault(int(match['index']), {})[match['leaf']] = leaf
        else:
            rest[path] = leaf
    old_sizes = [next(iter(groups[index].values())).shape[0] for index in sorted(groups)]
    if old_sizes == list(sizes) or not groups:
        return params
    if sum(old_sizes) != sum(sizes):
        raise UserError(f'{stack}: a stack of {sum(old_sizes)} layers does not fit a model of {sum(sizes)} layers.')
    start = 0
    for index, size in enumerate(sizes):
        for leaf in sorted(set().union(*groups.values())):
            pieces = _cut(groups, old_sizes, leaf, start, start + size)
            if pieces is not None:
                rest[f'{stack}group_{index}/{leaf}'] = pieces
        start += size
    return unflatten(rest)


def _cut(groups: dict[int, Flat], sizes: list[int], leaf: str, start: int, stop: int) -> Array | None:
    """Layers [start, stop) of one leaf over all old groups; None where one of these layers lacks it."""
    pieces, offset = [], 0
    for index, size in enumerate(sizes):
        low, high = max(start, offset), min(stop, offset + size)
        if low < high:
            if leaf not in groups[index]:
                return None
            pieces.append(groups[index][leaf][low - offset:high - offset])
        offset += size
    return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=0)
