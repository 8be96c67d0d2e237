"""The training loop, top to bottom."""
import collections
import dataclasses
import json
import logging
import pathlib
import time
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from vora_jax.data import loader
from vora_jax.params import count
from vora_jax.training import checkpoint, init_from, sharding
from vora_jax.training import state as state_lib
from vora_jax.training.checkpoint import Record
from vora_jax.training.checkpoint_writer import Writer
from vora_jax.training.config import Train, differences, first_difference, validate
from vora_jax.training.interrupt import stop_request
from vora_jax.training.metrics import Log
from vora_jax.training.optimizer import schedule
from vora_jax.training.prefetch import Prefetch
from vora_jax.training.step import compile_step, make_step
from vora_jax.types import Params, UserError

log = logging.getLogger(__name__)

IN_FLIGHT = 2  # steps the host may run ahead of the devices: hides its own work, yet Ctrl-C acts at once


def train(config: Train, config_text: str, workdir: str, parse: Callable[[str], Train]) -> bool:
    """Runs one stage, or resumes it where the last checkpoint left it.

    Args:
        config: the run.
        config_text: its resolved text, saved with every checkpoint.
        workdir: folder of the run.
        parse: gives the `Train` of a resolved text, to compare with the run that the workdir holds.

    Returns:
        True when the run is complete, False when it was asked to stop and can be resumed.

    Raises:
        UserError: a value that makes no sense, a workdir of another run, too many bad samples.
    """
    validate(config)
    folder, stage = pathlib.Path(workdir), config.method.stage(config.stage)
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_rows(config, mesh)

    # 1. What does the workdir hold?
    record, before = _find_last(folder), None
    if record:
        before = _check_same_run(record, config, folder, parse)
        if record.step >= config.steps:
            log.info('%s is complete: %d of %d steps are done.', folder, record.step, config.steps)
            return True
    if jax.process_index() == 0:
        checkpoint.write_config(folder, config_text)
        checkpoint.copy_tokenizer(config.data.tokenizer, folder)
    writer = Writer(folder, config.checkpoint.keep_last)

    # 2. Data, read ahead in a thread.
    shard = jax.process_index(), jax.process_count()
    rule = config.method.vision_tokens
    data = loader.batches(config.data, rule, config.batch_rows, config.seed, shard, config.workers)
    if record:
        _check_same_data(record, data.manifest, before, config)
        data.set_state(record.data)

    with sharding.use(mesh), Prefetch(data, sharding.rows(mesh)) as batches, stop_request() as stop:
        # 3. Model, optimizer and weights: restored, or new.
        ready = next(batches)
        rows = config.batch_rows // config.accumulation
        micro = jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), ready.batch)
        plan = state_lib.plan(stage, config.optimizer, micro, mesh, config.frozen_dtype)
        if record:
            state, frozen = _restore(plan, record, folder)
            log.info('resuming %s after step %d of %d', folder, record.step, config.steps)
        else:
            state, frozen = state_lib.create(plan, config.seed, init_from.take(config.init_from, plan.params))
            record = Record(0, '', writer.save_frozen(frozen), seed=config.seed, manifest=data.manifest)
        record = dataclasses.replace(record, config_text=config_text)
        sizes = {'trainable_params': count(state.trainable), 'total_params': count(state.trainable) + count(frozen)}
        log.info('training %s of %s parameters', *(f'{size:,}' for size in sizes.values()))

        # 4. Steps. Nothing here waits for the devices, except to keep the host from running far ahead of them.
        rates = schedule(config.optimizer)
        one_step = compile_step(
            make_step(plan.model, plan.optimizer, rates, stage.distill_weight, config.accumulation, config.seed),
            plan.state_shardings, plan.frozen_shardings, mesh,
        )
        progress = Log(folder, record.step, config.steps)
        done, pending, in_flight, trouble = record.step, [], collections.deque(), None
        while not trouble:
            state, metrics = one_step(state, frozen, ready.batch)
            done, position = done + 1, ready.position
            pending.append(metrics)
            in_flight.append(metrics['loss'])
            if progress.is_new:
                jax.block_until_ready(metrics)
                progress.start_clock()
            if len(in_flight) > IN_FLIGHT:
                in_flight.popleft().block_until_ready()
            writer.check()

            # 5. The next batch. Trouble of any kind ends the loop after this step, with a checkpoint.
            trouble = stop.at(done)
            if done < config.steps and not trouble:
                try:
                    ready = next(batches)
                except UserError as error:
                    trouble = error
            ends = done == config.steps or trouble

            # 6. Metrics, and now and then a checkpoint: at the position of the batches trained on, not of those read.
            saves = ends or done % config.checkpoint.every_steps == 0
            if saves or done % config.log_every == 0:
                row, pending = progress.write(done, jax.device_get(pending)), []
                record = dataclasses.replace(
                    record, step=done, data=position, seconds=record.seconds + progress.take_seconds(),
                    num_samples=record.num_samples + row['num_samples'],
                    bad_samples=record.bad_samples + row['bad_samples'],
                )
                trouble = trouble or _too_many_bad(record, config.data.max_bad_fraction, data.num_samples)
                saves = saves or trouble
            if saves:
                writer.save(record, state.trainable, state.opt_state)
            if ends:
                break

        # 7. The end.
        writer.wait()
        progress.close()
    data.close()
