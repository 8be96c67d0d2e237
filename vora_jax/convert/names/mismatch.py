"""Two sets of tensors compared, and why they differ."""
import collections
import re
from collections.abc import Mapping, Sequence

from vora_jax.convert.names.layouts import Shape
from vora_jax.types import UserError

Shapes = Mapping[str, Shape]
_LAYER = re.compile(r'(.*?\.(?:layers?|blocks)\.)(\d+)(\..*)')


def check(expected: Shapes, given: Shapes, where: str) -> None:
    """UserError naming what is missing from, unexpected in or of another shape in `given`; None where all is right."""
    missing = [name for name in expected if name not in given]
    unexpected = [name for name in given if name not in expected]
    misshapen = [name for name, shape in expected.items() if name in given and tuple(given[name]) != tuple(shape)]
    shapes = [f'{name} ({list(given[name])} instead of {list(expected[name])})' for name in misshapen]
    problems = [f'{kind} {name_list(names)}' for kind, names in (
        ('misses', missing), ('has unexpected', unexpected), ('has other shapes of', shapes)) if names]
    if problems:
        cause = _cause(missing, unexpected, misshapen, expected, given)
        raise UserError(f'{where} does not fit the model: it {"; it ".join(problems)}{cause and f" ({cause})"}.')


def name_list(names: Sequence[str], most: int = 8) -> str:
    """The first names, and how many more there are."""
    more = f' and {len(names) - most} more' if len(names) > most else ''
    return ', '.join(names[:most]) + more


def _cause(missing: list[str], unexpected: list[str], misshapen: list[str], expected: Shapes, given: Shapes) -> str:
    """A guess at the cause, or ''."""
    if misshapen and all(tuple(given[name]) == tuple(expected[name])[::-1] for name in misshapen):
        return 'their dimensions are swapped: were they saved as [in, out]?'
    if renamed := _renamed(missing, unexpected):
        return renamed
    if any('lora_' in name for name in unexpected):
        return 'these are adapters that the configuration does not name: merge them first, or import their own folder'
    if any('lora_' in name for name in missing):
        return 'the configuration names adapters that are not there: were they merged already?'
    if missing == ['lm_head.weight'] or len(missing) == 1 and missing[0].endswith('.lm_head.weight'):
        return 'the head seems to be tied to the embedding: set tie_word_embeddings to true in config.json'
    layers = _num_layers(expected), _num_layers(given)
    if layers[0] != layers[1] and all(layers) and any(map(_LAYER.fullmatch, missing + unexpected)):
        return f'the configuration has {layers[0]} layers, the weights {layers[1]}'
    if (missing and not misshapen and not unexpected and len(missing) < len(expected)
            and len({name.partition('.')[0] for name in missing}) == 1 and len(missing) > 1):
        stem = missing[0].partition('.')[0]
        if not any(name.startswith(f'{stem}.') for name in given):
            return f'nothing called {stem}.* is there: is a part of the model, or a file of weights, missing?'
    if missing and unexpected and len(missing) == len(expected):
        return 'no name fits: this is another family of models than config.json says'
    if misshapen and not missing and not unexpected:
        pairs = {(size, theirs) for name in misshapen for size, theirs in zip(expected[name], given[name])
                 if size != theirs}
        if len(pairs) == 1 and all(len(expected[name]) == len(given[name]) for name in misshapen):
            size, theirs = pairs.pop()
            return f'a size that config.json gives as {size} is {theirs} in the weights'
    if missing and not unexpected and len({_kind(name) for name in missing}) <= 2 and _num_layers(missing):
        return 'some layers are not complete: is a file of weights missing?'
    return ''


def _renamed(missing: list[str], unexpected: list[str]) -> str:
    """How the unexpected names come from the missing ones, where one rule explains them all."""
    if not missing or len(missing) != len(unexpected):
        return ''
    old, new = set(missing), set(unexpected)
    for name in unexpected:
        for other in missing:
            if name.endswith(f'.{other}') and new == {f'{name[:-len(other)]}{x}' for x in old}:
                return f'all names begin with {name[:-len(other)]!r} there'
            if other.endswith(f'.{name}') and old == {f'{other[:-len(name)]}{x}' for x in new}:
                return f'all names lack the beginning {other[:-len(name)]!r} there'
        break  # one name decides: a common prefix holds for all
    if len(missing) == 1:
        return f'was {missing[0]} renamed to {unexpected[0]}?'
    return ''


def _num_layers(names) -> int:
    """One more than the highest layer number of the largest stack of layers; 0 without any."""
    stacks = collections.defaultdict(set)
    for name in names:
        if match := _LAYER.fullmatch(name):
            stacks[match[1]].add(int(match[2]))
    return 1 + max(max(stacks.values(), key=len)) if stacks else 0


def _kind(name: str) -> str:
    """The name without its layer number."""
    return re.sub(r'\d+', '', name)
