"""What each chip holds, and for what."""
import math
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax

from vora_jax.params import flatten
from vora_jax.training.state import Plan

PARTS = ('trainable', 'optimizer', 'frozen', 'teacher')
TEACHER = 'teacher/'  # where a distilled model's parameters have their teacher
TEACHER_BLOCKS = 'teacher/blocks'  # in the path of what its blocks compute
FLOATS = {2: '(?:bf16|f16)', 4: 'f32'}  # as HLO calls floats of so many bytes


class Held(NamedTuple):
    """An array that lives through the step.

    part: one of PARTS.    path: of the parameter.    shape, itemsize: of the whole array; bytes of an element.
    axes: mesh axes that each dimension is cut over.
    """

    part: str
    path: str
    shape: tuple[int, ...]
    itemsize: int
    axes: tuple[tuple[str, ...], ...]

    @property
    def bytes(self) -> int:
        """Of the whole array."""
        return math.prod(self.shape) * self.itemsize

    @property
    def cut_over(self) -> tuple[str, ...]:
        return tuple(axis for axes in self.axes for axis in axes)

    def shard_bytes(self, mesh: Mapping[str, int]) -> int:
        """On one device of a mesh with these axis sizes; a dimension that does not divide counts rounded up."""
        parts = [math.prod(mesh[axis] for axis in axes) for axes in self.axes] + [1] * len(self.shape)
        return math.prod(-(-size // part) for size, part in zip(self.shape, parts)) * self.itemsize


def held(plan: Plan) -> tuple[Held, ...]:
    """Every array of a plan's state and frozen parameters."""
    found = []

    def add(part: str, path: str, leaf) -> None:
        axes = tuple((axis,) if isinstance(axis, str) else tuple(axis or ()) for axis in leaf.sharding.spec)
        found.append(Held(part, path, tuple(leaf.shape), leaf.dtype.itemsize, axes))

    for path, leaf in flatten(plan.state.trainable).items():
        add('trainable', path, leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(plan.state.opt_state):
        add('optimizer', jax.tree_util.keystr(path), leaf)
    for path, leaf in flatten(plan.frozen).items():
        add('teacher' if path.startswith(TEACHER) else 'frozen', path, leaf)
    return tuple(found)


def part_bytes(arrays: Iterable[Held], mesh: Mapping[str, int]) -> dict[str, int]:
    """Bytes on one device by part, in the order of PARTS; parts that hold nothing are 0."""
    totals = dict.fromkeys(PARTS, 0)
    for array in arrays:
        totals[array.part] += array.shard_bytes(mesh)
    return totals


def stack_dims(plan: Plan, mesh: Mapping[str, int]) -> tuple[int, ...] | None:
    """[L, B, Q, C] of the stack of teacher features on one device; None for a model without a teacher."""
    distillation = getattr(plan.model, 'distillation', None)
    if distillation is None:
        return None
    rows, tokens = plan.batch.vision_slot.shape
    return len(distillation.layers), rows // (mesh['data'] * mesh['fsdp']), tokens, distillation.teacher.width


def peak_bytes(report: str) -> int | None:
    """HBM that a program needs, from XLA's memory usage report; None where the report has none."""
    match = re.search(r'Memory Space: default.*?\nTotal bytes: (\d+)', report, re.DOTALL)
    return int(match[1]) if match else None


def exceeded(message: str) -> tuple[float, float] | None:
    """(bytes needed, bytes there are) from the compiler's complaint; None where it has none."""
    match = (re.search(r'Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm', message)
             or re.search(r'temporaries \(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)', message))
    if not match:
        return None
    units = {unit: 2**(10 * power) for power, unit in enumerate('KMGT', 1)}
    return float(match[1]) * units[match[2]], float(match[3]) * units[match[4]]


def live_at_once(assignment: str, live_ranges: str, dims: tuple[int, ...], itemsize: int, program: str) -> int | None:
    """Most buffers in HBM with teacher features, arrays of these dimensions, that are in use at the same time.

    Only what the teacher's blocks make, and copies of it, is counted: other arrays may have the same dimensions.

    Args:
        assignment: XLA's buffer assignment: which value lies where.
        live_ranges: XLA's live ranges: from when to when it is needed.
        dims: whole dimensions, in any layout.
        itemsize: bytes of an element, a float.
        program: the compiled program.

    Returns:
        None where the texts show no such buffer.
    """
    kind = rf'{FLOATS[itemsize]}\[{",".join(map(str, dims))}\]'
    ours = _made_by_teacher(program, kind)
    place = {}
    for line in re.findall(rf'value: <\d+ .*?\): {kind}{{[^}}]*}}$', assignment, re.MULTILINE):
        name, offset, space = re.search(r'<\d+ (\S+) .*offset=(\d+)\).*?\{[^}S]*(S\(\d+\))?', line).groups()
        allocation = assignment.rfind('\nallocation ', 0, assignment.find(line))
        if not space and name.partition('{')[0] in ours:
            place[name] = allocation, int(offset)
    events: list[tuple[int, int, tuple[int, int]]] = []
    for name, index, begin, end in re.findall(r'^    (\S+?)\{([\d,]*)\}:(\d+)-(\d+)$', live_ranges, re.MULTILINE):
        key = next((key for key in (f'{name}{{{index}}}', name) if key in place), None)
        if key:
            events += [(int(begin), 1, place[key]), (int(end) + 1, -1, place[key])]
    users: dict[tuple[int, int], int] = {}
    most = 0
    for _, change, where in sorted(events, key=lambda event: event[:2]):
        users[where] = users.get(where, 0) + change
        most = max(most, sum(count > 0 for count in users.values()))
    return most or None


def _made_by_teacher(program: str, kind: str) -> set[str]:
    """Names of the instructions with such an array in their type that the teacher's blocks make, or that copy those."""
    found: set[str] = set()
    for name, rest in re.findall(rf'^\s+(?:ROOT )?%?(\S+) = (.*{kind}.*)$', program, re.MULTILINE):
        path = re.search(r'op_name="([^"]*)"', rest)
        source = re.search(r' (?:copy|copy-start|copy-done|bitcast|get-tuple-element)\((?:[^%]*%)?([\w.\-]+)', rest)
        if path and TEACHER_BLOCKS in path[1] or source and source[1] in found:
            found.add(name)
    return found
