"""FLOPs and bounds of a planned step."""
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vora_jax.ops.cross_entropy import CHUNK
from vora_jax.planning.abstract_batch import full_row
from vora_jax.planning.collectives import wire_bytes
from vora_jax.planning.facts import Facts
from vora_jax.planning.kept import itemsize, remat_of, row_bytes
from vora_jax.planning.memory import Held
from vora_jax.planning.roofline import Demand, bound, rough_hbm_bytes
from vora_jax.planning.search import Candidate
from vora_jax.planning.topology import Topology
from vora_jax.planning.traffic import least_traffic, uses
from vora_jax.training.config import Train
from vora_jax.training.flops.statistics import BatchStatistics, statistics_of
from vora_jax.training.flops.step_work import Work, executed_flops, model_flops, step_work

PF = 1e15


def max_loss_chunks(config: Train) -> int:
    """How often the loop over a row's targets runs at most: where all its text has targets."""
    return math.ceil(float(full_row(config).loss_mask.sum()) / CHUNK)


def statistics(config: Train, platform: str) -> BatchStatistics:
    """Of a step with full rows."""
    model = config.method.stage(config.stage).model
    of_row = statistics_of(full_row(config), model, 1, config.attention, platform)
    return dataclasses.replace(of_row.times(config.batch_rows), micro_batches=config.accumulation)


def work(config: Train, topology: Topology, facts: Facts) -> dict[str, Any]:
    """FLOPs by part, and bounds of a step's time, as JSON has them."""
    counts = statistics(config, _platform(topology))
    parts = _step_work(config, facts.held, counts, None)
    model, total = model_flops(parts), executed_flops(parts)
    within, between = wire_bytes(facts.collectives)
    tokens = counts.vision.needed + counts.text.needed
    demand = Demand(model, total, tokens, _hbm_bytes(config, facts.held, facts.mesh, remat_of(config)), within, between)
    found = bound(topology.chip, topology.shape, math.prod(facts.mesh.values()), demand)
    return {'flops': {'parts': [{**one._asdict(), 'model': one.model, 'executed': one.executed} for one in parts],
                      'model': model, 'executed': total, 'model_per_token': model / tokens},
            'bound': {**found._asdict(), 'tokens': tokens}}


def lines(found: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, ...]]]]:
    """(title, rows of a table) of `work`."""
    flops, least = found['flops'], found['bound']
    rows = [('', 'forward', 'backward', 'again', 'padding')]
    rows += [(one['part'], *(f'{one[name] / PF:,.3f}' for name in ('forward', 'backward', 'recompute', 'overhead')))
             for one in flops['parts']]
    rows += [(f'all: {name}', f'{flops[name] / PF:,.3f}', '', '', '') for name in ('model', 'executed')]
    times = [(f'{name}: busy{" (estimate)" if name == "memory" else ""}', f'{seconds:.3f} s')
             for name, seconds in least['seconds'].items() if seconds]
    times += [(f'a step, if all overlaps: {least["binding"]}', f'{least["step_seconds"]:.3f} s'),
              ('a step, if nothing does', f'{least["serial_seconds"]:.3f} s'),
              ('tokens/s of a device', f'{least["tokens_per_second_per_device"]:,.0f}'),
              ('MFU if computing were all', f'{least["ceiling"]:.3f}'), ('MFU at the bound', f'{least["mfu"]:.3f}')]
    return [('PFLOP of a step with full rows', rows), ('at best (not measured)', times)]


def executed(config: Train, candidate: Candidate, topology: Topology, arrays: Sequence[Held]) -> float:
    """FLOPs that a step computes with a candidate's settings."""
    changed = dataclasses.replace(config, accumulation=candidate.accumulation)
    counts = statistics(changed, _platform(topology))
    return executed_flops(_step_work(changed, arrays, counts, candidate.remat or None))


def bound_seconds(config: Train, candidate: Candidate, topology: Topology, arrays: Sequence[Held], flops: float,
                  facts: Facts | None) -> tuple[float, float]:
    """The least time of a step with a candidate's settings that computes `flops`, and its time where nothing overlaps;
    without facts with the least traffic there can be."""
    sizes = candidate.sizes
    changed = dataclasses.replace(config, accumulation=candidate.accumulation)
    within, between = least_traffic(arrays, sizes, itemsize(config), candidate.accumulation).groups, 0.0
    if facts is not None:
        within, between = wire_bytes(facts.collectives)
    demand = Demand(flops, flops, 1.0, _hbm_bytes(changed, arrays, sizes, candidate.remat), within, between)
    found = bound(topology.chip, topology.shape, math.prod(sizes.values()), demand)
    return found.step_seconds, found.serial_seconds


def _hbm_bytes(config: Train, arrays: Iterable[Held], mesh: Mapping[str, int], remat: str) -> float:
    """Rough: gathered weights in each pass, the state, what is kept for the backward pass."""
    arrays = tuple(arrays)
    trained = frozenset(array.path for array in arrays if array.part == 'trainable')
    tied = not any(array.path.startswith('decoder/lm_head') for array in arrays)
    again = remat not in ('', 'none')
    weights = sum(array.bytes / array.itemsize * itemsize(config) * _passes(array, trained, tied, again) for array in arrays
                  if array.part != 'optimizer') * config.accumulation
    state = sum(array.shard_bytes(mesh) for array in arrays if array.part in ('trainable', 'optimizer'))
    kept = row_bytes(config, remat) * config.batch_rows / math.prod(mesh.values())
    return rough_hbm_bytes(weights / mesh['tensor'], 1, state, kept)


def _passes(array: Held, trained: frozenset[str], tied: bool, again: bool) -> int:
    """Over a weight in a micro-batch: a decoder layer's with a backward pass takes one more where remat computes again."""
    found = uses(array, trained, tied)
    return found + (again and found == 2 and array.path.startswith('decoder/layers/'))


def num_devices(topology: Topology) -> int:
    """Devices that the compiler shows: two a chip of v4 and tpu7x."""
    return math.prod(topology.shape) * topology.slices * (2 if topology.kind in ('v4', 'tpu7x') else 1)


def _step_work(config: Train, arrays: Iterable[Held], counts: BatchStatistics, remat: str | None) -> tuple[Work, ...]:
    trained = [array.path for array in arrays if array.part == 'trainable']
    return step_work(config.method.stage(config.stage).model, trained, counts, remat or remat_of(config) or None)


def _platform(topology: Topology) -> str:
    return 'gpu' if topology.platform == 'cuda' else topology.platform
