"""What a compiled step needs and sends."""
import math
import pathlib
import re
from typing import NamedTuple

from vora_jax.planning import child, compile_step
from vora_jax.planning.collectives import Collective, collectives
from vora_jax.planning.hlo import read
from vora_jax.planning.memory import Held, exceeded, live_at_once, part_bytes, peak_bytes

INVOLUNTARY = 'Involuntary full rematerialization'


class Buffer(NamedTuple):
    """name: of the instruction that makes it.    bytes: on one device.    array: its type, such as `bf16[24,4,3072,3584]`.
    source: the path in the model."""

    name: str
    bytes: int
    array: str
    source: str


class Facts(NamedTuple):
    """A step compiled for absent devices; bytes are those of one of them.

    mesh: axis sizes.    held: what lives through the step.    parts: its bytes by part.
    peak_bytes: HBM that the compiler assigns, by its memory usage report. (`memory_analysis` of a finished compilation tells
        less: it counts what is live at the worst moment, not the space between.)
    stack: [L, B, Q, C] of the teacher's features, of two bytes or four an element; None without a teacher.
    stack_bytes: of one of them.    stacks: how many there are at once; None where the program does not tell.
    largest: buffers at the worst moment.
    involuntary: how often the compiler gave up on a sharding and gathered an array whole.
    asynchronous_known: it was compiled to where the program tells what runs beside computation.
    hlo_instructions: of the program.
    finished: how the compilation went.
    """

    mesh: dict[str, int]
    attention: str
    held: tuple[Held, ...]
    parts: dict[str, int]
    peak_bytes: int
    stack: tuple[int, ...] | None
    stack_bytes: int
    stacks: int | None
    largest: tuple[Buffer, ...]
    collectives: tuple[Collective, ...]
    involuntary: int
    asynchronous_known: bool
    hlo_instructions: int
    finished: child.Finished

    @property
    def working_bytes(self) -> int:
        """Activations and temporaries at the worst moment, without the teacher's features."""
        return max(0, self.peak_bytes - sum(self.parts.values()) - self.stack_bytes * (self.stacks or 0))


def facts(folder: pathlib.Path, finished: child.Finished, data_loops: int, itemsize: int) -> Facts:
    """Reads what a child left in its folder.

    Args:
        data_loops: how often loops run at most whose length is data.
        itemsize: bytes of an activation.

    Raises:
        RuntimeError: the compiler wrote no program down, or no report of what it needs.
    """
    plan, result = (child.read_json(folder / name) for name in (compile_step.PLAN, compile_step.RESULT))
    arrays = tuple(Held(part, path, tuple(shape), size, tuple(map(tuple, axes)))
                   for part, path, shape, size, axes in plan['held'])
    final = folder / compile_step.TEXT
    text = dumped(folder, 'after_optimizations.txt') or (final.read_text(encoding='utf-8') if final.exists() else '')
    if not text:
        raise RuntimeError(f'the compiler left no program in {folder}.')
    missing = [name for name in child.REPORTS if not dumped(folder, name)]
    if missing and plan['platform'] == 'tpu':
        raise RuntimeError(f'the compiler left no {" and no ".join(missing)} in {folder / child.DUMP}; is XLA_FLAGS right?')
    errors = (folder / child.ERRORS).read_text(encoding='utf-8', errors='replace')
    live, stack = dumped(folder, 'live-range.txt'), plan['stack'] and tuple(plan['stack'])
    assignment = dumped(folder, 'optimizations-buffer-assignment.txt') if stack else ''
    stacks = live_at_once(assignment, live, stack, itemsize, text) if stack else 0
    stack_bytes = itemsize * math.prod(stack or (0,))
    needed = (peak_bytes(dumped(folder, 'memory-usage-report.txt')) or result.get('peak_bytes')
              or (exceeded(errors + result.get('exhausted', '')) or (0,))[0])
    if not needed:
        raise RuntimeError(f'the compiler told in {folder} of no memory that it needs.')
    return Facts(
        mesh=plan['mesh'], attention=plan['attention'], held=arrays, parts=part_bytes(arrays, plan['mesh']),
        peak_bytes=int(needed),
        stack=stack, stack_bytes=stack_bytes, stacks=stacks, largest=largest(live, text),
        collectives=collectives(text, plan['mesh'], data_loops),
        involuntary=len(re.findall(INVOLUNTARY, errors, re.IGNORECASE)), asynchronous_known='exhausted' not in result,
        hlo_instructions=sum(map(len, read(text).computations.values())), finished=finished)


def dumped(folder: pathlib.Path, ending: str) -> str:
    """The text of the largest file that XLA dumped with this ending; '' where there is none."""
    found = list((folder / child.DUMP).glob(f'*{ending}'))
    if not found:
        return ''
    return max(found, key=lambda path: path.stat().st_size).read_text(encoding='utf-8', errors='replace')


def largest(live_ranges: str, program: str, count: int = 8) -> tuple[Buffer, ...]:
    """The largest buffers at the worst moment, those of one size and source told once each."""
    peak = live_ranges.partition('(peak):')[2].partition('\n  Stack trace')[0]
    found = []
    for name, index, size in re.findall(r'^    (\S+?)\{([\d,]*)\}: (\d+) bytes', peak, re.MULTILINE)[:count]:
        line = re.search(rf'^\s+(?:ROOT )?%?{re.escape(name)} = (.*)$', program, re.MULTILINE)
        types = re.findall(r'\w+\[[\d,]*\]', line[1].partition(' while(')[0]) if line else []
        place = int(index) if index.isdigit() else 0
        sources = re.findall(r'op_name="([^"]*)"', line[1]) if line else []
        found.append(Buffer(name, int(size), types[place] if place < len(types) else '',
                            sources[0].replace('\\', '') if sources else ''))
    return tuple(found)
