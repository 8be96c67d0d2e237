"""The cheapest change when a step does not fit."""
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
    """What to change for less memory, the cheapest first."""
    found, mesh = [], facts.mesh
    held, work = sum(facts.parts.values()), facts.peak_bytes - sum(facts.parts.values())
    data, fsdp = mesh['data'], mesh['fsdp']
    micro, remat = config.batch_rows // config.accumulation, remat_of(config)
    if remat in REMATS:
        kept = {name: row_bytes(config, name) * micro / (data * fsdp * mesh['context'] * mesh['tensor']) for name in REMATS}
        for fuller in reversed(REMATS[:REMATS.index(remat)]):
            found.append(Change((f'--gin.LanguageModel.remat={fuller}',), 'computes more again in the backward pass',
                                facts.peak_bytes - kept[remat] + kept[fuller]))
    if data > 1 and data % topology.slices == 0 and data // topology.slices > 1:
        wider = mesh | {'data': topology.slices, 'fsdp': fsdp * (data // topology.slices)}
        parts = part_bytes(facts.held, wider)
        flags = (f'--gin.Mesh.data={wider["data"]}', f'--gin.Mesh.fsdp={wider["fsdp"]}')
        found.append(Change(flags, 'gathers weights over more devices', sum(parts.values()) + work))
    if micro % (2 * data * fsdp) == 0:
        flags = (f'--gin.Train.accumulation={2 * config.accumulation}',)
        found.append(Change(flags, 'gathers all weights twice as often', held + work / 2))
    more = larger(topology)
    rows = f'; it needs Train.batch_rows of at least {2 * data * fsdp}' if micro % (2 * data * fsdp) else ''
    found.append(Change(('--topology', more.name), f'twice the chips{rows}', facts.peak_bytes / 2))
    return found


def first_that_fits(found: list[Change], usable_bytes: float) -> Change | None:
    """The first change whose estimate fits; None where all are too small."""
    return next((one for one in found if one.peak_bytes <= usable_bytes), None)
