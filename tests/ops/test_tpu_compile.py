"""The TPU kernels through the real compiler, without a TPU."""
import importlib.util
import os
import pathlib

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies

from vora_jax.ops import range_attention_tpu
from vora_jax.ops.attention import attention, choose
from vora_jax.types import KeyRange

TOPOLOGIES = {'v4': 'v4:2x2x1', 'v5e': 'v5e:2x2', 'v5p': 'v5p:2x2x1', 'v6e': 'v6e:2x2', 'tpu7x': 'tpu7x:2x2x1'}
MIB = 2**20

GRID = [(name, slots, head_dim, group) for name in TOPOLOGIES for slots in (2048, 8192, 32768) for head_dim in (64, 128)
        for group in (1, 4, 8)]
QUICK = [('v4', 2048, 128, 4), ('v4', 32768, 64, 1), ('v5e', 32768, 128, 8), ('v5p', 2048, 128, 1),
         ('v6e', 32768, 128, 4), ('tpu7x', 8192, 64, 1)]


def load_schedule():
    """The script tests/benchmarks/kernel_schedule.py as a module."""
    path = pathlib.Path(__file__).parents[1] / 'benchmarks' / 'kernel_schedule.py'
    spec = importlib.util.spec_from_file_location('kernel_schedule', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


kernel_schedule = load_schedule()


@pytest.fixture(scope='module')
def device_of():
    pytest.importorskip('libtpu', reason='needs the extra `plan`: pip install .[plan]')
    before = dict(os.environ)
    os.environ.update(kernel_schedule.ENVIRONMENT)
    jax.config.update('jax_enable_compilation_cache', False)  # it cannot read programs for a machine that is not there
    yield lambda name: topologies.get_topology_desc(platform='tpu', topology_name=TOPOLOGIES[name]).devices[0]
    jax.config.update('jax_enable_compilation_cache', True)
    os.environ.clear()
    os.environ.update(before)


def arrays(device, slots, head_dim, group, num_kv_heads=4, dtype=jnp.bfloat16, rows=1, num_queries=None):
    def array(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.sharding.SingleDeviceSharding(device))

    num_queries = num_queries or slots
    q = array(rows, num_queries, num_kv_heads * group, head_dim)
    k = array(rows, slots, num_kv_heads, head_dim)
    return q, k, k, KeyRange(*[array(rows, num_queries, dtype=jnp.int32)] * 2)


def forward(q, k, v, key_range):
    return attention(q, k, v, key_range, implementation='pallas_tpu')


def both(q, k, v, key_range, d_out):
    out, pull = jax.vjp(lambda q, k, v: forward(q, k, v, key_range), q, k, v)
    return out, *pull(d_out)


def compiled(way, q, k, v, key_range):
    assert choose(q, k, v, 'tpu').implementation == 'pallas_tpu'
    inputs = (q, k, v, key_range, q) if way is both else (q, k, v, key_range)
    program = jax.jit(way).lower(*inputs).compile()
    assert 'tpu_custom_call' in program.as_text()
    return program


def name_of(case):
    return '{} S{} H{} G{}'.format(*case)


def check(device, slots, head_dim, group):
    """Forward and backward compile, in temporary memory of at most twice the inputs and results: nothing is quadratic."""
    q, k, v, key_range = arrays(device, slots, head_dim, group)
    temporary = compiled(both, q, k, v, key_range).memory_analysis().temp_size_in_bytes
    touched = 2 * 2 * (2 * q.size + 2 * k.size)  # bytes of q, k, v, out and their gradients
    print(f'{temporary / MIB:.1f} MiB temporary, {temporary / touched:.2f} of inputs and results')
    assert temporary <= 2 * touched


@pytest.mark.parametrize('case', QUICK, ids=name_of)
def test_forward_and_backward_compile(device_of, case):
    name, *sizes = case
    check(device_of(name), *sizes)


@pytest.mark.slow
@pytest.mark.parametrize('case', [case for case in GRID if case not in QUICK], ids=name_of)
def test_forward_and_backward_compile_everywhere(device_of, case):
    name, *sizes = case
    check(device_of(name), *sizes)


OTHERS = {
    'odd head_dim, some queries': (80, 2, jnp.bfloat16, 300),
    'as much as VMEM takes': (128, 32, jnp.bfloat16, None),
    'wide heads': (256, 8, jnp.bfloat16, None),
    'float32': (128, 4, jnp.float32, None),
    'head_dim 96': (96, 1, jnp.bfloat16, None),
    'float32, narrow heads': (64, 1, jnp.float32, None),
}


@pytest.mark.parametrize('name', [name if i == 0 else pytest.param(name, marks=pytest.mark.slow)
                                  for i, name in enumerate(OTHERS)])
def test_other_shapes_and_dtypes_compile(device_of, name):
    """Slots that fill no tile, too."""
    head_dim, group, dtype, num_queries = OTHERS[name]
    compiled(both, *arrays(device_of('v5e'), 1100, head_dim, group, 2, dtype, 2, num_queries))


@pytest.mark.slow
def test_temporary_memory_of_the_forward_pass(device_of):
    """At 32,768 slots at most twice q, k, v and out; twice the slots take less than four times as much (XLA
    keeps copies in VMEM while they fit)."""
    temporary = {}
    for slots in (32768, 65536):
        q, k, v, key_range = arrays(device_of('v5e'), slots, 128, 4)
        temporary[slots] = compiled(forward, q, k, v, key_range).memory_analysis().temp_size_in_bytes
    print({slots: f'{size / MIB:.1f} MiB' for slots, size in temporary.items()})
    assert temporary[32768] <= 2 * 2 * 32768 * 128 * (16 + 4 + 4 + 16)
    assert temporary[65536] <= 4 * temporary[32768]


def test_the_compiler_catches_tiles_that_do_not_fit(device_of, monkeypatch):
    """What neither interpreter sees: VMEM has an end."""
    monkeypatch.setattr(range_attention_tpu, 'VMEM_LIMIT_BYTES', 2**18)
    lowered = jax.jit(lambda *inputs: range_attention_tpu.forward(*inputs)).lower(*arrays(device_of('v5e'), 1024, 128, 1))
    with pytest.raises(Exception, match='(?i)vmem|exhausted'):
        lowered.compile()


@pytest.mark.slow
def test_bodies_are_scheduled_as_tightly_as_splash_attention(device_of):
    """Bundles per 512 rows x 512 keys x 128 on v5e: full tiles at most splash's, partial ones at most 1.05 times."""
    (_, full, partial), = kernel_schedule.measure('forward', 128, TOPOLOGIES['v5e'], '').values()
    splash, = [bundles[-1] for bundles in kernel_schedule.measure('splash forward', 128, TOPOLOGIES['v5e'], '').values()]
    print(f'full {full}, partial {partial}, splash {splash}')
    assert full <= splash and partial <= 1.05 * splash
