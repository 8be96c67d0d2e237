"""The cheapest change when a step does not fit."""
import math
from collections.abc import Mapping
from typing import NamedTuple

from vora_jax.planning.facts import Facts
from vora_jax.planning.kept import REMATS, remat_of, row_bytes
from vora_jax.planning.memory import part_bytes
from vora_jax.planning.topology import Topology, larger
from vora_jax.training.config import Train


class Change(NamedTuple):
    """flags: to paste.    costs: what it costs.    peak_bytes: estimate of what a device then needs."""

    flags: tuple[str, ...]
    costs: str
    peak_bytes: float


def changes(config: Train, facts: Facts, topology: Topology) -> list[Change]:
    """What to change for less memory, the cheapest first; flags name the whole mesh wherever another one is needed."""
    found, mesh = [], facts.mesh
    held = sum(facts.parts.values())
    work = facts.peak_bytes - held
    data, fsdp = mesh['data'], mesh['fsdp']
    micro, remat = config.batch_rows // config.accumulation, remat_of(config)
    if remat in REMATS:
        rows = micro / math.prod(mesh.values())
        kept = {name: row_bytes(config, name) * rows for name in REMATS}
        gradients = facts.parts.get('trainable', 0) * (2 if config.accumulation > 1 else 1)
        besides = held + gradients + row_bytes(config, REMATS[-1], one_layer=True) * rows
        for fuller in reversed(REMATS[:REMATS.index(remat)]):
            found.append(Change((f'--gin.LanguageModel.remat={fuller}',), 'computes more again in the backward pass',
                                max(facts.peak_bytes - kept[remat], besides) + kept[fuller]))
    if data % topology.slices == 0 and data > topology.slices:
        wider = mesh | {'data': topology.slices, 'fsdp': fsdp * (data // topology.slices)}
        now = sum(part_bytes(facts.held, wider).values())
        if now < held:  # two hops cut over data already
            found.append(Change(_mesh_flags(wider), 'gathers weights over more devices', now + work))
    if micro % (2 * data * fsdp) == 0:
        flags = (f'--gin.Train.accumulation={2 * config.accumulation}',)
        sums = facts.parts.get('trainable', 0) if config.accumulation == 1 else 0  # of gradients, besides a micro-batch's
        found.append(Change(flags, 'gathers all weights twice as often', held + sums + work / 2))
    more = larger(topology)
    if more is not None:
        wider = mesh | {'fsdp': 2 * fsdp}
        halved = micro % (2 * data * fsdp) == 0
        flags = ('--topology', more.name, *_mesh_flags(wider))
        rows = ''
        if not halved and config.accumulation % 2 == 0:
            flags += (f'--gin.Train.accumulation={config.accumulation // 2}',)
        elif not halved:
            flags += (f'--gin.Train.batch_rows={2 * config.batch_rows}',)
            rows = ' and rows of a step'
        found.append(Change(flags, f'twice the chips{rows}', sum(part_bytes(facts.held, wider).values())
                            + (work / 2 if halved else work)))
    return found


def _mesh_flags(mesh: Mapping[str, int]) -> tuple[str, ...]:
    return tuple(f'--gin.Mesh.{axis}={size}' for axis, size in mesh.items() if size > 1 or axis in ('data', 'fsdp'))


def first_that_fits(found: list[Change], usable_bytes: float) -> Change | None:
    """The first change whose estimate fits; None where all are too small."""
    return next((one for one in found if one.peak_bytes <= usable_bytes), None)
