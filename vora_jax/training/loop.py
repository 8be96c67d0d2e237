"""The training loop, top to bottom."""
import collections
import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable
from typing import Literal

import jax
import numpy as np

from vora_jax.params import count
from vora_jax.training import guard, init_from
from vora_jax.training import state as state_lib
from vora_jax.training.checkpoints import agree, checkpoint
from vora_jax.training.checkpoints.checkpoint import Record
from vora_jax.training.checkpoints.shared import raise_if_not_shared
from vora_jax.training.checkpoints.storage import Path, to_path
from vora_jax.training.checkpoints.writer import Writer
from vora_jax.training.config import Train, validate
from vora_jax.training.interrupt import CTRL_C, stop_request
from vora_jax.training.log import wandb_run
from vora_jax.training.log.clock import Clock
from vora_jax.training.log.metrics import Log
from vora_jax.training.log.profile import Profile
from vora_jax.training.log.summary import write_summary
from vora_jax.training.log.yardstick import yardstick
from vora_jax.training.losses import BY_SOURCE
from vora_jax.training.mesh import sharding
from vora_jax.training.mesh.attend import language_attention
from vora_jax.training.mesh.row_shards import open_mesh, row_shard
from vora_jax.training.prefetch import Prefetch
from vora_jax.training.program import build
from vora_jax.training.resume import check_same_data, check_same_run, find_last, restore_run
from vora_jax.training.run_data import open_data
from vora_jax.training.watchdog import DATA, FIRST, OPENING, SAVING, STEP, watching
from vora_jax.types import Params, TryAgain, UserError

log = logging.getLogger(__name__)

MEET_SECONDS = 24 * 3600  # that one process waits for another that is alive: the watchdog is to judge
IN_FLIGHT = 2  # steps the host may run ahead of the devices: hides its own work, yet Ctrl-C acts at once


def train(
    config: Train, config_text: str, workdir: str, parse: Callable[[str], Train], hang: Callable[[str], None] | None = None,
) -> Literal['complete', 'preempted', 'interrupted']:
    """Runs one stage, or resumes it where the last checkpoint left it.

    Args:
        config: the run.
        config_text: its resolved text, saved with every checkpoint.
        workdir: folder of the run, local or of an object store (gs://...).
        parse: gives the `Train` of a resolved text, to compare with the run that the workdir holds.
        hang: ends all processes of a run in which nothing moves, for the reason it is given; this process alone by default.

    Returns:
        What ended it: there is no step left, a scheduler's notice (SIGTERM), or Ctrl-C. After the last two the run is saved
        and can be resumed.

    Raises:
        UserError: a value that makes no sense, a workdir of another run, too many bad samples.
        TryAgain: trouble that may pass.
    """
    begun = time.time()
    validate(config)
    wandb_run.raise_if_missing(config.wandb)
    folder = to_path(workdir)
    raise_if_not_shared(folder)
    mesh = open_mesh(config)

    with contextlib.ExitStack() as stack:
        watchdog = stack.enter_context(watching(config.hang_seconds, folder, hang))

        # 1. What does the workdir hold?
        record, before = find_last(folder), None
        if record:
            before = check_same_run(record, config, config_text, folder, parse)
            if record.step >= config.steps:
                log.info('%s is complete: %d of %d steps are done.', folder, record.step, config.steps)
                return 'complete'

        # 2. Data, read ahead in a thread.
        data = open_data(config, folder, row_shard(mesh), lambda: watchdog.beat(OPENING, 0))
        stack.enter_context(contextlib.closing(data))
        if record:
            check_same_data(record, data.manifest, before, config)
            data.set_state(record.data)
        if jax.process_index() == 0:  # only now: a refused run leaves the workdir as it was
            checkpoint.write_config(folder, config_text)
            checkpoint.copy_tokenizer(config.data.tokenizer, folder)
        writer = Writer(folder, config.checkpoint.keep_last, config.checkpoint.keep_every_steps)
        batches = stack.enter_context(contextlib.closing(Prefetch(data, sharding.rows(mesh))))
        stack.enter_context(sharding.use(mesh))
        stop = stack.enter_context(stop_request())
        ready = next(batches)
        _meet('the data')
        watchdog.beat(FIRST, 0)

        # 3. Model, optimizer and weights: restored, or new.
        program = build(config, ready.batch, mesh)
        plan = program.plan
        record, state, frozen = _start(plan, record, config, folder, writer, data.manifest)
        begin = record = dataclasses.replace(record, config_text=config_text)
        num_trainable, num_frozen = count(state.trainable), count(frozen)
        log.info('training %s of %s parameters', f'{num_trainable:,}', f'{num_trainable + num_frozen:,}')
        told = language_attention(plan.model, plan.batch, mesh, config.attention)
        if told:
            log.info('attention: %s', told)

        # 4. Steps. Nothing here waits for the devices, except to keep the host from running far ahead of
        # them.
        clock, profile = Clock(), Profile(folder, config.profile_steps)
        progress = Log(folder, record.step, config.steps, yardstick(config, plan, ready.batch, mesh), clock, begun,
                       config.wandb, config_text)
        started = time.perf_counter() - record.seconds
        done, pending, in_flight, trouble = record.step, [], collections.deque(), None
        streak, saved = guard.Streak(config.guard.max_skips), record.step
        step = program.step.lower(state, frozen, ready.batch).compile()
        _meet('the compiled step')
        while done < config.steps and not trouble:
            with profile.step(done + 1, in_flight):
                state, metrics = step(state, frozen, ready.batch)
            done, position = done + 1, ready.position
            pending.append(metrics)
            in_flight.append(metrics['loss'])
            if progress.waits_for_first_step:
                jax.block_until_ready(metrics)
                progress.start_clock()
            if len(in_flight) > IN_FLIGHT:
                with clock.part('device'):
                    in_flight.popleft().block_until_ready()
            profile.end(done, metrics)
            writer.check()

            # 5. The next batch. Trouble of any kind ends the loop after this step, with a checkpoint.
            trouble = stop.at(done)
            watchdog.beat(DATA, done)
            if done < config.steps and not trouble:
                try:
                    with clock.part('data'):
                        ready = next(batches)
                except (UserError, TryAgain) as error:
                    if jax.process_count() > 1:  # the others go on: there is no step that all could save
                        raise
                    trouble = error

            # 6. Metrics, and now and then a checkpoint: at the position of the batches trained on, not of
            # those read.
            saves = done == config.steps or trouble or done % config.checkpoint.every_steps == 0
            if saves or done % config.log_every == 0:
                with clock.part('device'):
                    steps, pending = jax.device_get(pending), []
                row, failed = progress.write(done, steps), streak.read(done, steps)
                profile.look(done)
                record = dataclasses.replace(
                    record, step=done, data=position, seconds=time.perf_counter() - started,
                    num_samples=record.num_samples + row['num_samples'],
                    bad_samples=record.bad_samples + row['bad_samples'],
                    by_source=_add(record.by_source, [row[name] for name in BY_SOURCE]),
                )
                too_many = _too_many_bad(record, begin, config.data.max_bad_fraction, data.num_samples)
                if too_many and done == config.steps:  # nothing is left to be spared
                    log.warning('%s', too_many)
                    too_many = None
                trouble = failed or trouble or too_many
                # A restarted run that fails again at once does not push out good steps by copies of the last one.
                learned = streak.number < done - saved
                watchdog.beat(SAVING, done)
                if (saves or trouble) and (learned or not failed):
                    with clock.part('save'):
                        writer.save(record, state.trainable, (state.opt_state, state.health))
                    saved = done
            watchdog.beat(STEP, done + 1)

        # 7. The end: of the run, or of this part of it.
        profile.close(done)
        watchdog.beat(SAVING, done)
        with clock.part('save'):
            writer.close()
        goodput = progress.close(done == config.steps and not failed)
        if goodput:
            log.info('%s', goodput)
        if goodput and done == config.steps and not failed:
            write_summary(folder, record, row['loss'], (num_trainable, num_trainable + num_frozen), progress, goodput, data)
        _meet('the end')  # only the first process had all this to do
    if isinstance(trouble, (UserError, TryAgain)):
        told = f'Step {saved} is saved; the same command resumes there.' if saved else 'No step is saved.'
        raise type(trouble)(f'{trouble} {told}')
    if done == config.steps:
        return 'complete'
    log.info('stopped by %s: step %d of %d is saved; run the same command to resume.', trouble, done, config.steps)
    return 'interrupted' if trouble == CTRL_C else 'preempted'


def _meet(at: str) -> None:
    """Returns when all processes are here: the devices' collectives do not wait for ever (CPU: 30 s), and reading, compiling
    and uploading take unlike times.

    Raises:
        TryAgain: one did not come.
    """
    try:
        agree.collect(at, '', MEET_SECONDS)
        agree.announce(at, '', MEET_SECONDS)
    except TimeoutError as error:
        raise TryAgain(f'{error}; run the same command to resume from the last checkpoint.') from error


def _start(plan: state_lib.Plan, record: Record | None, config: Train, folder: Path, writer: Writer,
           manifest: str) -> tuple[Record, state_lib.State, Params]:
    """(record, state, frozen weights): of the step that the record tells of, or new."""
    if record:
        state, frozen = restore_run(plan, record, folder)
        log.info('resuming %s after step %d of %d', folder, record.step, config.steps)
        return record, state, frozen
    given = init_from.take(config.init_from, plan.params)
    _meet('the weights')
    state, frozen = state_lib.create(plan, config.seed, given)
    return Record(0, '', writer.save_frozen(frozen), seed=config.seed, manifest=manifest), state, frozen


def _add(before: list[list[int]], more: list[list[int]]) -> list[list[int]]:
    return (np.array(more) + (np.array(before) if before else 0)).tolist()


def _too_many_bad(record: Record, begin: Record, max_bad_fraction: float, num_samples: int) -> UserError | None:
    """The error that ends the run, if any; its first samples are never judged by themselves.

    What was bad before `begin`, where this process took the run up, may be repaired by now.
    """
    bad, met = record.bad_samples - begin.bad_samples, record.num_samples - begin.num_samples
    if bad <= max_bad_fraction * max(met, num_samples):
        return None
    return UserError(f'{bad} of {met} samples could not be read, more than Data.max_bad_fraction = {max_bad_fraction:g} '
                     'allows; repair them (quarantine.jsonl names each) or raise it.')
