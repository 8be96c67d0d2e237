"""Which files the papers' code keeps adapters in."""
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from vora_jax.convert.export.exportable import parameter_shapes
from vora_jax.convert.names.mismatch import Shapes, name_list
from vora_jax.convert.names.name_map import Table, entries
from vora_jax.convert.names.tables.adapters import LAVIN_ADAPTERS, dual_lora_adapters, llava_adapters
from vora_jax.params import matches
from vora_jax.types import UserError

LORA_CONFIG, LORA_STEM, NON_LORA = 'adapter_config.json', 'adapter_model', 'non_lora_trainables.bin'
PROJECTOR_FILE, DUAL_LORA_FILE, CUES_FILE = 'mm_projector.bin', 'adapter_weight.pth', 'VCE_weights.pth'
PROJECTOR = 'frontend/projector_*'
METHODS = 'lavin', 'llava', 'vce_dual_lora'


class Adapted(NamedTuple):
    """A stage of a method that has adapter files.

    method: its name.    model: of the stage.    trainable: its patterns.    shapes: of the parameters they match.
    table: their names in the files.
    """

    method: str
    model: Any
    trainable: tuple[str, ...]
    shapes: Shapes
    table: Table


def adapted(method: str, model: Any, trainable: Sequence[str], where: str) -> Adapted:
    """What the files of a stage hold.

    Args:
        method, model, trainable: of `method.Method` and its `Stage`.
        where: the verb, for errors.

    Raises:
        UserError: the authors of this method have no such files.
    """
    if method not in METHODS:
        raise UserError(f'{where}: {method} has no adapter files of its own, only {", ".join(METHODS)} have.')
    layers = model.vision.projector.num_layers
    table = {'lavin': lambda: LAVIN_ADAPTERS, 'llava': lambda: llava_adapters(layers),
             'vce_dual_lora': lambda: dual_lora_adapters(layers)}[method]()
    shapes = {path: shape for path, shape in parameter_shapes(model).items() if matches(path, trainable)}
    return Adapted(method, model, tuple(trainable), shapes, table)


def check_names(what: Adapted, where: str) -> None:
    """UserError where the method's files have no place for what the stage trains."""
    nameless = [path for path, shape in what.shapes.items() if not _has_name(what.table, path, shape)]
    if nameless:
        raise UserError(f'{where}: the adapter files of {what.method} have no place for all that this stage trains '
                        f'({name_list(nameless, 2)}); take another layout or stage.')


def find_files(path: pathlib.Path, method: str) -> list[pathlib.Path]:
    """The files of adapters that a path means: itself, or the one of the method in a folder (of a LoRA folder, two).

    Raises:
        UserError: there is none, or a choice.
    """
    if path.is_file():
        if method == 'llava' and path.stem == LORA_STEM:
            raise UserError(f'{path} is one file of a LoRA folder, which holds the projector in another; give the folder '
                            f'{path.parent}.')
        return [path]
    if not path.is_dir():
        raise UserError(f'{path} does not exist; correct the path.')
    if method == 'llava':
        if (path / LORA_CONFIG).is_file():
            names = [name for name in (f'{LORA_STEM}.safetensors', f'{LORA_STEM}.bin') if (path / name).is_file()]
            if not names or not (path / NON_LORA).is_file():
                raise UserError(f'{path} holds {LORA_CONFIG}, but not {LORA_STEM}.safetensors or {LORA_STEM}.bin, and '
                                f'{NON_LORA}; give the LoRA folder whole.')
            return [path / names[0], path / NON_LORA]
        found = [path / PROJECTOR_FILE] if (path / PROJECTOR_FILE).is_file() else []
    elif method == 'vce_dual_lora':
        found = [path / name for name in (DUAL_LORA_FILE, CUES_FILE) if (path / name).is_file()]
    else:
        found = sorted(path.glob('*.pth'))
    if len(found) != 1:
        raise UserError(f'{path} holds {len(found) or "no"} adapter files of {method}'
                        f'{found and f" ({name_list([file.name for file in found], 4)})" or ""}; give one file.')
    return found


def is_lora_folder(files: Sequence[pathlib.Path]) -> bool:
    """Whether the files are those of a LoRA folder."""
    return files[0].stem == LORA_STEM


def looks_like_adapters(path: pathlib.Path) -> bool:
    """Whether a path that is no Hugging Face folder of a model may hold adapters."""
    if not path.is_dir():
        return path.is_file() and path.suffix in ('.pth', '.pt', '.bin')
    if (path / LORA_CONFIG).is_file():
        return True
    patterns = PROJECTOR_FILE, DUAL_LORA_FILE, CUES_FILE, 'checkpoint-*.pth'
    return any(any(path.glob(name)) for name in patterns) and not any(
        any(path.glob(name)) for name in ('model*.safetensors', 'pytorch_model*'))


def _has_name(table: Table, path: str, shape: tuple[int, ...]) -> bool:
    try:
        return bool(entries({path: shape}, table))
    except UserError:
        return False
