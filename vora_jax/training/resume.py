"""What a workdir holds of a run, taken up again."""
import dataclasses
import logging
from collections.abc import Callable

import jax
import numpy as np

from vora_jax.training import state as state_lib
from vora_jax.training.checkpoints import agree, checkpoint, workdir
from vora_jax.training.checkpoints.record import Record, read_record
from vora_jax.training.checkpoints.storage import Path
from vora_jax.training.config import Train
from vora_jax.training.config_changes import changed_binding, differences, first_difference
from vora_jax.types import Params, UserError

log = logging.getLogger(__name__)


def find_last(folder: Path) -> Record | None:
    """The record of the latest good step; all processes look together, and agree."""
    step = workdir.latest_step(folder)
    if step is None:
        return None
    path = workdir.step_folder(folder, step)
    record = Record(**agree.decide(f'record {path}', lambda: dataclasses.asdict(read_record(path))))
    if record.origin != 'train':
        raise UserError(f'{folder} holds the result of {record.origin}; give a new --workdir, and '
                        f'--init-from {folder} to start from it.')
    return record


def check_same_run(record: Record, config: Train, config_text: str, folder: Path, parse: Callable) -> Train:
    """The configuration that wrote the record; UserError unless `config` continues its run."""
    before = parse(record.config_text)
    other = first_difference(before, config)
    if other:
        told = changed_binding(record.config_text, config_text) or (other.path, repr(other.old), repr(other.new))
        raise UserError('{} holds another run: {} was {} there and is {} now; set it back, or give a new '
                        '--workdir.'.format(folder, *told))
    for change in differences(before, config):
        log.info('changed since the last checkpoint: %s from %r to %r', change.path, change.old, change.new)
    return before


def check_same_data(record: Record, manifest: str, before: Train, config: Train) -> None:
    """UserError unless the data's content is what the run was started with."""
    if record.manifest == manifest:
        return
    moved = [change for change in differences(before.data, config.data, 'Train.data') if change.free]
    told = 'the files of Train.data changed'
    if moved:
        told = f'{moved[0].path} was {moved[0].old!r} and is {moved[0].new!r}'
    raise UserError(f'{told}, and the content of samples or tokenizer is not what the run was started with (or another '
                    'version of vora packed them); restore it, or give a new --workdir.')


def restore_run(plan: state_lib.Plan, record: Record, folder: Path) -> tuple[state_lib.State, Params]:
    """(state, frozen weights) of the step that the record tells of, placed as the plan says."""
    shapes = {'trainable': plan.state.trainable, 'optimizer': (plan.state.opt_state, plan.state.health)}
    parts = checkpoint.restore(workdir.step_folder(folder, record.step), shapes)
    step = jax.jit(lambda: np.int32(record.step), out_shardings=plan.state.step.sharding)()
    frozen: Params = {}
    if record.frozen:
        source = workdir.sound_frozen(folder, record.frozen, workdir.step_folder(folder, record.step))
        frozen = checkpoint.restore(source, {'frozen': plan.frozen})['frozen']
    return state_lib.State(step, parts['trainable'], *parts['optimizer']), frozen
