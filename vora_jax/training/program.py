"""The compiled step of a configured run."""
import functools
from typing import Any, NamedTuple

import jax

from vora_jax.training import state as state_lib
from vora_jax.training.config import HowToGather, Train
from vora_jax.training.mesh.gather import in_shards
from vora_jax.training.mesh.head import make_cross_entropy
from vora_jax.training.optimizer import schedule
from vora_jax.training.step import Gradient, Step, compile_step, make_step


class Program(NamedTuple):
    """plan: shapes and shardings of all that the run holds.    step: jitted; donates the state."""

    plan: state_lib.Plan
    step: Step


def build(config: Train, batch: Any, mesh: jax.sharding.Mesh) -> Program:
    """The program of a run for batches shaped like `batch` (arrays or shapes of the global batch). Nothing is computed, so
    that the mesh (of `row_shards.open_mesh`) may be of devices that are not there. Call it within `sharding.use(mesh)`.

    Raises:
        UserError: as `state.plan` has it.
    """
    stage, rows = config.method.stage(config.stage), config.batch_rows // config.accumulation
    micro = jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), batch)
    how = config.mesh.gather
    plan = state_lib.plan(stage, config.optimizer, micro, mesh, config.frozen_dtype, config.attention, how)
    step = make_step(plan.model, plan.optimizer, schedule(config.optimizer), stage.distill_weight, config.accumulation,
                     config.seed, config.guard.max_sigmas, functools.partial(placed, plan=plan, mesh=mesh, how=how),
                     make_cross_entropy(mesh, how))
    return Program(plan, compile_step(step, plan.state_shardings, plan.frozen_shardings, mesh))


def placed(gradient: Gradient, plan: state_lib.Plan, mesh: jax.sharding.Mesh, how: HowToGather) -> Gradient:
    """The gradient of a micro-batch as it is computed on a mesh: each device ends with those of its shards."""
    trainable = plan.state_shardings.trainable
    if how == 'two_hop':
        return in_shards(gradient, trainable, plan.frozen_shardings, mesh)

    def compute(*inputs):
        sums, gradients = gradient(*inputs)
        return sums, jax.lax.with_sharding_constraint(gradients, trainable)

    return compute
