"""Adapter files as our parameters."""
import json
import pathlib
from typing import Any, NamedTuple

import numpy as np

from vora_jax.convert.adapters.formats import LORA_CONFIG, PROJECTOR, Adapted, check_names, find_files, is_lora_folder
from vora_jax.convert.adapters.torch_files import read_torch
from vora_jax.convert.files.safetensors_files import open_folder
from vora_jax.convert.names.mismatch import name_list
from vora_jax.convert.names.name_map import entries, from_foreign, match_names
from vora_jax.nn.adapters import LowRank
from vora_jax.params import matches
from vora_jax.types import UserError
from vora_jax.vision.cue_enhancer import CueEnhancer


class Given(NamedTuple):
    """What adapter files give.

    params: flat, layers stacked, in the files' dtypes.    files: what was read.    num_tensors: used ones.
    absent: paths the stage trains that the files do not hold (a projector's file holds no more than that).
    ignored: (name of a tensor, why it is not used).    notes: sentences on what files do not tell, or quirks of code.
    """

    params: dict[str, np.ndarray]
    files: tuple[pathlib.Path, ...]
    num_tensors: int
    absent: tuple[str, ...]
    ignored: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]


def read_adapters(path: pathlib.Path, what: Adapted) -> Given:
    """The parameters that the files at `path` hold: all that the stage trains, or LLaVA's projector alone.

    Raises:
        UserError: torch is missing; the files cannot be read; names are missing, unexpected, or have other shapes; values
            are not finite; a LoRA folder scales its adapters in another way than the model.
    """
    files = find_files(path, what.method)
    shapes, trained = dict(what.shapes), what.shapes
    if what.method == 'llava' and not is_lora_folder(files):
        shapes = {name: shape for name, shape in shapes.items() if matches(name, (PROJECTOR,))}
    what = what._replace(shapes=shapes)
    check_names(what, f'import {path}')
    if is_lora_folder(files):
        _check_lora(path / LORA_CONFIG, what.model)
    tensors: dict[str, np.ndarray] = {}
    for file in files:
        tensors |= _tensors(file)
    pieces, given = entries(shapes, what.table), {name: array.shape for name, array in tensors.items()}
    _, ignored = match_names(pieces, given, what.table, str(path))
    params = from_foreign(tensors, shapes, what.table, str(path))
    if bad := [name for name, array in params.items() if not np.isfinite(array.astype(np.float32)).all()]:
        raise UserError(f'{path} holds NaN or infinity in {name_list(bad)}; take an earlier checkpoint.')
    return Given(params, tuple(files), len(tensors) - len(ignored), tuple(path for path in trained if path not in params),
                 tuple(ignored), tuple(_notes(what, params)))


def _tensors(file: pathlib.Path) -> dict[str, np.ndarray]:
    if file.suffix != '.safetensors':
        return read_torch(file)
    with open_folder(file) as folder:
        return {name: folder.read(name) for name in folder.tensors}


def _check_lora(file: pathlib.Path, model: Any) -> None:
    """UserError where the adapters of a LoRA folder are not those of the model."""
    try:
        config = json.loads(file.read_text(encoding='utf-8'))
        rank, alpha = int(config['r']), float(config['lora_alpha'])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f'{file} cannot be read as a configuration of LoRA ({error}); download it again.') from error
    adapter = next((each for group in model.groups for _, many in group.adapters for each in many), None)
    if not isinstance(adapter, LowRank):
        raise UserError(f'{file} belongs to a LoRA folder, but the stage of the configuration has no LowRank adapters; take '
                        'the stage `adapt`, with llava.adapter = @LowRank().')
    scale = alpha / rank**(0.5 if config.get('use_rslora') else 1)
    if adapter.rank == rank and abs(adapter.scale - scale) > 1e-6 * scale:
        raise UserError(f'{file}: lora_alpha {alpha:g} and r {rank} scale the adapters by {scale:g}, LowRank.scale is '
                        f'{adapter.scale:g}; set it to {scale:g}.')


def _notes(what: Adapted, params: dict[str, np.ndarray]) -> list[str]:
    """What a reader of these files should know."""
    notes, vision = [], what.model.vision
    if what.method == 'lavin':
        (_, mixture), *_ = vision.mixtures
        notes.append(f'The file does not tell temperature ({mixture.temperature:g}), scale ({mixture.scale:g}) and taps '
                     f'{vision.taps}: they are the configuration\'s.')
        if mixture.route_by == 'slot':
            notes.append('LaVIN\'s released vision tower routes each place by the batch\'s first image; for released '
                         'weights set lavin.route_images_by = \'own\' (the same for single images).')
    fusion = getattr(vision, 'fusion', None)
    scale, bias = (params.get(f'frontend/enhancer/norm_out/{name}') for name in ('scale', 'bias'))
    if isinstance(fusion, CueEnhancer) and scale is not None and (scale == 1).all() and not bias.any():
        notes.append('The enhancer\'s outer norm was never trained: the released code drops it, and queries with its last '
                     'tap; to compute as it does set CueEnhancer.final_norm = False and CueEnhancer.anchor = -1.')
    return notes
