"""What lies where in a workdir.

    workdir/config.gin              resolved configuration
    workdir/tokenizer/              the tokenizer of the run
    workdir/frozen/HASH/            frozen weights, once, under the hash of their content
    workdir/steps/N/                trainable weights, optimizer state, and a record: data position,
    configuration, ...

Each folder of arrays is written by Orbax and committed by a checksum file (`training.checkpoints.checksum`).
"""
import hashlib
import logging
import os
import pathlib
import shutil
import tempfile

import jax

from vora_jax.data.text.tokenizer import fingerprint, tokenizer_files
from vora_jax.training.checkpoints import agree, checksum, storage
from vora_jax.training.checkpoints.storage import Path
from vora_jax.training.checkpoints.trouble import first_line, mistake
from vora_jax.types import TryAgain, UserError

log = logging.getLogger(__name__)


def step_folder(workdir: Path, step: int) -> Path:
    return workdir / 'steps' / str(step)


def frozen_folder(workdir: Path, content: str) -> Path:
    return workdir / 'frozen' / content


def step_numbers(workdir: Path, committed: bool = True) -> list[int]:
    """Steps in a workdir, ascending; also the unfinished ones if not `committed`."""
    steps = workdir / 'steps'
    names = [path.name for path in steps.iterdir()] if steps.is_dir() else []
    numbers = sorted(int(name) for name in names if name.isdigit())
    return [n for n in numbers if not committed or checksum.is_committed(step_folder(workdir, n))]


def latest_step(workdir: Path) -> int | None:
    """The newest step that is finished and sound; None where no step was ever finished. Newer damaged ones
    are told. Called by all processes, which get the same answer.

    Raises:
        UserError: every finished step is damaged.
        TryAgain: a file is there and cannot be read.
    """
    finished, begun = agree.decide(f'steps {workdir}',
                                   lambda: [step_numbers(workdir), step_numbers(workdir, committed=False)])
    for step in begun:
        if step not in finished:
            _warn('%s was not finished when its run ended; it is not used.', step_folder(workdir, step))
    for step in reversed(finished):
        folder = step_folder(workdir, step)
        damaged = checksum.damaged_files(folder)
        if not damaged:
            return step
        _warn(
            'DAMAGED CHECKPOINT: %s: %d of its files changed since they were written (first %s); taking an '
            'older step.',
            folder, len(damaged), damaged[0],
        )
    if finished:
        raise UserError(f'every checkpoint in {workdir / "steps"} is damaged; restore them, or start in a new workdir.')
    return None


def raise_if_damaged(folder: Path, advice: str = 'take another step or a copy') -> None:
    """Raises UserError if a committed folder has changed since it was written. Called by all processes."""
    damaged = checksum.damaged_files(folder)
    if damaged:
        raise UserError(f'{folder} is damaged: {len(damaged)} of its files changed since they were written, the first is '
                        f'{damaged[0]}; {advice}.')


def sound_frozen(workdir: Path, content: str, needed_by: Path) -> Path:
    """The folder of frozen weights. Called by all processes.

    Raises:
        UserError: it is missing or damaged. Equal weights hash alike, so another run can make it again.
    """
    folder = frozen_folder(workdir, content)
    advice = (f'copy frozen/{content} from another run of the same weights, or make it again: train one step of the same '
              'configuration (--gin.Train.steps=1) in another --workdir and copy it from there')
    if not agree.decide(f'there {folder}', folder.is_dir):
        raise UserError(f'{needed_by} needs the frozen weights in {folder}, which are missing; {advice}.')
    raise_if_damaged(folder, advice)
    return folder


def write_config(workdir: Path, config_text: str) -> None:
    """Writes workdir/config.gin."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / 'config.gin').write_text(config_text)
    except Exception as error:  # an OSError, or one of an object store's library
        raise cannot_write(workdir, error) from error


def copy_tokenizer(folder: str, workdir: Path) -> None:
    """Copies the tokenizer into the workdir, unless the same one lies there; '' for none."""
    target = workdir / 'tokenizer'
    if folder and target.is_dir() and fingerprint(readable_tokenizer(workdir)) == fingerprint(folder):
        return
    if target.is_dir():
        storage.remove_folder(target)
    if not folder:
        return
    # Under a temporary name first: a killed process leaves no half of a tokenizer.
    temporary = target if storage.is_remote(workdir) else workdir / 'tokenizer.tmp'
    if temporary.is_dir():
        storage.remove_folder(temporary)
    temporary.mkdir()
    for file in tokenizer_files(folder):
        storage.copy_files([file.name], file.parent, temporary)
    if temporary != target:
        temporary.rename(target)


def readable_tokenizer(workdir: Path) -> str:
    """The workdir's tokenizer as a local folder; '' where it has none."""
    source = workdir / 'tokenizer'
    if not source.is_dir():
        return ''
    if storage.is_remote(workdir):
        return _local_copy(source, storage.local_side(workdir))
    return str(source)


def quarantine_file() -> str:
    """The name of this process's file of what could not be used: no two processes append to one."""
    index = jax.process_index()
    return 'quarantine.jsonl' if index == 0 else f'quarantine-{index:05}.jsonl'


def send_logs(workdir: Path) -> None:
    """Copies what this process appends to on its machine into a remote workdir. A failure is told; the next call tries
    again."""
    source = storage.local_side(workdir)
    if source == workdir:
        return
    try:
        storage.copy_files([quarantine_file()], source, workdir)
        if jax.process_index() == 0:
            board = 'tensorboard'
            storage.copy_files([path.name for path in (source / board).glob('*')], source / board, workdir / board)
    except Exception as error:  # the arrays are safe: no reason to end a run
        log.warning('the logs could not be copied to %s: %s; the next checkpoint tries again.', workdir, first_line(error))


def fetch_quarantine(workdir: Path) -> None:
    """Copies what this process could not use so far from a remote workdir to its machine, which goes on with it."""
    target = storage.local_side(workdir)
    if target != workdir:
        storage.copy_files([quarantine_file()], workdir, target)


def _local_copy(source: Path, parent: pathlib.Path) -> str:
    """A local folder with the files of a remote one, named by their content: the processes of a host may make it at once."""
    files = {path.name: path.read_bytes() for path in sorted(source.iterdir()) if path.is_file()}
    digest = hashlib.sha256()
    for name, content in files.items():
        digest.update(f'{name} {len(content)} '.encode() + content)
    target = parent / f'tokenizer-{digest.hexdigest()[:16]}'
    if target.is_dir():
        return str(target)
    parent.mkdir(parents=True, exist_ok=True)
    temporary = tempfile.mkdtemp(prefix='tokenizer-', suffix='.tmp', dir=parent)
    for name, content in files.items():
        pathlib.Path(temporary, name).write_bytes(content)
    try:
        os.rename(temporary, target)
    except OSError:  # another process was first
        shutil.rmtree(temporary)
        if not target.is_dir():
            raise
    return str(target)


def cannot_write(workdir: Path, error: Exception) -> UserError | TryAgain:
    """Why a workdir cannot be written, in one sentence."""
    told = f'cannot write to the workdir {workdir}: {first_line(error)}'
    if mistake(error) or isinstance(error, FileExistsError | ValueError):  # a file is where it should be; no such name
        return UserError(f'{told}; give another folder.')
    return TryAgain(f'{told}; run the same command again.')


def _warn(*message: object) -> None:
    if jax.process_index() == 0:
        log.warning(*message)
