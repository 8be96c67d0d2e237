"""What devices send each other in a step.

Read from the compiled program, with loops counted as often as they run. Traps: TPU loops do not state how often they run;
an asynchronous collective appears in several fusions, of which one starts it; a reduce-scatter is a fusion named
`all-reduce-scatter` around an all-reduce; an all-reduce of zeros with the own part written into them is a gather in
disguise, which sends twice as much.
"""
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from vora_jax.planning.hlo import Instruction, Program, body_of, read, trip_count

KINDS = ('all-gather', 'reduce-scatter', 'all-reduce', 'all-to-all', 'ragged-all-to-all', 'collective-permute')
SEND, SLICES = 'send', 'slices'  # what crosses the network between slices, and its axis


class Collective(NamedTuple):
    """Collectives that are alike.

    kind: one of KINDS, or SEND.    dtype: as HLO calls it.    axes: mesh axes they go over, SLICES for a send.
    group: devices that take part in one.
    bytes: of all runs of a step, on one device: what a gather gives, what a scatter takes, the array otherwise.
    places: in the program.    runs: of a step.
    emulates_gather: an all-reduce that does a gather's work.
    asynchronous: computation goes on meanwhile, as far as the text tells.
    data_dependent: in a loop whose length is data; `runs` is an upper bound.
    """

    kind: str
    dtype: str
    axes: tuple[str, ...]
    group: int
    bytes: int
    places: int
    runs: int
    emulates_gather: bool = False
    asynchronous: bool = False
    data_dependent: bool = False

    @property
    def wire_bytes(self) -> float:
        """Sent by one device in a ring: (g - 1) / g of the array, twice for an all-reduce; all of it for a permute."""
        if self.kind in ('collective-permute', SEND):
            return float(self.bytes)
        return self.bytes * (2 if self.kind == 'all-reduce' else 1) * (self.group - 1) / self.group


def collectives(text: str, mesh: Mapping[str, int], data_loops: int = 1) -> tuple[Collective, ...]:
    """The collectives of an HLO text, those with most bytes first.

    Args:
        text: the compiled module of one device.
        mesh: sizes of the mesh axes, in order: device i of the program is the i-th of the mesh.
        data_loops: how often a loop runs whose length is data: the most it can.
    """
    program = read(text)
    found: dict[tuple, list[int]] = {}

    def count(key: tuple, size: int, times: int) -> None:
        total = found.setdefault(key, [0, 0, 0])
        for i, more in enumerate((size * times, 1, times)):
            total[i] += more

    def walk(name: str, times: int, data: bool) -> None:
        instructions = program.computations.get(name, [])
        marks = ' '.join(one.attributes for one in instructions if one.opcode == 'custom-call')
        starts = 'AsyncCollectiveStart' in marks
        goes_on = not starts and ('AsyncCollectiveDone' in marks or 'async_collective_fusion' in name)
        for one in instructions:
            kind = one.opcode.removesuffix('-start')
            if kind in KINDS and not goes_on:
                group = first_group(one.attributes, mesh)
                for gather, size, dtype in _sizes(program, instructions, one, kind, len(group)):
                    scatters = kind == 'all-reduce' and 'all-reduce-scatter' in name
                    key = ('reduce-scatter' if scatters else kind, dtype, _axes(group, mesh), len(group),
                           gather and not scatters, starts or kind != one.opcode, data)
                    if len(group) > 1 and size:
                        count(key, size, times)
            elif one.opcode == SEND and '_xla_megascale_target' in one.attributes:
                count((SEND, one.shapes[0].dtype, (SLICES,), 2, False, True, data), one.shapes[0].bytes, times)
            elif one.opcode == 'while':
                runs = trip_count(program, one)
                walk(body_of(one), times * (data_loops if runs is None else runs), data or runs is None)
            else:
                for called in one.called:
                    walk(called, times, data)

    walk(program.entry, 1, False)
    every = (Collective(kind, dtype, axes, group, size, places, runs, gather, starts, data)
             for (kind, dtype, axes, group, gather, starts, data), (size, places, runs) in found.items())
    return tuple(sorted(every, key=lambda one: -one.bytes))


def wire_bytes(found: Iterable[Collective]) -> tuple[dict[int, float], float]:
    """Bytes that one device sends in a step: within its slice, by the number of devices that share the array; to others."""
    within: dict[int, float] = {}
    between = 0.0
    for one in found:
        if one.kind == SEND:
            between += one.wire_bytes
        else:
            within[one.group] = within.get(one.group, 0.0) + one.wire_bytes
    return within, between


def first_group(attributes: str, mesh: Mapping[str, int]) -> tuple[int, ...]:
    """Devices of the first group of a collective, by its attributes; `mesh` as in `collectives`."""
    devices = np.arange(int(np.prod(list(mesh.values()))))
    if pairs := re.search(r'source_target_pairs=\{\{(\d+),(\d+)\}', attributes):
        every = re.findall(r'\{(\d+),(\d+)\}', attributes[pairs.start():attributes.find('}}', pairs.start()) + 1])
        return next(((int(a), int(b)) for a, b in every if a != b), (0,))
    if named := re.search(r'replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^ {]*)\))? \{([^}]*)\}', attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        if named[2]:
            devices = _iota(named[2])
        split, chosen = [], []
        parts = {name: (int(before or 1), int(size or sizes[name]))
                 for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", named[3])}
        for name, size in sizes.items():  # an axis may take part with a piece of its own
            before, part = parts.get(name, (1, 1))
            chosen += [len(split) + 1] if name in parts else []
            split += [before, part, size // (before * part)]
        devices = devices.reshape(split)
        index = tuple(slice(None) if i in chosen else 0 for i in range(len(split)))
        return tuple(devices[index].ravel().tolist())
    if listed := re.search(r'replica_groups=\{\{([\d,]+)\}', attributes):
        return tuple(int(device) for device in listed[1].split(','))
    if iota := re.search(r'replica_groups=(\[[\d,]+\])<=(\[[\d,]+\](?:T\([\d,]+\))?)', attributes):
        return tuple(_iota(iota[2]).reshape(_numbers(iota[1]))[0].tolist())
    return tuple(devices.tolist())


def _sizes(program: Program, around: list[Instruction], one: Instruction, kind: str, group: int):
    """(emulates a gather, bytes, dtype) of an instruction, once for each way its operands are."""
    arrays = [shape for shape in one.shapes if shape.dims or not one.opcode.endswith('-start')]
    if one.opcode.endswith('-start') and kind != 'all-reduce' and len(arrays) > 1:  # first the inputs, then the results
        arrays = arrays[len(one.operands):] or arrays[len(arrays) // 2:]
    scale = group if kind == 'reduce-scatter' else 1
    if kind != 'all-reduce' or len(one.operands) != len(arrays):
        return [(False, scale * sum(array.bytes for array in arrays), arrays[0].dtype)] if arrays else []
    by_name = {other.name: other for other in around}
    sizes: dict[tuple[bool, str], int] = {}
    for operand, array in zip(one.operands, arrays):
        key = _is_padded_part(program, by_name, by_name.get(operand)), array.dtype
        sizes[key] = sizes.get(key, 0) + array.bytes
    return [(gather, size, dtype) for (gather, dtype), size in sizes.items()]


def _is_padded_part(program: Program, by_name: Mapping[str, Instruction], one: Instruction | None) -> bool:
    """True for an array of one value with a part written into it."""
    for _ in range(4):
        if one is None:
            return False
        if one.opcode in ('bitcast', 'copy', 'reshape', 'copy-done'):
            one = by_name.get(one.operands[0])
        elif one.opcode == 'fusion':
            by_name = {inner.name: inner for inner in program.computations.get(one.called[0], [])}
            one = next((inner for inner in by_name.values() if inner.is_root), None)
        else:
            break
    if one is None or one.opcode != 'dynamic-update-slice':
        return False
    target = by_name.get(one.operands[0])
    return target is None or target.opcode not in ('parameter', 'get-tuple-element')


def _iota(text: str) -> np.ndarray:
    """`[4,16]T(1,0)`: 0 to 63 as 4 x 16, transposed; flat."""
    dims, _, order = text.partition('T')
    numbers = np.arange(int(np.prod(_numbers(dims)))).reshape(_numbers(dims))
    return (numbers.transpose(_numbers(order)) if order else numbers).ravel()


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r'\d+', text)]


def _axes(group: tuple[int, ...], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which a group's devices differ."""
    places = np.unravel_index(np.array(group), tuple(mesh.values()))
    return tuple(axis for axis, place in zip(mesh, places) if len(set(place.tolist())) > 1)
