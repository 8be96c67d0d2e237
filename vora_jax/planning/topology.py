"""Devices that are not there: TPU topologies, GPUs."""
import importlib.util
import math
from typing import Any, NamedTuple

from vora_jax.training.flops.chips import CHIPS, Chip, chip_of_topology
from vora_jax.types import UserError

EXAMPLES = 'v5e:8x8, v5p:8x8x8, v6e:16x16, h100:8'
HOST_CHIPS = (2, 2)  # of a TPU host: a topology is made of whole ones

# Chips of the largest slice, by the pages that `training.flops.chips` cites; GPUs of a host.
LARGEST = {'v4': 4096, 'v5e': 256, 'v5p': 6144, 'v6e': 256, 'tpu7x': 9216, 'h100': 8, 'a100': 8}

# What XLA must know of a GPU that is not there; memory is what a driver reports.
_GPU_TARGET = """gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: {shared} threads_per_core_limit: 2048 core_count: {cores} fpus_per_core: {fpus}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} l2_cache_size: {cache} clock_rate_ghz: {clock} device_memory_size: {memory}
  shared_memory_per_block_optin: {block} cuda_compute_capability {{ major: {major} minor: 0 }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 7 }} runtime_version {{ major: 12 minor: 8 }}
device_description_str: "{name}"
"""
_GPU_FACTS = {
    'h100': {'name': 'NVIDIA H100 80GB HBM3', 'shared': 233472, 'cores': 132, 'fpus': 128, 'bandwidth': 3352320000000,
             'cache': 52428800, 'clock': 1.98, 'memory': 84942979072, 'block': 232448, 'major': 9},
    'a100': {'name': 'NVIDIA A100-SXM4-80GB', 'shared': 167936, 'cores': 108, 'fpus': 64, 'bandwidth': 2039000000000,
             'cache': 41943040, 'clock': 1.41, 'memory': 84974239744, 'block': 166912, 'major': 8},
}


class Topology(NamedTuple):
    """kind: of chip, as `training.flops.chips` names it.    shape: chips of a slice, along the axes of its torus.
    slices: joined by a slower network."""

    kind: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def platform(self) -> str:
        return 'cuda' if self.kind in _GPU_FACTS else 'tpu'

    @property
    def name(self) -> str:
        """As it is written: `v5p:8x8x8`."""
        return f'{self.kind}:{"x".join(map(str, self.shape))}'

    @property
    def chip(self) -> Chip:
        """Facts of one device, as the compiler shows it: v4's two cores are devices of their own there."""
        chip = chip_of_topology(self.name)
        if self.kind != 'v4':
            return chip
        halves = {name: getattr(chip, name) / 2 for name in ('flops', 'usable_bytes', 'hbm')}
        return chip._replace(links=chip.links // 2, host_devices=2 * chip.host_devices, **halves)

    def __str__(self) -> str:
        return self.name if self.slices == 1 else f'{self.slices} slices of {self.name}'


def parse(text: str, slices: int = 1) -> Topology:
    """The topology that `v5p:8x8x8` or `h100:8` names.

    Raises:
        UserError: another form, an unknown chip, a shape that it does not come in.
    """
    kind, colon, shape = text.strip().lower().partition(':')
    if not colon:
        raise UserError(f'--topology: {text!r} is not CHIP:SHAPE; the chips are {", ".join(chip.name for chip in CHIPS)}, '
                        f'as in {EXAMPLES}.')
    chip_of_topology(f'{kind}:{shape}')
    found = Topology(kind, tuple(int(size) for size in shape.split('x')), slices)
    if slices < 1:
        raise UserError(f'--slices is {slices}; it must be at least 1.')
    if found.platform == 'tpu' and any(size % whole for size, whole in zip(found.shape, HOST_CHIPS)):
        raise UserError(f'--topology: {text!r} is not made of whole hosts of {"x".join(map(str, HOST_CHIPS))} chips; choose '
                        'even sizes.')
    if found.platform == 'cuda' and slices > 1:
        raise UserError(f'--slices is {slices}, but {kind} has no slices; leave it out.')
    return found


def larger(topology: Topology) -> Topology | None:
    """The next larger one: twice the chips, along the last of its shortest axes, as Cloud names them (2x2, 2x4, 4x4). None
    where slices (GPUs: hosts) are no larger."""
    if 2 * math.prod(topology.shape) > LARGEST[topology.kind]:
        return None
    axis = max(i for i, size in enumerate(topology.shape) if size == min(topology.shape))
    return topology._replace(shape=tuple(size * (2 if i == axis else 1) for i, size in enumerate(topology.shape)))


def check_installed(topology: Topology) -> None:
    """Raises UserError unless the compiler for such devices is installed."""
    if topology.platform == 'tpu' and not importlib.util.find_spec('libtpu'):
        raise UserError(f'planning for {topology.name} needs the TPU compiler libtpu, which is not installed; install the '
                        'extra `plan`: pip install .[plan].')
    plugins = ('jax_cuda12_plugin', 'jax_cuda13_plugin')
    if topology.platform == 'cuda' and not any(map(importlib.util.find_spec, plugins)):
        raise UserError(f'planning for {topology.name} needs the CUDA plugin of JAX, which is not installed; install the '
                        'extra `cuda`: pip install .[cuda].')


def devices(topology: Topology) -> list[Any]:
    """The devices, for a mesh of programs that are only compiled.

    Raises:
        UserError: the compiler knows no such topology.
    """
    from jax.experimental import topologies  # late: it loads the compiler
    options: dict[str, Any] = {}
    name = topology.name
    if topology.platform == 'cuda':
        name = topology.kind
        options = {'target_config': _GPU_TARGET.format(**_GPU_FACTS[topology.kind]),
                   'topology': f'1x1x{math.prod(topology.shape)}'}
    elif topology.slices > 1:
        options = {'num_slices': topology.slices}
    try:
        return list(topologies.get_topology_desc(platform=topology.platform, topology_name=name, **options).devices)
    except Exception as error:  # JaxRuntimeError of the plugin: its text is all there is
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f'--topology: {topology} is unknown to the compiler ({first}); write one such as '
                        f'{EXAMPLES}.') from error
