"""The least time a step can take.

Each resource is busy for some seconds: multipliers (FLOPs over peak), HBM (bytes over bandwidth), the links of a slice, the
network between slices. Where all of them overlap, the busiest sets the time; real steps take longer. Plain numbers in,
plain numbers out.
"""
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from vora_jax.training.flops.chips import Chip

RING_OF = 16  # v5e and v6e: an axis of a slice closes to a ring only where it is as long
CUBE = 4  # v4, v5p, tpu7x: axes that are multiples of it close to rings


class Demand(NamedTuple):
    """What a step asks for.

    model, executed: FLOPs of all devices.    tokens: of all devices.
    hbm_bytes: read and written by one device; 0 where nobody counted.
    wire_bytes: sent by one device within its slice, by the number of devices that share the array.
    network_bytes: sent by one device to other slices.
    """

    model: float
    executed: float
    tokens: float
    hbm_bytes: float = 0.0
    wire_bytes: Mapping[int, float] = {}
    network_bytes: float = 0.0


class Bound(NamedTuple):
    """seconds: that each resource is busy.    binding: the busiest one.    step_seconds: its time.
    serial_seconds: of all, one after another: where nothing overlaps.
    ceiling: MFU if computing were all.    mfu: at the bound.
    """

    seconds: Mapping[str, float]
    binding: str
    step_seconds: float
    serial_seconds: float
    tokens_per_second_per_device: float
    ceiling: float
    mfu: float


def bound(chip: Chip, shape: Sequence[int], devices: int, demand: Demand) -> Bound:
    """The bound of a step on so many devices.

    Args:
        chip: facts of one device.
        shape: of a slice, chips along each axis of its torus; of GPUs, how many a host has.
        devices: of all slices.
        demand: of the step.

    Example: 2e15 FLOPs on 4 devices of 1e15 FLOP/s take 0.5 s; with 1.5e15 of them needed the ceiling of MFU is 0.75.
    """
    seconds = {
        'compute': demand.executed / (devices * chip.flops),
        'memory': demand.hbm_bytes / chip.hbm,
        'interconnect': sum(size / (links(chip, shape, group) * chip.link) for group, size in demand.wire_bytes.items()),
        'network': demand.network_bytes * chip.host_devices / chip.dcn,
    }
    binding = max(seconds, key=seconds.get)
    longest = seconds[binding]
    return Bound(seconds, binding, longest, sum(seconds.values()), demand.tokens / longest / devices,
                 demand.model / demand.executed, demand.model / (longest * devices * chip.flops))


def links(chip: Chip, shape: Sequence[int], group: int) -> int:
    """Links that a device sends over at once, one way, when `group` devices of a slice share an array.

    A ring sends both ways along each axis it covers. An axis that is no ring counts once: its ends have one link. A group
    covers the fewest axes whose sizes multiply to it; where none do, a part of one axis if it fits into one, else all axes.

    Example: 64 devices of v5e:8x8 use 2 (two axes, no rings), 8 of them 1; v5p:4x4x4 has 6 and 2, and groups of 16 use 4.
    """
    if not chip.torus:
        return chip.links
    shared = 2 * chip.torus // chip.links  # devices that share a chip's links
    sizes = [size for size in shape if size > 1]
    subsets = (axes for number in range(len(sizes) + 1) for axes in itertools.combinations(sizes, number))
    covered = next((axes for axes in subsets if math.prod(axes) * shared == group), None)
    if covered is None and group <= shared * max(sizes, default=1):
        return 1
    return max(1, sum(_ways(chip, shape, size) for size in (sizes if covered is None else covered)) // shared)


def rough_hbm_bytes(weight_bytes: float, passes: int, state_bytes: float, kept_bytes: float) -> float:
    """Bytes that one device moves in a step, where the compiler did not count them: an estimate, no bound.

    Args:
        weight_bytes: of all weights as they are multiplied, gathered: written and read in each pass.
        passes: over them: where they differ, 1, with weight_bytes the sum over all passes.
        state_bytes: of the parameters and optimizer state it holds: read and written once.
        kept_bytes: of activations kept for the backward pass: written and read once.
    """
    return 2 * (weight_bytes * passes + state_bytes + kept_bytes)


def _ways(chip: Chip, shape: Sequence[int], size: int) -> int:
    closed = size == RING_OF if chip.torus == 2 else all(one % CUBE == 0 for one in shape)
    return 2 if closed else 1
