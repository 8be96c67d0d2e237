"""Compiled programs as text, read into instructions."""
import re
from collections.abc import Iterator
from typing import NamedTuple

BYTES = {'pred': 1, 's8': 1, 'u8': 1, 's16': 2, 'u16': 2, 's32': 4, 'u32': 4, 's64': 8, 'u64': 8, 'bf16': 2, 'f16': 2,
         'f32': 4, 'f64': 8, 'c64': 8, 'c128': 16, 's4': 0.5, 'u4': 0.5, 'f8e4m3fn': 1, 'f8e5m2': 1}
_SHAPE = re.compile(r'\b(' + '|'.join(BYTES) + r')\[([\d,]*)\]')
_COMPUTATION = re.compile(r'(ENTRY )?%?([\w.\-]+) .*\{\s*$')
_CALLED = re.compile(r'\b(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)')
_BRANCHES = re.compile(r'\bbranch_computations=\{([^}]*)\}')


class Shape(NamedTuple):
    """One array: its dtype as HLO calls it, and its dimensions."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def bytes(self) -> int:
        size = BYTES[self.dtype]
        for dim in self.dims:
            size *= dim
        return int(size)


class Instruction(NamedTuple):
    """`name = type opcode(operands), attributes` of a computation; shapes are those in the type."""

    name: str
    shapes: tuple[Shape, ...]
    is_tuple: bool
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    @property
    def called(self) -> tuple[str, ...]:
        """Computations it runs once: of fusions, calls and branches, not of loops and finished asynchronous calls."""
        if self.opcode in ('while', 'async-update', 'async-done'):
            return ()
        branches = [name.strip().lstrip('%') for text in _BRANCHES.findall(self.attributes) for name in text.split(',')]
        return (*_CALLED.findall(self.attributes), *branches)


class Program(NamedTuple):
    """computations: instructions by name of computation.    entry: where it begins."""

    computations: dict[str, list[Instruction]]
    entry: str


def read(text: str) -> Program:
    """The computations of an HLO module in text form.

    Raises:
        ValueError: the text has no ENTRY.
    """
    computations: dict[str, list[Instruction]] = {}
    entry, current = '', None
    for line in text.splitlines():
        if line[:1] not in (' ', '}', ''):
            match = _COMPUTATION.match(line)
            if match:
                current = computations.setdefault(match[2], [])
                entry = match[2] if match[1] else entry
        elif current is not None and ' = ' in line:
            current.append(_instruction(line))
    if not entry:
        raise ValueError('this is no HLO module: it has no ENTRY.')
    return Program(computations, entry)


def shapes(text: str) -> Iterator[Shape]:
    """Every array type in a piece of HLO text."""
    for dtype, dims in _SHAPE.findall(text):
        yield Shape(dtype, tuple(int(dim) for dim in dims.split(',') if dim))


def trip_count(program: Program, loop: Instruction) -> int | None:
    """How often a `while` runs; None where that is data.

    TPU programs state it nowhere: it is the constant that the condition compares with (counters start at 0).
    """
    known = re.search(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)', loop.attributes)
    if known:
        return int(known[1])
    condition = re.search(r'\bcondition=%?([\w.\-]+)', loop.attributes)
    constants = _constants(program, condition[1], 2) if condition else []
    return max(constants, default=None)


def body_of(loop: Instruction) -> str:
    """The computation that a `while` repeats."""
    return re.search(r'\bbody=%?([\w.\-]+)', loop.attributes)[1]


def _constants(program: Program, computation: str, depth: int) -> list[int]:
    found = []
    for one in program.computations.get(computation, []):
        if one.opcode == 'constant' and one.shapes and one.shapes[0].dims == () and one.operands[0].isdigit():
            found.append(int(one.operands[0]))
        if depth:
            for called in one.called:
                found += _constants(program, called, depth - 1)
    return found


def _instruction(line: str) -> Instruction:
    left, right = line.split(' = ', 1)
    is_tuple = right.startswith('(')
    end = _closing(right, 0) + 1 if is_tuple else right.find(' ')
    kind, rest = right[:end], right[end:].strip()
    begin = rest.find('(')
    close = _closing(rest, begin)
    inside = re.sub(r'/\*.*?\*/', '', rest[begin + 1:close])
    operands = tuple(part.strip().rpartition(' ')[2].lstrip('%') for part in inside.split(',') if part.strip())
    name = left.split()[-1].lstrip('%')
    return Instruction(name, tuple(shapes(kind)), is_tuple, rest[:begin], operands, rest[close + 1:], 'ROOT' in left.split())


def _closing(text: str, begin: int) -> int:
    """Where the bracket that opens at `begin` closes; the end of the text if nowhere."""
    depth = 0
    for match in re.compile(r'[()]').finditer(text, max(begin, 0)):
        depth += 1 if match[0] == '(' else -1
        if depth == 0:
            return match.start()
    return len(text)
