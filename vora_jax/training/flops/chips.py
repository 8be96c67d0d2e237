"""What accelerators can do: one cited table.

Figures are those of one JAX device. On most TPUs that is a chip; TPU7x shows each half of a chip, with half of its links, as
a device. Sources:

    v4     https://cloud.google.com/tpu/docs/v4 (275 TFLOP/s, 32 GiB, 1200 GB/s, 3D)
    v5e    https://cloud.google.com/tpu/docs/v5e (197 TFLOP/s, 16 GB, 819 GB/s, 4 links, 400 GB/s both ways, 2 x 100 Gb/s)
    v5p    https://cloud.google.com/tpu/docs/v5p (459 TFLOP/s, 95 GiB, 2765 GB/s, 1200 GB/s both ways, 50 Gb/s a chip)
    v6e    https://cloud.google.com/tpu/docs/v6e (918 TFLOP/s, 32 GB, 1640 GB/s, 4 links, 800 GB/s both ways, 4 x 200 Gb/s)
    tpu7x  https://docs.cloud.google.com/tpu/docs/tpu7x (2307 TFLOP/s, 192 GiB, 7380 GB/s, 1200 GB/s both ways, 100 Gb/s)
    links  https://jax-ml.github.io/scaling-book/tpus (one way 45 GB/s on v4 and v5e, 90 on the others; the pages above give
           50 and 100), and DCN of v4 (6.25 GB/s a chip)
    h100   https://www.nvidia.com/en-us/data-center/h100 (989 TFLOP/s dense, 80 GB, 3.35 TB/s, NVLink 900 GB/s both ways)
    a100   https://www.nvidia.com/en-us/data-center/a100 (312 TFLOP/s dense, 80 GB, 2039 GB/s, NVLink 600 GB/s both ways)
    From memory: that GPU hosts are DGX's (8 GPUs, each with a NIC of 400 or 200 Gb/s); how much memory CUDA leaves free.

`usable_bytes` of TPUs: what libtpu 0.0.42 says is available when a program that is too large is compiled for the topology.
"""
import re
from typing import NamedTuple

from vora_jax.types import UserError

GIB = 2**30


class Chip(NamedTuple):
    """Facts of one JAX device.

    name: as topologies are called (`v5e:8x8`).    kinds: what `jax.Device.device_kind` may say.
    flops: bf16 FLOP/s, dense products.
    usable_bytes: of HBM that a program may take.    hbm: bytes/s.
    links, link: neighbours, and bytes/s one way to each (NVLink for GPUs). On a torus a ring over one axis uses 2 links.
    torus: dimensions of the torus; 0 for a switch, where every link leads to every device.
    host_devices: devices of a full host.    dcn: bytes/s one way of that host's network.
    """

    name: str
    kinds: tuple[str, ...]
    flops: float
    usable_bytes: float
    hbm: float
    links: int
    link: float
    torus: int
    host_devices: int
    dcn: float


CHIPS = (
    # Without a TPU the compiler shows v4's two cores as devices, each with 15.25 GiB; on the hardware they are one.
    Chip('v4', ('TPU v4',), 275e12, 2 * 15.25 * GIB, 1200e9, 6, 45e9, 3, 4, 25e9),
    Chip('v5e', ('TPU v5 lite', 'TPU v5e'), 197e12, 15.75 * GIB, 819e9, 4, 45e9, 2, 8, 25e9),
    Chip('v5p', ('TPU v5', 'TPU v5p'), 459e12, 95.74 * GIB, 2765e9, 6, 90e9, 3, 4, 25e9),
    Chip('v6e', ('TPU v6 lite', 'TPU v6e'), 918e12, 31.25 * GIB, 1640e9, 4, 90e9, 2, 8, 100e9),
    Chip('tpu7x', ('TPU7x', 'TPU v7', 'TPU v7x'), 2307e12 / 2, 94.75 * GIB, 7380e9 / 2, 3, 90e9, 3, 8, 50e9),
    Chip('h100', ('NVIDIA H100 80GB HBM3', 'NVIDIA H100 SXM5 80GB'), 989e12, 79 * GIB, 3350e9, 18, 25e9, 0, 8, 400e9),
    Chip('a100', ('NVIDIA A100-SXM4-80GB', 'NVIDIA A100-SXM-80GB'), 312e12, 79 * GIB, 2039e9, 12, 25e9, 0, 8, 200e9),
)


def chip_of(device_kind: str) -> Chip | None:
    """The chip of a `jax.Device.device_kind`; None where the table has none (CPUs)."""
    return next((chip for chip in CHIPS if device_kind in chip.kinds), None)


def chip_of_topology(topology: str) -> Chip:
    """The chip of a topology such as `v5p:8x8x8` (TPUs) or `h100:8` (GPUs of one host).

    Raises:
        UserError: no such chip, or not of that form.
    """
    name, _, shape = topology.partition(':')
    chip = next((chip for chip in CHIPS if chip.name == name.lower()), None)
    if chip is None:
        raise UserError(f'topology {topology!r}: there is no chip {name!r}; choose one of '
                        f'{", ".join(chip.name for chip in CHIPS)}.')
    if not re.fullmatch(r'[1-9]\d*(x[1-9]\d*)*', shape) or shape.count('x') != max(chip.torus - 1, 0):
        example = ':' + ('x'.join(['4'] * chip.torus) if chip.torus else '8')
        raise UserError(f'topology {topology!r}: {shape!r} is not a shape of {name}; write it like {chip.name}{example}.')
    return chip
