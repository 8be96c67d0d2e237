"""What the rates of a run are measured against."""
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax

from vora_jax.batch import Batch
from vora_jax.params import flatten
from vora_jax.training.config import Train
from vora_jax.training.flops.chips import chip_of
from vora_jax.training.flops.statistics import statistics_of
from vora_jax.training.flops.step_work import flops_of_row
from vora_jax.training.state import Plan

Flops = Callable[[Mapping[str, float]], tuple[float, float]]


class Yardstick(NamedTuple):
    """What a step could at best be.

    num_slots: slots of its batch, padding included.
    num_chips: devices of the run.
    flops: (model, executed) FLOPs of one step, from its metrics; linear in them, so that means of metrics give the mean.
        None where nobody counted.
    peak_flops: of one chip, per second; None where it is not known: then there is no MFU.
    """

    num_slots: int
    num_chips: int = 1
    flops: Flops | None = None
    peak_flops: float | None = None


def yardstick(config: Train, plan: Plan, batch: Batch, mesh: jax.sharding.Mesh) -> Yardstick:
    """That of a run with batches like this (the global one). FLOPs are counted where the peak is known."""
    device = mesh.devices.flat[0]
    chip = chip_of(device.device_kind)
    if chip is None:
        return Yardstick(batch.tokens.size, mesh.size)
    like = statistics_of(batch, plan.model, config.accumulation, config.attention, device.platform)
    flops = flops_of_row(plan.model, flatten(plan.state.trainable), like)
    return Yardstick(batch.tokens.size, mesh.size, flops, chip.flops)
