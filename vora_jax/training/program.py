"""The compiled step of a configured run."""
from typing import Any, NamedTuple

import jax

from vora_jax.training import sharding
from vora_jax.training import state as state_lib
from vora_jax.training.config import Train
from vora_jax.training.optimizer import schedule
from vora_jax.training.step import Step, compile_step, make_step


class Program(NamedTuple):
    """plan: shapes and shardings of all that the run holds.    step: jitted; donates the state."""

    plan: state_lib.Plan
    step: Step


def build(config: Train, batch: Any, mesh: jax.sharding.Mesh) -> Program:
    """The program of a run for batches shaped like `batch` (arrays or shapes of the global batch). Nothing is computed, so
    that the mesh may be of devices that are not there. Call it within `sharding.use(mesh)`.

    Raises:
        UserError: rows or slots that do not divide over the mesh, or as `state.plan` has it.
    """
    sharding.check_rows(config, mesh)
    sharding.check_slots(config, mesh)
    stage, rows = config.method.stage(config.stage), config.batch_rows // config.accumulation
    micro = jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), batch)
    plan = state_lib.plan(stage, config.optimizer, micro, mesh, config.frozen_dtype, config.attention)
    step = make_step(plan.model, plan.optimizer, schedule(config.optimizer), stage.distill_weight, config.accumulation,
                     config.seed)
    return Program(plan, compile_step(step, plan.state_shardings, plan.frozen_shardings, mesh))
