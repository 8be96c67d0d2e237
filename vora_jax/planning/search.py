"""Tries meshes, rematerialisation and accumulation."""
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

from vora_jax.planning.facts import Facts
from vora_jax.planning.kept import REMATS
from vora_jax.planning.memory import Held, part_bytes


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
    """A candidate that was compiled: facts None where it cannot be (why: the sentence), else whether it fits."""

    candidate: Candidate
    facts: Facts | None
    fits: bool
    seconds: float
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
    mesh = candidate.sizes
    parts = part_bytes(arrays, mesh)
    rows = batch_rows / (candidate.accumulation * mesh['data'] * mesh['fsdp'])
    gradients = parts['trainable'] * (2 if candidate.accumulation > 1 else 1)
    return sum(parts.values()) + gradients + rows * row_bytes / (mesh['context'] * mesh['tensor'])


def search(every: Iterable[Candidate], need: Callable[[Candidate], float], usable_bytes: float,
           bound: Callable[[Candidate, Facts | None], float], compile_one: Callable[[Candidate], Facts],
           max_compiles: int, mistakes: type[Exception], told: Callable[[Tried], None] = lambda tried: None,
           ) -> list[Tried]:
    """The candidates that were compiled, those that fit first, by their bound. Ctrl-C ends it with what there is.

    Those that cannot fit by `need` are left out, and so is whatever saves more activations than one that did not fit. What
    promises the lowest bound is compiled first; once one fits, what cannot beat it is left out.

    Args:
        need: a lower bound of the bytes on a device.    usable_bytes: of a device.
        bound: seconds of a step at least; without facts, from the settings alone.
        mistakes: the exception of a candidate that the model or the mesh forbids; it is noted, not raised.
        told: is called after each compilation.
    """
    waiting = sorted(((bound(one, None), i, one) for i, one in enumerate(every) if need(one) <= usable_bytes))
    tried: list[Tried] = []
    failed: list[Tried] = []
    best = math.inf
    try:
        for guess, _, candidate in waiting:
            if len(tried) == max_compiles:
                break
            if guess >= best or any(_needs_more(candidate, one.candidate) for one in failed):
                continue
            try:
                facts = compile_one(candidate)
                seconds = bound(candidate, facts)
                tried.append(Tried(candidate, facts, 0 < facts.peak_bytes <= usable_bytes, seconds))
                failed += [] if tried[-1].fits else [tried[-1]]
                best = min(best, seconds) if tried[-1].fits else best
            except mistakes as error:
                tried.append(Tried(candidate, None, False, math.inf, str(error)))
            told(tried[-1])
    except KeyboardInterrupt:
        pass
    return sorted(tried, key=lambda one: (not one.fits, one.seconds))


def _needs_more(candidate: Candidate, failed: Candidate) -> bool:
    """True where it keeps more for the backward pass, or has larger micro-batches, and all else is the same."""
    if (candidate.mesh, candidate.gather) != (failed.mesh, failed.gather) or {candidate.remat, failed.remat} - {*REMATS}:
        return False
    return (REMATS.index(candidate.remat) >= REMATS.index(failed.remat)
            and candidate.accumulation <= failed.accumulation)


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def mesh_of(sizes: Mapping[str, int]) -> str:
    """`data 4 x fsdp 16`, axes of one device left out."""
    return ' x '.join(f'{axis} {size}' for axis, size in sizes.items() if size > 1) or 'one device'
