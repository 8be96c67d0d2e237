"""Checkpoints: opened, written whole, restored.

`training.checkpoints.workdir` has the layout of a run's folder, `training.checkpoints.writer` saves while a run goes on.
"""
import dataclasses
import shutil
from typing import Any

import jax
import numpy as np
from orbax.checkpoint.experimental import v1 as ocp

from vora_jax.params import combine
from vora_jax.training.checkpoints import checksum, storage
from vora_jax.training.checkpoints.orbax_options import orbax_options, quiet
from vora_jax.training.checkpoints.record import Record, read_record
from vora_jax.training.checkpoints.storage import Path
from vora_jax.training.checkpoints.trouble import first_line, mismatch, mistake
from vora_jax.training.checkpoints.workdir import (
    copy_tokenizer,
    latest_step,
    raise_if_damaged,
    readable_tokenizer,
    sound_frozen,
    step_folder,
    step_numbers,
    write_config,
)
from vora_jax.types import Params, TryAgain, UserError


@dataclasses.dataclass(frozen=True)
class Opened:
    """A checkpoint ready to use.

    config_text: the resolved configuration of the run that wrote it.
    step: optimizer steps done.
    params: all parameters (trainable and frozen), a nested dict of NumPy arrays.
    tokenizer_dir: folder of the run's tokenizer; '' where it has none (an encoder).
    metadata: the step's record.
    workdir, path: the run's folder and the step's.
    """

    config_text: str
    step: int
    params: Params
    tokenizer_dir: str
    metadata: Record
    workdir: Path
    path: Path


def open_checkpoint(path: str | Path) -> Opened:
    """Opens a workdir (its latest good step) or one step's folder, local or of an object store. Called by all processes.

    Raises:
        UserError: the path is no checkpoint, or the step it names is unfinished or damaged.
    """
    folder = storage.to_path(path)
    if not folder.exists():
        raise UserError(f'{path} does not exist; give a workdir of `vora train`, or one of its steps '
                        '(WORKDIR/steps/N).')
    if folder.parent.name == 'steps' and folder.name.isdigit():
        workdir = folder.parent.parent
        if not checksum.is_committed(folder):
            raise UserError(f'{path} was never finished; give its workdir {workdir} to take the latest good step.')
        raise_if_damaged(folder)
    elif (folder / 'steps').is_dir():
        workdir, step = folder, latest_step(folder)
        if step is None:
            raise UserError(f'{path} is a workdir without a finished step; wait for its first checkpoint.')
        folder = step_folder(workdir, step)
    else:
        raise UserError(f'{path} is no checkpoint (it is {_describe(folder)}); give a workdir of `vora train` or '
                        '`vora import`, or one of its steps (WORKDIR/steps/N).')
    record = read_record(folder)
    trainable = load_as_numpy(folder, 'trainable')
    frozen: Params = {}
    if record.frozen:
        frozen = load_as_numpy(sound_frozen(workdir, record.frozen, folder), 'frozen')
    params = combine(trainable, frozen)
    return Opened(record.config_text, record.step, params, readable_tokenizer(workdir), record, workdir, folder)


def write_checkpoint(
    workdir: str | Path,
    params: Params,
    config_text: str,
    tokenizer_dir: str,
    step: int = 0,
    origin: str = 'merge',
) -> Path:
    """The folder of a new workdir's only step, which holds parameters (NumPy or JAX arrays) and no optimizer
    state. Called by all processes; a failure leaves no step.

    Args:
        tokenizer_dir: is copied; '' for none.
        origin: the verb that writes it.

    Raises:
        UserError: the workdir already holds steps or something else, or the disk is full.
    """
    workdir = storage.to_path(workdir)
    raise_if_used(workdir)
    if jax.process_index() == 0:
        write_config(workdir, config_text)
        checksum.remove_unfinished(workdir)  # what a killed process left
        _raise_if_too_large(workdir, params)
    folder = step_folder(workdir, step)
    stored, arrays = dataclasses.asdict(Record(step, config_text, origin=origin)), {'trainable': params}
    try:
        if jax.process_index() == 0:
            copy_tokenizer(tokenizer_dir, workdir)
        with orbax_options(one_file=False), quiet():
            ocp.save_checkpointables(storage.absolute(folder), arrays, custom_metadata=stored, overwrite=True)
        checksum.commit(folder)
    except BaseException as error:
        checksum.remove_unfinished(workdir)
        if 'No space left' in str(error) or 'quota exceeded' in str(error):  # OSErrors, and those of Orbax's libraries
            raise UserError(f'{workdir} cannot be written: the disk is full; free some space or choose another disk.'
                            ) from error
        raise
    return folder


def raise_if_used(workdir: str | Path) -> None:
    """Raises UserError if a workdir holds finished steps, or a folder holds something else than a run."""
    folder = storage.to_path(workdir)
    if step_numbers(folder):
        raise UserError(f'{workdir} already holds a run; give a new folder.')
    if folder.is_dir() and any(folder.iterdir()) and not (folder / 'config.gin').is_file():
        raise UserError(f'{workdir} is not empty and no workdir (it is {_describe(folder)}); give a new folder.')


def restore(folder: Path, shapes: dict[str, Any]) -> dict[str, Any]:
    """The named parts of a folder, as `jax.ShapeDtypeStruct`s with shardings say.

    Raises:
        UserError: a part does not have these shapes, or may not be read.
        TryAgain: the disk, the network or the store fails.
        JaxRuntimeError, MemoryError: as they come, such as for arrays that do not fit the devices.
    """
    try:
        return ocp.load_checkpointables(storage.absolute(folder), shapes)
    except Exception as error:  # Orbax wraps the telling one in others
        cause, unlike, why = error.__cause__ or error, mismatch(error), mistake(error)
        if isinstance(cause, jax.errors.JaxRuntimeError | MemoryError):
            raise
        if unlike:
            raise UserError(f'{folder} does not hold what this configuration needs: {unlike}') from error
        if why:
            raise UserError(f'{folder} cannot be read: {why[0]}; {why[1]}.') from error
        raise TryAgain(f'{folder} cannot be read: {first_line(cause)}; run the same command again.') from error


def load_as_numpy(folder: Path, part: str) -> Params:
    stored = ocp.checkpointables_metadata(storage.absolute(folder)).metadata[part]
    shapes = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), stored)
    return restore(folder, {part: shapes})[part]


def _raise_if_too_large(workdir: Path, params: Params) -> None:
    if storage.is_remote(workdir):
        return
    needed, free = sum(leaf.nbytes for leaf in jax.tree.leaves(params)), shutil.disk_usage(workdir).free
    if free < needed:
        raise UserError(f'{workdir} cannot be written: the weights need {needed:,} bytes, {free:,} are free; free some '
                        'space or choose another disk.')


def _describe(path: Path) -> str:
    if path.is_file():
        return 'a file'
    names = sorted(child.name for child in path.iterdir())
    if 'config.json' in names:
        return 'a Hugging Face folder'
    return f'a folder with {", ".join(names[:3])}' if names else 'an empty folder'
