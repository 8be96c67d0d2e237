"""The plan as JSON and as text."""
import math
from collections.abc import Mapping, Sequence
from typing import Any

from vora_jax.planning.advice import Change, changes, first_that_fits
from vora_jax.planning.facts import Facts
from vora_jax.planning.kept import remat_of
from vora_jax.planning.memory import PARTS
from vora_jax.planning.search import Tried, mesh_of
from vora_jax.planning.topology import Topology
from vora_jax.planning.traffic import least_traffic
from vora_jax.training.config import Train

GB = 1e9


def results(config: Train, topology: Topology, facts: Facts, itemsize: int, work: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that is known about a compiled step, as JSON has it. Bytes are those of one device.

    itemsize: bytes of an activation.    work: FLOPs and bounds, added as they are.
    """
    usable = topology.chip.usable_bytes
    least = least_traffic(facts.held, facts.mesh, itemsize, config.accumulation)
    wire = sum(one.wire_bytes for one in facts.collectives)
    fits = 0 < facts.peak_bytes <= usable
    found = {
        'topology': topology.name, 'slices': topology.slices, 'chip': topology.kind,
        'devices': math.prod(facts.mesh.values()), 'mesh': facts.mesh, 'gather': config.mesh.gather,
        'batch_rows': config.batch_rows, 'accumulation': config.accumulation,
        'remat': remat_of(config), 'attention': facts.attention, 'fits': fits, 'usable_bytes': usable,
        'peak_bytes': facts.peak_bytes,
        'memory': {**{f'{part}_bytes': size for part, size in facts.parts.items()},
                   'teacher_features_bytes': None if facts.stacks is None else facts.stack_bytes * facts.stacks,
                   'teacher_feature_stacks': facts.stacks, 'teacher_features_shape': facts.stack,
                   'working_bytes': facts.working_bytes},
        'largest_buffers': [one._asdict() for one in facts.largest],
        'collectives': [{**one._asdict(), 'wire_bytes': one.wire_bytes} for one in facts.collectives],
        'traffic': {'wire_bytes': wire, 'least_wire_bytes': least.wire, 'least_gather_bytes': least.gather,
                    'least_scatter_bytes': least.scatter, 'least_reduce_bytes': least.reduce,
                    'ratio': wire / least.wire if least.wire else None,
                    'emulated_gathers': sum(one.places for one in facts.collectives if one.emulates_gather),
                    'emulated_gather_bytes': sum(one.bytes for one in facts.collectives if one.emulates_gather)},
        'asynchronous_known': facts.asynchronous_known, 'involuntary_rematerialisations': facts.involuntary,
        'hlo_instructions': facts.hlo_instructions, 'compilation': facts.finished._asdict(), **work}
    if not fits:
        found['advice'] = [change._asdict() for change in changes(config, facts, topology)]
    return found


def lines(found: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, ...]]]]:
    """(title, rows of a table) of each part of the report; `found` as `results` gives it."""
    memory, traffic = found['memory'], found['traffic']
    peak, usable = found['peak_bytes'], found['usable_bytes']
    held = [(part, _size(memory[f'{part}_bytes'])) for part in PARTS if memory[f'{part}_bytes']]
    if memory['teacher_feature_stacks']:
        shape = ' x '.join(map(str, memory['teacher_features_shape']))
        name = f'teacher features, {memory["teacher_feature_stacks"]} of {shape}'
        held.append((name, _size(memory['teacher_features_bytes'])))
    elif memory['teacher_feature_stacks'] is None:
        held.append(('teacher features', 'unknown: none found in HBM; counted below'))
    held += [('activations, gradients and temporaries', _size(memory['working_bytes'])), ('at most at once', _size(peak)),
             (f'usable of a {found["chip"]}', _size(usable))]
    moved = [('', 'dtype', 'over', 'GB', 'runs', '')]
    for one in found['collectives']:
        if one['bytes'] >= 1e-3 * max(other['bytes'] for other in found['collectives']):
            marks = [name for key, name in (('emulates_gather', 'does a gather'), ('data_dependent', 'at most'),
                                            ('asynchronous', 'asynchronous')) if one[key]]
            moved.append((one['kind'], one['dtype'], ' x '.join(one['axes']), f'{one["bytes"] / GB:,.3f}',
                          f'{one["runs"]:,}', ', '.join(marks)))
    sums = [('over the wire', f'{traffic["wire_bytes"] / GB:,.2f} GB'),
            ('least for sharded weights and gradients', f'{traffic["least_wire_bytes"] / GB:,.2f} GB'),
            ('ratio', f'{traffic["ratio"]:.2f}' if traffic['ratio'] else '-'),
            ('gathers that are all-reduces', f'{traffic["emulated_gather_bytes"] / GB:,.2f} GB'),
            ('involuntary rematerialisations', str(found['involuntary_rematerialisations']))]
    buffers = [(f'{one["array"] or one["name"]}  {_end(one["source"])}', _size(one['bytes']))
               for one in found['largest_buffers'][:5]]
    return [('memory of a device', held), ('its largest buffers at the worst moment', buffers),
            ('collectives of a step, bytes of a device', moved), ('', sums)]


def _end(source: str) -> str:
    """The last names of a path in the program."""
    return '/'.join(source.split('/')[-3:])


def heading(found: Mapping[str, Any]) -> list[str]:
    """What was compiled, whether it fits, and what to do if not."""
    micro = found['batch_rows'] // found['accumulation'] / (found['mesh']['data'] * found['mesh']['fsdp'])
    slices = f'{found["slices"]} slices of ' if found['slices'] > 1 else ''
    told = [f'{slices}{found["topology"]}, {found["devices"]} devices: {mesh_of(found["mesh"])}, gathers by '
            f'{found["gather"]}; {found["batch_rows"]} rows, {micro:g} a device at a time; remat {found["remat"] or "-"}; '
            f'attention {found["attention"] or "-"}']
    peak, usable = found['peak_bytes'], found['usable_bytes']
    verdict = 'fits' if found['fits'] else 'does not fit'
    told.append(f'{verdict}: needs {_size(peak)} of {_size(usable)} on each device')
    if not found['fits']:
        every = [Change(**change) for change in found['advice']]
        best = first_that_fits(every, usable)
        if best:
            told.append(f'cheapest change: {" ".join(best.flags)} ({best.costs}; about {_size(best.peak_bytes)})')
        else:
            told.append('no single change is enough by estimate; several may be: see --search')
        told += [f'  or {" ".join(change.flags)} ({change.costs}; about {_size(change.peak_bytes)})'
                 for change in every if change != best and change.peak_bytes <= usable]
    spent = found['compilation']
    done = 'compiled' if spent['complete'] else 'compiled up to buffer assignment'
    told.append(f'{done}, not run: {spent["seconds"]:,.0f} s, {spent["cpu_seconds"]:,.0f} CPU s, '
                f'{spent["rss_bytes"] / GB:.1f} GB')
    return told


def ranking(tried: Sequence[Tried]) -> list[tuple[str, ...]]:
    """The rows of a search's table; compiled settings, best first."""
    rows = [('mesh', 'gather', 'remat', 'accumulation', 'needs', 'fits', 'bound s', 'serial s')]
    for one in tried:
        peak = _size(one.facts.peak_bytes) if one.facts else '-'
        candidate = one.candidate
        rows.append((mesh_of(candidate.sizes), candidate.gather, candidate.remat or '-', str(candidate.accumulation), peak,
                     'yes' if one.fits else 'no', f'{one.seconds:.3g}' if one.facts else one.why,
                     f'{one.serial_seconds:.3g}' if one.facts else ''))
    return rows


def _size(size: float) -> str:
    for unit, scale in (('GiB', 2**30), ('MiB', 2**20)):
        if size >= scale / 10:
            return f'{size / scale:,.2f} {unit}'
    return f'{size / 2**10:,.2f} KiB'
