"""The configuration of an imported model."""
import dataclasses
from collections.abc import Mapping
from typing import Any

from vora_jax.cli import gin_config
from vora_jax.cli.expressions import Key, Reference, written
from vora_jax.data.config import Data
from vora_jax.training.config import Train


def config_text(method: str, stage: str, arguments: Mapping[str, Any], data: Data) -> tuple[Train, str]:
    """(configuration, its resolved text) of a model that is there and of no training run.

    Leaf dataclasses become bindings: `Vit.num_heads = 12`. Where two of one class differ, the later one has the scope
    of the argument that holds it: `vora.teacher = @Vit()`, `Vit.patch_embed = @teacher/PatchEmbed()`.

    Args:
        method, stage, arguments: the name of a function of `variants`, one of its stages, its arguments.
        data: what questions and pictures need; without sources.
    """
    bindings: dict[Key, Any] = {
        Key('', 'Train', 'method'): Reference('', method, True), Key('', 'Train', 'stage'): stage,
        Key('', 'Train', 'steps'): 1, Key('', 'Train', 'batch_rows'): 1}
    placed: dict[tuple[str, str], Any] = {}
    for name, value in arguments.items():
        bindings[Key('', method, name)] = _bind(value, name, bindings, placed)
    bindings[Key('', 'Train', 'data')] = _bind(data, 'data', bindings, placed)
    text = '\n'.join(f'{key} = {_written(key, value)}' for key, value in bindings.items())
    return gin_config.load('Train', texts=[text])


def _bind(value: Any, argument: str, bindings: dict[Key, Any], placed: dict[tuple[str, str], Any]) -> Any:
    """What stands for `value` in a binding; a dataclass adds the bindings of its fields."""
    if not dataclasses.is_dataclass(value):
        return value
    name = type(value).__name__
    scope = '' if placed.get(('', name), value) == value else argument
    if placed.setdefault((scope, name), value) != value:
        raise ValueError(f'{argument} holds two different {name}s, which have no names to tell them apart')
    for field in dataclasses.fields(value):
        bindings[Key(scope, name, field.name)] = _bind(getattr(value, field.name), argument, bindings, placed)
    return Reference(scope, name, True)


def _written(key: Key, value: Any) -> str:
    text = written(value)
    if text is None:
        raise ValueError(f'{key}: {value!r} cannot be written in a configuration')
    return text
