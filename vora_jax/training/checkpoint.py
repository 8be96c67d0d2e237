"""Checkpoints on disk: layout, reading, writing.

    workdir/config.gin              resolved configuration
    workdir/tokenizer/              the tokenizer of the run
    workdir/frozen/HASH/            frozen weights, once, under the hash of their content
    workdir/steps/N/                trainable weights, optimizer state, and a record: data position,
    configuration, ...

Each folder is written by Orbax and committed by a checksum file (`training.checksum`).
"""
import dataclasses
import logging
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
from orbax.checkpoint.experimental import v1 as ocp

from vora_jax.data.text.tokenizer import fingerprint, tokenizer_files
from vora_jax.params import combine
from vora_jax.training import checksum
from vora_jax.training.orbax_options import orbax_options, quiet
from vora_jax.training.record import Record, read_record
from vora_jax.types import Params, UserError

log = logging.getLogger(__name__)

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
    workdir: pathlib.Path
    path: pathlib.Path


def open_checkpoint(path: str | pathlib.Path) -> Opened:
    """Opens a workdir (its latest good step) or one step's folder.

    Raises:
        UserError: the path is no checkpoint, or the step it names is unfinished or damaged.
    """
    folder = pathlib.Path(path)
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
        source = frozen_folder(workdir, record.frozen)
        if not source.is_dir():
            raise UserError(f'{folder} needs the frozen weights in {source}, which are missing; keep the workdir whole.')
        raise_if_damaged(source)
        frozen = load_as_numpy(source, 'frozen')
    params = combine(trainable, frozen)
    tokenizer = workdir / 'tokenizer'
    return Opened(record.config_text, record.step, params, str(tokenizer) if tokenizer.is_dir() else '', record, workdir,
                  folder)


def write_checkpoint(
    workdir: str | pathlib.Path,
    params: Params,
    config_text: str,
    tokenizer_dir: str,
    step: int = 0,
    origin: str = 'merge',
) -> pathlib.Path:
    """The folder of a new workdir's only step, which holds parameters (NumPy or JAX arrays) and no optimizer
    state. Called by all processes; a failure leaves no step.

    Args:
        tokenizer_dir: is copied; '' for none.
        origin: the verb that writes it.

    Raises:
        UserError: the workdir already holds steps or something else, or the disk is full.
    """
    workdir = pathlib.Path(workdir)
    raise_if_used(workdir)
    if jax.process_index() == 0:
        write_config(workdir, config_text)
        checksum.remove_unfinished(workdir)  # what a killed process left
        needed, free = sum(leaf.nbytes for leaf in jax.tree.leaves(params)), shutil.disk_usage(workdir).free
        if free < needed:
            raise UserError(f'{workdir} cannot be written: the weights need {needed:,} bytes, {free:,} are free; free some '
                            'space or choose another disk.')
    folder = step_folder(workdir, step)
    stored, arrays = dataclasses.asdict(Record(step, config_text, origin=origin)), {'trainable': params}
    try:
        if jax.process_index() == 0:
            copy_tokenizer(tokenizer_dir, workdir)
        with orbax_options(one_file=False), quiet():
            ocp.save_checkpointables(folder.absolute(), arrays, custom_metadata=stored, overwrite=True)
        if jax.process_index() == 0:
            checksum.commit(folder)
    except BaseException as error:
        checksum.remove_unfinished(workdir)
        if 'No space left' in str(error) or 'quota exceeded' in str(error):  # OSErrors, and those of Orbax's libraries
            raise UserError(f'{workdir} cannot be written: the disk is full; free some space or choose another disk.'
                            ) from error
        raise
    return folder


def raise_if_used(workdir: str | pathlib.Path) -> None:
    """Raises UserError if a workdir holds finished steps, or a folder holds something else than a run."""
    folder = pathlib.Path(workdir)
    if step_numbers(folder):
        raise UserError(f'{workdir} already holds a run; give a new folder.')
    if folder.is_dir() and any(folder.iterdir()) and not (folder / 'config.gin').is_file():
        raise UserError(f'{workdir} is not empty and no workdir (it is {_describe(folder)}); give a new folder.')


def write_config(workdir: pathlib.Path, config_text: str) -> None:
    """Writes workdir/config.gin."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / 'config.gin').write_text(config_text)
    except OSError as error:
        raise UserError(f'cannot write to the workdir {workdir}: {error.strerror}; give another folder.') from None


def copy_tokenizer(folder: str, workdir: pathlib.Path) -> None:
    """Copies the tokenizer into the workdir, unless the same one lies there; '' for none."""
    target = workdir / 'tokenizer'
    if not folder:
        shutil.rmtree(target, ignore_errors=True)
        return
    if target.is_dir() and fingerprint(str(target)) == fingerprint(folder):
        return
    shutil.rmtree(target, ignore_errors=True)
    # Under a temporary name first: a killed process leaves no half of a tokenizer.
    temporary = workdir / 'tokenizer.tmp'
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    for file in tokenizer_files(folder):
        shutil.copyfile(file, temporary / file.name)
    temporary.rename(target)


def step_folder(workdir: pathlib.Path, step: int) -> pathlib.Path:
    return workdir / 'steps' / str(step)


def frozen_folder(workdir: pathlib.Path, content: str) -> pathlib.Path:
    return workdir / 'frozen' / content


def step_numbers(workdir: pathlib.Path, committed: bool = True) -> list[int]:
    """Steps in a workdir, ascending; also the unfinished ones if not `committed`."""
    steps = workdir / 'steps'
    names = [path.name for path in steps.iterdir()] if steps.is_dir() else []
    numbers = sorted(int(name) for name in names if name.isdigit())
    return [n for n in numbers if not committed or checksum.is_committed(step_folder(workdir, n))]


def latest_step(workdir: pathlib.Path) -> int | None:
    """The newest step that is finished and sound; None where no step was ever finished. Newer damaged ones
    are told.

    Raises:
        UserError: every finished step is damaged.
    """
    finished = step_numbers(workdir)
    for step in step_numbers(workdir, committed=False):
        if step not in finished:
            log.warning('%s was not finished when its run ended; it is not used.', step_folder(workdir, step))
    for step in reversed(finished):
        folder = step_folder(workdir, step)
        damaged = checksum.damaged_files(folder)
        if not damaged:
            return step
        log.warning(
            'DAMAGED CHECKPOINT: %s: %d of its files changed since they were written (first %s); taking an '
            'older step.',
            folder, len(damaged), damaged[0],
        )
    if finished:
        raise UserError(f'every checkpoint in {workdir / "steps"} is damaged; restore them, or start in a new workdir.')
    return None


def restore(folder: pathlib.Path, shapes: dict[str, Any]) -> dict[str, Any]:
    """The named parts of a folder, as `jax.ShapeDtypeStruct`s with shardings say.

    Raises:
        UserError: a part does not have these shapes.
    """
    try:
        return ocp.load_checkpointables(folder.absolute(), shapes)
    except Exception as error:  # Orbax wraps the telling message in others
        reason = str(error.__cause__ or error).splitlines()[0]
        raise UserError(f'{folder} does not hold what this configuration needs: {reason}') from error


def load_as_numpy(folder: pathlib.Path, part: str) -> Params:
    stored = ocp.checkpointables_metadata(folder.absolute()).metadata[part]
    shapes = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), stored)
    return restore(folder, {part: shapes})[part]


def raise_if_damaged(folder: pathlib.Path) -> None:
    """Raises UserError if a committed folder has changed since it was written."""
    damaged = checksum.damaged_files(folder)
    if damaged:
        raise UserError(f'{folder} is damaged: {len(damaged)} of its files changed since they were written, the first is '
                        f'{damaged[0]}; take another step or a copy.')


def _describe(path: pathlib.Path) -> str:
    if path.is_file():
        return 'a file'
    names = sorted(child.name for child in path.iterdir())
    if 'config.json' in names:
        return 'a Hugging Face folder'
    return f'a folder with {", ".join(names[:3])}' if names else 'an empty folder'
