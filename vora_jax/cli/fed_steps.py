"""The steps of a training stage, fed by its data pipeline or with batches that wait on the devices."""
import collections
import contextlib
import itertools
import pathlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax

from vora_jax.batch import Batch
from vora_jax.bench.data_turns import Cost, Side, take_turns
from vora_jax.training import state
from vora_jax.training.config import Train, validate
from vora_jax.training.loop import IN_FLIGHT
from vora_jax.training.mesh import sharding
from vora_jax.training.mesh.row_shards import open_mesh, row_shard
from vora_jax.training.prefetch import Prefetch
from vora_jax.training.program import build
from vora_jax.training.run_data import open_data

# Batches that wait on the devices, and how many are read ahead while the program rests: these are used up before each
# measurement, or a pipeline that is too slow would not show.
CACHED, READ_AHEAD = 4, 8


class FedSteps(NamedTuple):
    """fed, cached: cost of a step. alone: of a batch of the pipeline that nothing else runs beside.

    slot_padding, patch_padding: what the plan of the first epoch leaves empty.    rows, samples: of that epoch.
    """

    fed: Cost
    cached: Cost
    alone: Cost
    slot_padding: float
    patch_padding: float
    rows: int
    samples: int


def measure_steps(config: Train, folder: pathlib.Path, steps: int, repeats: int,
                  on_call: Callable[[], None] = lambda: None) -> FedSteps:
    """Times steps of a stage from random weights; checkpoints are neither read nor written.

    Args:
        config: of the run; its `init_from` is not used.
        folder: for the index of the data.
        steps: in each measurement.
        repeats: rounds in which all take turns.
        on_call: is called after each of the measurements, 3 a round.

    Raises:
        UserError: as `training.loop.train` does.
    """
    validate(config)
    mesh = open_mesh(config)
    data = open_data(config, folder, row_shard(mesh))
    with contextlib.closing(data), sharding.use(mesh):
        with contextlib.closing(Prefetch(data, sharding.rows(mesh))) as batches:
            waiting = [next(batches).batch for _ in range(CACHED)]
            run = _stepper(config, waiting[0], mesh)
            fed, cached = (ready.batch for ready in batches), itertools.cycle(waiting)
            run(fed, 2)  # compiles

            sides = {'fed': Side(lambda: run(fed, steps), lambda: run(fed, READ_AHEAD)),
                     'cached': Side(lambda: run(cached, steps), lambda: run(cached, 1))}
            costs = take_turns(sides, repeats, on_call)

        def take(count: int) -> int:
            return sum(1 for _ in itertools.islice(data, count))
        alone = take_turns({'alone': Side(lambda: take(steps), lambda: take(READ_AHEAD))}, repeats, on_call)['alone']
        return FedSteps(costs['fed'], costs['cached'], alone, *data.padding, data.num_rows, data.epoch_samples)


def _stepper(config: Train, batch: Batch, mesh: jax.sharding.Mesh) -> Callable[[Iterator[Batch], int], int]:
    """run(batches, count) -> count: so many steps on the next batches, waited for as `training.loop` does."""
    program = build(config, batch, mesh)
    held, frozen = state.create(program.plan, config.seed, {})

    def run(batches: Iterator[Batch], count: int) -> int:
        nonlocal held
        in_flight = collections.deque()
        for batch in itertools.islice(batches, count):
            held, metrics = program.step(held, frozen, batch)
            in_flight.append(metrics['loss'])
            if len(in_flight) > IN_FLIGHT:
                in_flight.popleft().block_until_ready()
        jax.block_until_ready(held)
        return count
    return run
