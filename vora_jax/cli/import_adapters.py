"""`vora import --config`: official adapter files as a checkpoint."""
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from vora_jax.cli import gin_config
from vora_jax.cli.partial_checkpoint import PARTIAL
from vora_jax.convert.adapters.formats import adapted
from vora_jax.convert.adapters.read import Given, read_adapters
from vora_jax.convert.export.exportable import parameter_shapes
from vora_jax.convert.names.mismatch import name_list
from vora_jax.data.text.tokenizer import tokenizer_files
from vora_jax.params import unflatten
from vora_jax.training import init_from
from vora_jax.training.checkpoints import checkpoint
from vora_jax.types import UserError


def import_adapters(source: pathlib.Path, to: str, files: Sequence[str], bindings: Sequence[str],
                    bases: Sequence[str] = (), dtype: str | None = None) -> dict[str, Any]:
    """What was done, as plain values; writes a workdir with the adapters alone, or with the bases' weights a whole model.

    Args:
        source: file or folder.    files, bindings: the configuration, whose stage trained the adapters.
        bases: as `Train.init_from`.    dtype: of the adapters; None keeps the files'.

    Raises:
        UserError: bad input; or bases that leave parameters without a value.
    """
    checkpoint.raise_if_used(to)
    config, text = gin_config.load('Train', list(files), list(bindings))
    stage = config.method.stage(config.stage)
    what = adapted(config.method.name, stage.model, stage.trainable, 'import')
    given = read_adapters(source, what)
    params = {path: array if dtype is None else array.astype(dtype) for path, array in given.params.items()}
    tokenizer = config.data.tokenizer if _is_tokenizer(config.data.tokenizer) else ''
    if bases:
        shapes = {path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in parameter_shapes(stage.model).items()}
        params = init_from.take(bases, shapes) | params
        if missing := [path for path in shapes if path not in params]:
            raise UserError(f'--init-from {", ".join(bases)} and {source} leave {len(missing)} parameters without a value: '
                            f'{name_list(missing, 3)}; add a checkpoint that has them.')
        for base in bases if not tokenizer else ():
            tokenizer = tokenizer or checkpoint.open_checkpoint(init_from.parse(base).checkpoint).tokenizer_dir
    checkpoint.write_checkpoint(to, unflatten(params), text, tokenizer, origin='import' if bases else PARTIAL)
    return _done(source, to, config.method.name, config.stage, given, params, bases)


def report(done: dict[str, Any]) -> str:
    """The same for people."""
    files = ', '.join(pathlib.Path(file).name for file in done['files'])
    lines = [f'{done["workdir"]}: {done["num_adapters"]:,} parameters of {done["method"]}, stage {done["stage"]}, from '
             f'{done["tensors"]} tensors of {files}']
    reasons: dict[str, list[str]] = {}
    for name, reason in done['ignored']:
        reasons.setdefault(reason, []).append(name)
    lines += [f'not used: {name_list(names, 2)} ({reason})' for reason, names in reasons.items()]
    if done['absent']:
        lines.append(f'the stage also trains {len(done["absent"])} parameters that are not there: '
                     f'{name_list(done["absent"], 3)}; there are {name_list(done["given"], 4)}')
    lines += done['notes']
    if done['bases']:
        lines.append(f'with the rest from {", ".join(done["bases"])} it is a whole model of {done["parameters"]:,} '
                     'parameters')
    else:
        lines.append(f'these alone are no model: train from them with --init-from BASE --init-from {done["workdir"]}, or '
                     'import again with --init-from BASE')
    return '\n'.join(lines)


def _done(source: pathlib.Path, to: str, method: str, stage: str, given: Given, params: dict[str, np.ndarray],
          bases: Sequence[str]) -> dict[str, Any]:
    def count(arrays):
        return int(sum(array.size for array in arrays.values()))

    return {'folder': str(source), 'workdir': to, 'method': method, 'stage': stage,
            'files': [str(file) for file in given.files], 'tensors': given.num_tensors, 'num_adapters': count(given.params),
            'parameters': count(params), 'bytes': sum(array.nbytes for array in params.values()),
            'dtypes': sorted({str(array.dtype) for array in given.params.values()}), 'given': list(given.params),
            'absent': list(given.absent), 'ignored': [list(pair) for pair in given.ignored], 'notes': list(given.notes),
            'bases': list(bases)}


def _is_tokenizer(folder: str) -> bool:
    try:
        return bool(folder) and bool(tokenizer_files(folder))
    except (OSError, UserError):
        return False
