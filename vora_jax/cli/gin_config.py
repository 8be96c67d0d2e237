"""Strict gin: files and flags become frozen dataclasses.

The only module that imports gin, and of gin only its parser: bindings, `@scope/Name()` references, `%MACRO`s,
blocks and includes are gin's language, but the tables live in one call of `load`, not in gin's process-wide
registry. So nothing is registered, mutated or left behind, and each mistake is known with its file and line.

Wiring. A parameter whose annotation is a bindable dataclass, or whose default equals a plain `X()`, is built
as `@X()` unasked, so `--gin.Optimizer.learning_rate=1e-4` works with no file. Everything else that is made of
bindable pieces is named by the user: `X | None = None`, a tuple of X, a union, a default other than `X()`.

Order. Texts, then files, then command-line bindings; the later wins. A file overrides what it includes; of
two includes the later wins; a file reached twice by includes counts once. Twice in one file is a mistake.

Scopes work as in gin: `@teacher/Vit()` reads `teacher/Vit.x` before `Vit.x`, and so does what it builds.
"""

import importlib.util  # noqa: F401  gin 0.5 uses it without importing it
import inspect
import os
import re
import tokenize
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gin import config_parser

from vora_jax.cli.config_build import build
from vora_jax.cli.expressions import Binding, Key, Macro, Reference
from vora_jax.types import UserError


def bindables() -> dict[str, Callable]:
    """Everything a .gin file can bind, by name: leaf dataclasses, methods of `variants`, the two roots."""
    from vora_jax import variants  # late: whoever only splits arguments needs no JAX
    from vora_jax.data.config import Data, ImagePolicy, Source
    from vora_jax.evaluation.config import Eval
    from vora_jax.llm.decoder import LanguageModel
    from vora_jax.nn.adapters import DualLowRank, LowRank, ModalityKernel
    from vora_jax.nn.gated_prompts import GatedPrompts
    from vora_jax.nn.modality_mixture import ModalityMixture
    from vora_jax.ops.rope import RopeScaling
    from vora_jax.training.config import Checkpoint, Guard, Mesh, Optimizer, Train
    from vora_jax.vision.cue_enhancer import CueEnhancer
    from vora_jax.vision.encoder_frontend import Projector
    from vora_jax.vision.patch_embed import PatchEmbed
    from vora_jax.vision.vit import Vit

    methods = [
        f
        for name, f in vars(variants).items()
        if inspect.isfunction(f) and f.__module__ == variants.__name__ and not name.startswith('_')
    ]
    leaves = [LanguageModel, RopeScaling, Vit, PatchEmbed, Projector, CueEnhancer, LowRank, DualLowRank, ModalityKernel,
              ModalityMixture, GatedPrompts, Source, ImagePolicy, Data, Optimizer, Mesh, Checkpoint, Guard]
    return {bindable.__name__: bindable for bindable in (*leaves, *methods, Train, Eval)}


def load(
    root: str,
    files: Sequence[str] = (),
    bindings: Sequence[str] = (),
    texts: Sequence[str] = (),
    names: Mapping[str, Callable] | None = None,
) -> tuple[Any, str]:
    """The configuration object and its resolved text, which loads to an equal object.

    Args:
        root: the bindable to build, 'Train' or 'Eval'.
        files: paths of .gin files.
        bindings: command-line bindings `NAME.PARAMETER=VALUE`; a bare word is text.
        texts: resolved texts of earlier loads (saved with checkpoints).
        names: the bindables by name, `bindables()` by default.

    Raises:
        UserError: an unknown name or parameter, a wrong type, a binding or macro that nothing uses, the same
            binding twice, a missing value, `@X` without brackets, a file that cannot be read.
    """
    table: dict[Key, Binding] = {}
    for text in texts:
        table |= _read_text(text, 'resolved configuration', None)
    for path in files:
        table |= _read_file(path, set(), '')
    table |= _read_flags(bindings)
    return build(root, table, bindables() if names is None else names)


def split_arguments(argv: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """`argv` without its gin arguments, the --gin_file paths, and the bindings.

    Takes `--gin.NAME=VALUE`, `--gin_file F` and `--gin_bindings 'A.b=1'` (one binding a line), each with the
    value after a space or `=`. What follows `--` is left alone.

    Raises:
        UserError: an unknown --gin argument, or one without a value.
    """
    rest, files, bindings = [], [], []
    waiting = list(argv)
    while waiting:
        argument = waiting.pop(0)
        if argument == '--':
            return [*rest, argument, *waiting], files, bindings
        if not argument.startswith('--gin'):
            rest.append(argument)
            continue
        flag, equals, value = argument.partition('=')
        if not re.fullmatch(r'--gin(_file|_bindings|\..+)', flag):
            raise UserError(
                f'{flag}: no such argument; write --gin.NAME=VALUE, --gin_file FILE or --gin_bindings TEXT.'
            )
        if not equals:
            if not waiting or waiting[0].startswith('--'):
                raise UserError(f'{flag}: a value is missing; write {flag}=VALUE.')
            value = waiting.pop(0)
        if flag == '--gin_file':
            files.append(value)
        elif flag == '--gin_bindings':
            bindings += [line.strip() for line in value.splitlines() if line.strip()]
        else:
            bindings.append(f'{flag.removeprefix("--gin.")}={value}')
    return rest, files, bindings


class _Syntax:
    """What gin's parser calls for `@x` and `%x`: they stay names until `build` looks them up."""

    def configurable_reference(self, scoped_name: str, evaluate: bool) -> Reference:
        scope, _, name = scoped_name.rpartition('/')
        return Reference(scope, name, evaluate)

    def macro(self, name: str) -> Macro:
        return Macro(name)


def _read_file(path: str, seen: set[str], included_at: str) -> dict[Key, Binding]:
    real = os.path.realpath(path)
    if real in seen:
        return {}
    seen.add(real)
    origin = f'{included_at}: ' if included_at else ''
    try:
        with open(path, encoding='utf-8') as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, 'strerror', None) or 'not a text file'
        raise UserError(f'{origin}cannot read the configuration file {path}: {reason}.') from None
    return _read_text(text, path, seen)


def _read_text(text: str, label: str, seen: set[str] | None) -> dict[Key, Binding]:
    """The bindings of one text; `seen` holds the files read so far, None where includes make no sense."""
    included, own = {}, {}
    for statement in _parse(text, label):
        where = f'{label}:{statement.location.line_num}'
        if isinstance(statement, config_parser.IncludeStatement):
            if seen is None:
                raise UserError(f'{where}: only a file can include another; use --gin_file.')
            included |= _read_file(os.path.join(os.path.dirname(label), statement.filename), seen, where)
        elif isinstance(statement, config_parser.ImportStatement):
            raise UserError(f'{where}: imports are not needed here, all names are known; remove the line.')
        elif isinstance(statement, config_parser.BindingStatement):
            _add(own, statement, where)
    return included | own


def _read_flags(bindings: Sequence[str]) -> dict[Key, Binding]:
    table = {}
    for text in bindings:
        name, equals, value = (part.strip() for part in text.partition('='))
        where = f'--gin.{name}'
        if not re.fullmatch(r'[\w./]+', name) or not equals or not value:
            raise UserError(f'{where}: not a binding; write --gin.NAME.PARAMETER=VALUE, got {text!r}.')
        try:
            statements = _parse(f'{name} = {value}', where)
        except UserError:
            if value[0] in '@%[({\'"':
                raise
            statements = _parse(f'{name} = {value!r}', where)  # a bare word (or path, or sentence) is text
        _add(table, statements[-1], where)
    return table


def _add(table: dict[Key, Binding], statement: config_parser.BindingStatement, where: str) -> None:
    scope, name, parameter = statement.scope, statement.selector, statement.arg_name
    if not parameter:  # a macro: its scope is part of its name
        scope, name = '', f'{scope}/{name}' if scope else name
    key = Key(scope, name, parameter)
    if key in table:
        first = table[key].where
        raise UserError(
            f'{where}: {key} is set twice, first {"at " + first if first != where else "by the same flag"}'
            '; keep one of them.'
        )
    table[key] = Binding(statement.value, where)


def _parse(text: str, label: str) -> list:
    try:
        return list(config_parser.ConfigParser(text, _Syntax()))
    except SyntaxError as error:  # gin's own, and IndentationError from the tokenizer
        line, written = error.lineno, (error.text or '').strip()
    except tokenize.TokenError as error:
        line, written = error.args[1][0], 'an unclosed bracket or string'
    where = label if label.startswith('--') else f'{label}:{line}'
    raise UserError(
        f'{where}: cannot read {written!r}; write NAME.PARAMETER = VALUE, with text in quotes.'
    ) from None
