"""Builds configuration objects from a table of bindings.

Knows nothing of gin's syntax: `gin_config` reads files and flags into the table. See there for the rules.
"""

import dataclasses
import typing
from collections.abc import Callable, Mapping
from typing import Any

from vora_jax.cli import typed_value
from vora_jax.cli.expressions import Binding, Key, Macro, Reference, leaves, map_parts, written
from vora_jax.cli.signatures import parameters, result
from vora_jax.cli.typed_value import did_you_mean
from vora_jax.types import UserError


def build(root: str, table: Mapping[Key, Binding], names: Mapping[str, Callable]) -> tuple[Any, str]:
    """The object that the bindable `root` builds under `table`, and the resolved text.

    Raises:
        UserError: see `gin_config.load`.
    """
    signatures = {name: parameters(target, names) for name, target in names.items()}
    for key, binding in table.items():
        _check_known(key, binding, table, signatures)
    session = _Session(table, names, signatures)
    config = session.call('', root)
    unused = [key for key in table if key not in session.used]
    if unused:
        raise UserError(_unused_message(unused, session))
    return config, session.text()


def _check_known(key, binding, table, signatures) -> None:
    elsewhere = [f'{name}.{key.parameter}' for name in signatures if key.parameter in signatures[name]]
    if key.parameter and key.name not in signatures:
        hint = did_you_mean(key.name, signatures)
        if hint == '.' and elsewhere:
            hint = f'; did you mean {elsewhere[0]!r}?'
        raise UserError(f'{binding.where}: there is no {key.name!r} to configure{hint}')
    if key.parameter and key.parameter not in signatures[key.name]:
        hint = did_you_mean(key.parameter, signatures[key.name])
        if hint == '.':
            hint = (
                f'; did you mean {elsewhere[0]!r}?'
                if elsewhere
                else f'; it has {", ".join(signatures[key.name])}.'
            )
        raise UserError(f'{binding.where}: {key.name} has no parameter {key.parameter!r}{hint}')
    for leaf in leaves(binding.value):
        if isinstance(leaf, Macro) and Key('', leaf.name, '') not in table:
            macros = [k.name for k in table if not k.parameter]
            raise UserError(
                f'{binding.where}: the macro %{leaf.name} is not defined' + did_you_mean(leaf.name, macros)
            )
        if isinstance(leaf, Reference) and leaf.name not in signatures:
            raise UserError(
                f'{binding.where}: there is no {leaf.name!r} to refer to'
                + did_you_mean(leaf.name, signatures)
            )
        if isinstance(leaf, Reference) and not leaf.called:
            raise UserError(
                f'{binding.where}: {str(leaf)[:-2]} stands for a value here and needs brackets'
                f"; did you mean '{leaf}'?"
            )


class _Session:
    """One build: which bindings were used, what each call received."""

    def __init__(self, table, names, signatures):
        self.table, self.names, self.signatures = table, names, signatures
        self.used: set[Key] = set()
        self.built: dict[tuple[str, str], Any] = {}
        self.received: dict[tuple[str, str], dict[str, Any]] = {}  # in calling order, parents first

    def call(self, scope: str, name: str) -> Any:
        """The object that `@scope/name()` stands for."""
        if (scope, name) in self.built:
            return self.built[scope, name]
        if (scope, name) in self.received:
            raise UserError(f'{Reference(scope, name, True)} refers to itself; break the circle.')
        received = self.received[scope, name] = {}
        arguments = {}
        for parameter, (hint, default, wired) in self.signatures[name].items():
            key = self.find(scope, name, parameter)
            if key:
                arguments[parameter], received[parameter] = self.value(
                    scope, key, Key(scope, name, parameter), hint
                )
            elif wired:
                arguments[parameter], received[parameter] = (
                    self.call(scope, wired),
                    Reference('', wired, True),
                )
            elif default is dataclasses.MISSING:
                raise UserError(
                    f'{Key(scope, name, parameter)} has no value; {self.proposal(scope, name, parameter)}'
                )
            elif typed_value.fits(default, hint):  # shown only; the callee's own default counts
                received[parameter] = default
        try:
            self.built[scope, name] = self.names[name](**arguments)
        except UserError:
            raise
        except ValueError as error:
            raise UserError(f'{Key(scope, name, "")}: {str(error).rstrip(".")}.') from error
        return self.built[scope, name]

    def find(self, scope: str, name: str, parameter: str) -> Key | None:
        """The binding that counts for a parameter: the one with the longest scope."""
        parts = scope.split('/') if scope else []
        for length in range(len(parts), -1, -1):
            key = Key('/'.join(parts[:length]), name, parameter)
            if key in self.table:
                return key
        return None

    def value(self, scope: str, key: Key, shown: Key, hint: Any) -> tuple[Any, Any]:
        """The value bound at `key`, and the expression that gives it again."""
        self.used.add(key)
        binding = self.table[key]
        expression = self.expand(binding, binding.value, ())
        try:
            value = typed_value.convert(self.evaluate(scope, expression), hint)
        except TypeError as error:
            raise UserError(f'{binding.where}: {shown} {error}') from None
        return value, expression if any(isinstance(leaf, Reference) for leaf in leaves(expression)) else value

    def expand(self, binding: Binding, expression: Any, within: tuple[str, ...]) -> Any:
        """`expression` with its macros replaced by what they stand for."""
        if isinstance(expression, Macro):
            if expression.name in within:
                raise UserError(
                    f'{binding.where}: the macro %{expression.name} refers to itself; break the circle.'
                )
            key = Key('', expression.name, '')
            self.used.add(key)
            return self.expand(binding, self.table[key].value, (*within, expression.name))
        return map_parts(expression, lambda inner: self.expand(binding, inner, within))

    def evaluate(self, scope: str, expression: Any) -> Any:
        """`expression` with its references built; those without a scope of their own inherit `scope`."""
        if isinstance(expression, Reference):
            return self.call(expression.scope or scope, expression.name)
        return map_parts(expression, lambda inner: self.evaluate(scope, inner))

    def proposal(self, scope: str, name: str, parameter: str) -> str:
        """What to write where a value is missing."""
        hint = self.signatures[name][parameter].hint
        for other, target in self.names.items():
            if result(target) in typed_value.classes(hint):
                one = f'[@{other}()]' if typing.get_origin(hint) in (tuple, list) else f'@{other}()'
                return f"write for example '{Key(scope, name, parameter)} = {one}'."
        key = Key(scope, name, parameter)
        return f'set it with --gin.{key}=VALUE or in a file, it is {typed_value.describe(hint)}.'

    def text(self) -> str:
        """Every call with all its parameters, the root first, in the order of the signatures."""
        blocks = []
        for (scope, name), received in self.received.items():
            lines = [
                f'{Key(scope, name, parameter)} = {written(value)}'
                for parameter, value in received.items()
                if written(value) is not None
            ]
            blocks.append('\n'.join(lines or [f'# {Key(scope, name, "")} has nothing to set.']))
        return '\n\n'.join(blocks) + '\n'


def _unused_message(unused: list[Key], session: _Session) -> str:
    key = unused[0]
    where, more = session.table[key].where, f' (and {len(unused) - 1} more)' if len(unused) > 1 else ''
    if not key.parameter:
        parameters = [
            f'{name}.{p}' for name in session.signatures for p in session.signatures[name] if p == key.name
        ]
        hint = (
            f'; did you mean {parameters[0]!r}?' if parameters else f'; use it as %{key.name} or remove it.'
        )
        return f'{where}: the macro {key.name!r} is never used{more}{hint}'
    scopes = [scope for scope, name in session.received if name == key.name]
    if not scopes:
        given = result(session.names[key.name])
        places = [
            str(Key(scope, name, p))
            for scope, name in session.received
            for p, parameter in session.signatures[name].items()
            if given in typed_value.classes(parameter.hint)
        ]
        reference = Reference(key.scope, key.name, True)
        hint = (
            f"; did you mean to add '{places[0]} = {reference}'?"
            if places
            else '; remove it or include it only where it counts.'
        )
        return f'{where}: {key} is never used{more}, because nothing refers to {reference}{hint}'
    if key.scope and key.scope not in scopes:
        hint = did_you_mean(str(key), [str(Key(scope, key.name, key.parameter)) for scope in scopes])
        return f'{where}: {key} is never used{more}, because no reference has the scope {key.scope!r}{hint}'
    return f'{where}: {key} is never used{more}, because each scope of {key.name} sets its own; remove it.'
