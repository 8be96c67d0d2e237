"""Tries meshes, rematerialisation and accumulation."""
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

from vora_jax.planning.facts import Facts
from vora_jax.planning.kept import REMATS
from vora_jax.planning.memory import Held, part_bytes
from vora_jax.training.mesh.gather import cut_axes

MARGIN = 0.85  # of the estimate of memory: at 7B it was up to 11% too high (see `kept.row_bytes`)


class Candidate(NamedTuple):
    """Settings to try.

    mesh: axis sizes.    gather: as `Mesh.gather`.    remat: of the language model.    accumulation: micro-batches of a step.
    """

    mesh: tuple[tuple[str, int], ...]
    gather: str
    remat: str
    accumulation: int

    @property
    def sizes(self) -> dict[str, int]:
        return dict(self.mesh)

    @property
    def flags(self) -> tuple[str, ...]:
        """To paste."""
        mesh = tuple(f'Mesh.{axis}={size}' for axis, size in self.mesh)
        remat = (f'LanguageModel.remat={self.remat}',) if self.remat else ()
        return tuple(f'--gin.{flag}' for flag in (*mesh, *remat, f'Mesh.gather={self.gather}',
                                                  f'Train.accumulation={self.accumulation}'))

    @property
    def bindings(self) -> tuple[str, ...]:
        """For `gin_config.load`."""
        return tuple(flag.removeprefix('--gin.') for flag in self.flags)


class Tried(NamedTuple):
    """A candidate that was compiled: facts None where it cannot be (why: the sentence), else whether it fits.

    seconds: of a step at least.    serial_seconds: where nothing overlaps.
    """

    candidate: Candidate
    facts: Facts | None
    fits: bool
    seconds: float
    serial_seconds: float
    why: str = ''


def candidates(num_devices: int, slices: int, batch_rows: int, remats: Iterable[str], context: int,
               tensors: Iterable[int] = (1,)) -> Iterator[Candidate]:
    """All settings whose micro-batches divide over the devices. Slices are replicas: data is a multiple of their number."""
    for tensor, remat in itertools.product(tensors, remats):
        if num_devices % (tensor * context):
            continue
        ways = num_devices // (tensor * context)
        if batch_rows % ways:
            continue
        for data in (size for size in _divisors(ways) if size % slices == 0):
            mesh = ('data', data), ('fsdp', ways // data), ('context', context), ('tensor', tensor)
            two_rings = data > 1 and ways > data and tensor == context == 1
            for accumulation in _divisors(batch_rows // ways):
                if accumulation & (accumulation - 1) == 0:
                    for gather in ('compiler', 'two_hop')[:1 + two_rings]:
                        yield Candidate(mesh, gather, remat, accumulation)


def least_bytes(candidate: Candidate, arrays: Iterable[Held], batch_rows: int, row_bytes: float) -> float:
    """A lower bound of what a device needs: all that lives through the step, the gradients (twice with accumulation: the
    sum and the part), and what is kept for the backward pass, `row_bytes` for a row."""
    parts = part_bytes(arrays, candidate.sizes)
    gradients = parts['trainable'] * (2 if candidate.accumulation > 1 else 1)
    return sum(parts.values()) + gradients + rows_at_once(candidate, batch_rows) * row_bytes


def rows_at_once(candidate: Candidate, batch_rows: int) -> float:
    """Rows of a micro-batch on one device, as a part of a row where context or tensor cut it."""
    return batch_rows / (candidate.accumulation * math.prod(candidate.sizes.values()))


def search(every: Iterable[Candidate], need: Callable[[Candidate], float], usable_bytes: float,
           bound: Callable[[Candidate, Facts | None], tuple[float, float]], compile_one: Callable[[Candidate], Facts],
           max_compiles: int, mistakes: type[Exception], told: Callable[[Tried], None] = lambda tried: None,
           ) -> tuple[list[Tried], int]:
    """The candidates that were compiled, those that fit first, by their bound; and how many could still be tried. Ctrl-C
    ends it with what there is.

    Those that cannot fit by `need` are left out, and so is whatever needs more than one that did not fit (`needs_more`).
    Of those that should fit, what promises the lowest bound is compiled first; then those that might, the smallest first.
    Once one fits, what cannot beat it is left out.

    Args:
        need: the bytes on a device, by estimate; `MARGIN` says by how much it may be too high.
        usable_bytes: of a device.
        bound: (seconds of a step at least, and where nothing overlaps); without facts, from the settings alone.
        mistakes: the exception of a candidate that the model or the mesh forbids; it is noted, not raised, and so is a
            RuntimeError, a compiler that crashed.
        told: is called after each compilation.
    """
    needs = {one: need(one) for one in every}
    possible = [one for one, size in needs.items() if MARGIN * size <= usable_bytes]
    bounds = {one: bound(one, None) for one in possible}

    def order(one: Candidate) -> tuple:
        return (0, bounds[one], needs[one]) if needs[one] <= usable_bytes else (1, needs[one], bounds[one])

    waiting = sorted(possible, key=order)
    tried: list[Tried] = []
    best = (math.inf, math.inf)

    def worth_it(one: Candidate) -> bool:
        return bounds[one] < best and not any(
            needs_more(one, other.candidate) for other in tried if other.facts and not other.fits)

    try:
        while (waiting := [one for one in waiting if worth_it(one)]) and len(tried) < max_compiles:
            candidate = waiting.pop(0)
            try:
                facts = compile_one(candidate)
                seconds = bound(candidate, facts)
                tried.append(Tried(candidate, facts, 0 < facts.peak_bytes <= usable_bytes, *seconds))
                best = min(best, seconds) if tried[-1].fits else best
            except (mistakes, RuntimeError) as error:
                tried.append(Tried(candidate, None, False, math.inf, math.inf, _first_lines(error)))
            told(tried[-1])
    except KeyboardInterrupt:
        pass
    return sorted(tried, key=lambda one: (not one.fits, one.seconds, one.serial_seconds)), len(waiting)


def needs_more(candidate: Candidate, failed: Candidate) -> bool:
    """True where it keeps as much for the backward pass, of as many rows at once, and cuts what lives through the step no
    more; two hops need as much room for gathered weights as the compiler's one, and some besides."""
    if {candidate.remat, failed.remat} - {*REMATS}:
        kept_more = candidate.remat == failed.remat
    else:
        kept_more = REMATS.index(candidate.remat) >= REMATS.index(failed.remat)
    return (kept_more and rows_at_once(candidate, 1) >= rows_at_once(failed, 1) and _cut(candidate) <= _cut(failed)
            and candidate.gather in (failed.gather, 'two_hop')
            and all(candidate.sizes.get(axis, 1) == failed.sizes.get(axis, 1) for axis in ('context', 'tensor')))


def _cut(candidate: Candidate) -> int:
    """Into how many shards a matrix is cut."""
    return math.prod(candidate.sizes[axis] for axis in cut_axes(candidate.gather))


def _first_lines(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ' '.join([*lines[:1], *lines[-1:]][:len(lines)])[:300]


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def mesh_of(sizes: Mapping[str, int]) -> str:
    """`data 4 x fsdp 16`, axes of one device left out."""
    return ' x '.join(f'{axis} {size}' for axis, size in sizes.items() if size > 1) or 'one device'
