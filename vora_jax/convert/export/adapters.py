"""Adapters in the files of the papers' code."""
import math
import pathlib
import time
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from vora_jax.convert.adapters.formats import (
    DUAL_LORA_FILE,
    LORA_CONFIG,
    LORA_STEM,
    NON_LORA,
    PROJECTOR,
    PROJECTOR_FILE,
    Adapted,
    adapted,
    check_names,
)
from vora_jax.convert.adapters.torch_files import import_torch, write_torch
from vora_jax.convert.export.adapter_notes import facts, refuse, training_config
from vora_jax.convert.export.foreign_stream import stream, tensor_infos
from vora_jax.convert.export.layouts import ADAPTERS
from vora_jax.convert.export.model_card import CONFIG_FILE
from vora_jax.convert.export.plan import Part, Provenance
from vora_jax.convert.export.to_hf import DTYPES, RECORD, Exported, is_export, write_texts
from vora_jax.convert.files.new_folder import new_folder
from vora_jax.convert.files.safetensors_files import write_shards
from vora_jax.convert.names.name_map import Table, check, prefixed
from vora_jax.method import Method
from vora_jax.params import flatten, matches
from vora_jax.types import Params, UserError

PEFT_PREFIX = 'base_model.model.'  # before the names of a model that peft wraps


class _File(NamedTuple):
    """One file. table: its names.    paths: our parameters in it.    key: of the dict that holds the dict of tensors."""

    name: str
    table: Table
    paths: list[str]
    key: str = ''


def export_adapters(params: Params, method: Method, stage: str, folder: str, *, dtype: str = 'keep', base: str = '',
                    provenance: Provenance = Provenance(), overwrite: bool = False) -> Exported:
    """Writes what a stage trained as the method's own code reads it; the folder appears when it is complete.

    lavin: checkpoint-STEP.pth. llava: mm_projector.bin, or a LoRA folder. vce_dual_lora: adapter_weight.pth.

    Args:
        params: nested; those that the stage does not train may lack.
        dtype: of the tensors; 'keep' takes the narrowest that holds all of them exactly.
        base: name of the base model elsewhere, for LoRA folders.

    Raises:
        UserError: the method has no such files, or they have no place for all that the stage trains; trained parameters
            are missing or not finite; torch is missing; the folder exists.
    """
    if dtype not in DTYPES:
        raise UserError(f'export: dtype {dtype!r} is unknown; choose one of {", ".join(DTYPES)}.')
    started = time.perf_counter()
    what = adapted(method.name, method.stage(stage).model, method.stage(stage).trainable, 'export')
    check_names(what, 'export')
    refuse(what)
    flat = {path: leaf for path, leaf in flatten(params).items() if path in what.shapes}
    check(what.shapes, {path: leaf.shape for path, leaf in flat.items()}, 'the checkpoint')
    if dtype == 'keep':
        dtype = str(jnp.result_type(*{jnp.dtype(leaf.dtype) for leaf in flat.values()}))
    files, is_lora = _files(what, provenance.step), _is_lora(what)
    if base and not is_lora:
        raise UserError('export: only a LoRA folder names its base model; leave out --base.')
    import_torch()  # before anything is written
    notes = facts(what, pathlib.Path(folder).name if is_lora else '')
    sizes = []
    with new_folder(folder, overwrite, is_export) as partial:
        for file in files:
            part = Part(file.table, *({path: of[path] for path in file.paths} for of in (flat, what.shapes)), {})
            infos = tensor_infos(part, dtype)
            sizes += [math.prod(shape) for _, _, shape in infos]
            if file.name.endswith('.safetensors'):
                write_shards(partial, stream(part, dtype), infos, 1 << 60, LORA_STEM)
            else:
                write_torch(partial / file.name, {name: np.array(array) for name, array in stream(part, dtype)}, file.key)
        texts: dict[str, Any] = training_config(what, dtype, base)
        if is_lora:
            texts[LORA_CONFIG] = _lora_config(what, base)
        texts['README.md'] = _card(what, files, notes, provenance)
        texts |= {CONFIG_FILE: provenance.config_text} if provenance.config_text else {}
        texts[RECORD] = {'layout': ADAPTERS, 'merged': False, 'dtype': dtype, 'base': base, 'image_token_id': None,
                         'method': what.method, 'trainable': list(what.trainable)}
        write_texts(partial, texts)
    return Exported(ADAPTERS, dtype, False, len(sizes), sum(sizes), sum(sizes) * np.dtype(infos[0][1]).itemsize,
                    (), tuple(notes), None, {'weights': round(time.perf_counter() - started, 3)})


def _is_lora(what: Adapted) -> bool:
    return what.method == 'llava' and any('/adapter_' in path for path in what.shapes)


def _files(what: Adapted, step: int) -> list[_File]:
    """The files of the method's own code, with the prefixes its training gives the names."""
    wrapped, paths = prefixed(what.table, '', PEFT_PREFIX), list(what.shapes)
    if what.method == 'lavin':
        return [_File(f'checkpoint-{step}.pth', what.table, paths, 'model')]
    if what.method == 'vce_dual_lora':
        has_adapters = any('/adapter_' in path for path in paths)
        return [_File(DUAL_LORA_FILE, wrapped if has_adapters else what.table, paths)]
    if not _is_lora(what):
        return [_File(PROJECTOR_FILE, what.table, paths)]
    return [_File(f'{LORA_STEM}.safetensors', wrapped, [path for path in paths if '/adapter_' in path]),
            _File(NON_LORA, wrapped, [path for path in paths if matches(path, (PROJECTOR,))])]


def _lora_config(what: Adapted, base: str) -> dict[str, Any]:
    group, = what.model.groups
    (_, (adapter,)), *_ = group.adapters
    return {'peft_type': 'LORA', 'task_type': 'CAUSAL_LM', 'r': adapter.rank, 'lora_alpha': adapter.scale * adapter.rank,
            'lora_dropout': adapter.dropout, 'bias': 'none', 'fan_in_fan_out': False, 'inference_mode': True,
            'target_modules': [linear for linear, _ in group.adapters], 'modules_to_save': None,
            'base_model_name_or_path': base or None}


def _card(what: Adapted, files: list[_File], notes: list[str], provenance: Provenance) -> str:
    """README.md."""
    lines = [f'Adapters trained with vora_jax, in the files of the code of {what.method}: '
             f'{", ".join(f"`{file.name}`" for file in files)}. They hold what the stage `{provenance.stage}` trained '
             'and need the base models it started from.', '']
    lines += ['To know:', '', *(f'- {note}' for note in notes), ''] * bool(notes)
    lines += ['Read them again: `vora import THIS_FOLDER --config CONFIG.gin --to W`.', '']
    lines += [f'- {name}: {value}' for name, value in (
        ('step', provenance.step), ('started from', ', '.join(provenance.base)), ('data', ', '.join(provenance.sources)),
        ('hash of the data', provenance.manifest), ('configuration', f'`{CONFIG_FILE}`' if provenance.config_text else ''))
        if value != '']
    return '\n'.join(lines) + '\n'
