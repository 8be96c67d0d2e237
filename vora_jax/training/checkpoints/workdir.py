"""What lies where in a workdir.

    workdir/config.gin              resolved configuration
    workdir/tokenizer/              the tokenizer of the run
    workdir/frozen/HASH/            frozen weights, once, under the hash of their content
    workdir/steps/N/                trainable weights, optimizer state, and a record: data position,
    configuration, ...

Each folder of arrays is written by Orbax and committed by a checksum file (`training.checkpoints.checksum`).
"""
import json
import logging

import jax

from vora_jax.data.text.tokenizer import fingerprint, tokenizer_files
from vora_jax.training.checkpoints import agree, checksum, storage
from vora_jax.training.checkpoints.storage import Path
from vora_jax.types import UserError

log = logging.getLogger(__name__)

LOGS = ('quarantine*.jsonl', 'tensorboard/*')  # what is appended to, which object stores cannot


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
    """
    seen = [step_numbers(workdir), step_numbers(workdir, committed=False)]
    finished, begun = json.loads(agree.announce(f'steps {workdir}', json.dumps(seen)))
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
    if not folder.is_dir():
        raise UserError(f'{needed_by} needs the frozen weights in {folder}, which are missing; {advice}.')
    raise_if_damaged(folder, advice)
    return folder


def write_config(workdir: Path, config_text: str) -> None:
    """Writes workdir/config.gin."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / 'config.gin').write_text(config_text)
    except Exception as error:  # an OSError, or one of an object store's library
        told = getattr(error, 'strerror', None) or str(error).partition('\n')[0]
        raise UserError(f'cannot write to the workdir {workdir}: {told}; give another folder.') from None


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
    source, target = workdir / 'tokenizer', storage.local_side(workdir) / 'tokenizer'
    if not source.is_dir():
        return ''
    if target != source:
        if target.is_dir():
            storage.remove_folder(target)  # of an earlier look
        storage.copy_files([path.name for path in source.iterdir()], source, target)
    return str(target)


def send_logs(workdir: Path) -> None:
    """Copies what a run appends to on this machine into a remote workdir."""
    _copy_logs(storage.local_side(workdir), workdir, LOGS)


def fetch_quarantine(workdir: Path) -> None:
    """Copies what could not be used so far from a remote workdir to this machine, which goes on with it."""
    _copy_logs(workdir, storage.local_side(workdir), LOGS[:1])


def _copy_logs(source: Path, target: Path, patterns: tuple[str, ...]) -> None:
    for folder, _, pattern in (pattern.rpartition('/') for pattern in patterns if source != target):
        storage.copy_files([path.name for path in (source / folder).glob(pattern)], source / folder, target / folder)


def _warn(*message: object) -> None:
    if jax.process_index() == 0:
        log.warning(*message)
