"""Which parameters come from which checkpoint.

Each entry of `Train.init_from` is one of

    CKPT                  every parameter whose path is in both, whatever the layer grouping
    TARGET=CKPT:SOURCE    the subtree SOURCE of the checkpoint becomes the subtree TARGET
                          (`teacher=runs/tagger:encoder`)

Later entries win.
"""
import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from vora_jax.params import flatten, regroup, starts_as, unflatten
from vora_jax.training.checkpoints.checkpoint import open_checkpoint
from vora_jax.training.unfinished import unfinished
from vora_jax.types import UserError

log = logging.getLogger(__name__)

_STACK = re.compile(r'(.*/)group_(\d+)/.*')
_ADAPTER = re.compile(r'.*/adapter_[^/]*')


class Entry(NamedTuple):
    """A parsed entry; `target` and `source` are '' for a whole checkpoint."""

    checkpoint: str
    target: str = ''
    source: str = ''


def parse(text: str) -> Entry:
    """The entry that a text means.

    Raises:
        UserError: neither form.
    """
    if '=' not in text:
        return Entry(text)
    target, _, rest = text.partition('=')
    path, _, source = rest.rpartition(':')
    if not (target and path and source):
        raise UserError(
            f'Train.init_from: cannot read {text!r}; write CKPT, or TARGET=CKPT:SOURCE such as '
            'teacher=runs/tagger:encoder.'
        )
    return Entry(path, target.strip('/'), source.strip('/'))


def take(entries: Iterable[str], shapes: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """{path: array} of all parameters that the entries give; logs what came from where.

    Args:
        entries: `Train.init_from`.
        shapes: every parameter of the model by path; only `.shape` is read.

    Raises:
        UserError: an entry contributes nothing, a subtree is missing, or shapes differ.
    """
    taken: dict[str, np.ndarray] = {}
    for text in entries:
        entry = parse(text)
        given = _given(entry, text, shapes)
        for path, array in given.items():
            if tuple(array.shape) != tuple(shapes[path].shape):
                raise UserError(
                    f'Train.init_from: {path} has the shape {tuple(array.shape)} in {entry.checkpoint} and '
                    f'{tuple(shapes[path].shape)} in this model; take a checkpoint of the same sizes.'
                )
        taken |= given
        log.info('%d parameters (%s values) from %s', len(given), f'{_size(given):,}', text)
    copies = {path: taken[starts_as(path)] for path in shapes if path not in taken and starts_as(path) in taken}
    if copies:
        log.info('%d parameters (%s values) start as copies, such as %s', len(copies), f'{_size(copies):,}', min(copies))
        taken |= copies
    fresh = {path: shape for path, shape in shapes.items() if path not in taken}
    if fresh and taken:
        values = sum(int(np.prod(shape.shape)) for shape in fresh.values())
        log.info('%d parameters (%s values) freshly initialised, such as '
                 '%s', len(fresh), f'{values:,}', min(fresh))
    return taken


def _given(entry: Entry, text: str, shapes: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What one entry gives, by path in this model."""
    opened = open_checkpoint(entry.checkpoint)
    told = unfinished(entry.checkpoint, opened)
    if told:
        log.warning('%s', told)
    flat = flatten(opened.params)
    if entry.target:
        flat = _move(entry, flat)
    before, flat = flat, _regroup(flat, shapes)
    given = {path: array for path, array in flat.items() if path in shapes}
    if not entry.target:
        _raise_if_adapters_are_lost(text, before, given, shapes)
    if not given:
        raise UserError(
            f'Train.init_from: {text} gives none of the parameters of this model; it has '
            f'{_some(flat)}, the model {_some(shapes)}.'
        )
    if entry.target:
        missing = [path for path in shapes if _inside(path, entry.target) and path not in given
                   and '/adapter_' not in path]  # those begin as nothing, or as copies
        if missing:
            raise UserError(f'Train.init_from: {text} leaves {missing[0]} without a value; it gives '
                            f'{_some(flat)}.')
    return given


def _raise_if_adapters_are_lost(text: str, before: Mapping[str, np.ndarray], given: Mapping[str, np.ndarray],
                                shapes: Mapping[str, Any]) -> None:
    """UserError where adapters of a checkpoint have no place in this model, or one of another kind."""
    def adapters(paths: Iterable[str]) -> list[str]:
        return [path for path in paths if '/adapter_' in path]

    lost = sum(before[path].size for path in adapters(before)) != sum(given[path].size for path in adapters(given))
    begun = {_ADAPTER.match(path)[0] for path in adapters(given)}
    unlike = any(_ADAPTER.match(path)[0] in begun for path in adapters(shapes) if path not in given)
    if lost or unlike:
        raise UserError(f'Train.init_from: {text} holds adapters, which this model does not have, or not alike; fold them '
                        'first with `vora merge`, or give this stage the same adapters.')


def _move(entry: Entry, flat: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    moved = {
        entry.target + path.removeprefix(entry.source): array
        for path, array in flat.items()
        if _inside(path, entry.source)
    }
    if not moved:
        raise UserError(f'Train.init_from: {entry.checkpoint} has no parameters at {entry.source}; it has '
                        f'{_some(flat)}.')
    return moved


def _inside(path: str, subtree: str) -> bool:
    return path == subtree or path.startswith(f'{subtree}/')


def _regroup(flat: dict[str, np.ndarray], shapes: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The same layers, cut as the model's layer groups are."""
    sizes: dict[str, dict[int, int]] = {}
    for path, leaf in shapes.items():
        if match := _STACK.fullmatch(path):
            sizes.setdefault(match[1], {})[int(match[2])] = leaf.shape[0]
    for stack, groups in sizes.items():
        if any(path.startswith(f'{stack}group_') for path in flat):
            flat = flatten(regroup(unflatten(flat), [groups[index] for index in sorted(groups)], stack))
    return flat


def _some(paths: Iterable[str]) -> str:
    tops = sorted({'/'.join(path.split('/')[:2]) for path in paths})
    return ', '.join(tops[:4]) + (', ...' if len(tops) > 4 else '')


def _size(arrays: Mapping[str, np.ndarray]) -> int:
    return sum(array.size for array in arrays.values())
