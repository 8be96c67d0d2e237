"""TPU types under the names that each cloud tool has for them."""

import math
import re
from typing import NamedTuple

from vora_jax.planning.topology import LARGEST
from vora_jax.types import UserError


class Generation(NamedTuple):
    """One kind of TPU.

    gcloud: prefix of its accelerator type.   cores_per_chip: what the number behind that prefix counts.
    runtime: software version of its VMs.     gke: value of the node label cloud.google.com/gke-tpu-accelerator.
    """

    gcloud: str
    cores_per_chip: int
    runtime: str
    gke: str


# https://cloud.google.com/tpu/docs/runtimes and https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus
GENERATIONS = {
    'v4': Generation('v4', 2, 'tpu-ubuntu2204-base', 'tpu-v4-podslice'),
    'v5e': Generation('v5litepod', 1, 'v2-alpha-tpuv5-lite', 'tpu-v5-lite-podslice'),
    'v5p': Generation('v5p', 2, 'v2-alpha-tpuv5', 'tpu-v5p-slice'),
    'v6e': Generation('v6e', 1, 'v2-alpha-tpuv6e', 'tpu-v6e-slice'),
}
_FLAT = ('v5e', 'v6e')  # two-dimensional; their slices of 8 chips are one host
_FLAT_SHAPES = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))


class Slice(NamedTuple):
    """A slice of TPUs. kind: key of GENERATIONS; shape: chips along each axis."""

    kind: str
    shape: tuple[int, ...]

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    @property
    def hosts(self) -> int:
        return 1 if self.chips <= 4 or (self.kind in _FLAT and self.chips == 8) else self.chips // 4

    @property
    def text(self) -> str:
        return 'x'.join(map(str, self.shape))

    @property
    def accelerator_type(self) -> str:
        """gcloud's and xpk's name, like 'v5litepod-64' or 'v5p-128'."""
        generation = GENERATIONS[self.kind]
        return f'{generation.gcloud}-{self.chips * generation.cores_per_chip}'

    def by_count(self) -> 'Slice':
        """Itself. UserError if tools that are told only a number of chips would build another shape."""
        usual = Slice(self.kind, _usual(self.chips, len(self.shape)))
        if usual.chips == self.chips and usual.shape != self.shape:
            raise UserError(
                f'{self.accelerator_type} is built as {self.kind}:{usual.text}, not {self.kind}:{self.text}; '
                'say that, or use the kind jobset, which names the shape.'
            )
        return self


def parse(text: str) -> Slice:
    """The slice that `v5e:8x8` or `v5p:4x4x4` names, as `vora plan` takes it. UserError otherwise."""
    match = re.fullmatch(r'(\w+):(\d+(?:x\d+){1,2})', text)
    if not match or match[1] not in GENERATIONS:
        raise UserError(
            f'--topology {text!r} is no TPU slice; write {", ".join(GENERATIONS)} and a shape, like v5e:8x8 or v5p:4x4x4.'
        )
    kind, shape = match[1], tuple(map(int, match[2].split('x')))
    axes = 2 if kind in _FLAT else 3
    if len(shape) != axes or 0 in shape or (math.prod(shape) > 4 and math.prod(shape) % 4):
        raise UserError(f'--topology {text!r}: a {kind} has {axes} axes, and 1, 2, 4 or a multiple of 4 chips.')
    if not _exists(kind, shape):
        which = (
            ', '.join('x'.join(map(str, one)) for one in _FLAT_SHAPES)
            if axes == 2
            else f'2x2x1 to 4x4x4 by powers of two, then multiples of 4, {LARGEST[kind]} chips at most'
        )
        raise UserError(f'--topology {text!r}: there is no such slice of {kind}; there are {which}.')
    return Slice(kind, shape)


def _exists(kind: str, shape: tuple[int, ...]) -> bool:
    if kind in _FLAT:
        return shape in _FLAT_SHAPES
    chips = math.prod(shape)
    if chips <= 64:
        return all(axis in (1, 2, 4, 8, 16) for axis in shape)
    return chips <= LARGEST[kind] and all(axis % 4 == 0 for axis in shape)


def _usual(chips: int, axes: int) -> tuple[int, ...]:
    """The shape as near to a cube as powers of two allow: 2x4, 4x8, 2x2x1 (as one host is written), 4x4x8."""
    if axes == 3 and chips == 4:
        return (2, 2, 1)
    exponent = chips.bit_length() - 1
    return tuple(2 ** ((exponent + axis) // axes) for axis in range(axes))
