"""The GPU kernels through the real compiler, without a GPU."""
import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies

from vora_jax.ops.attention import attention, choose
from vora_jax.types import KeyRange

H100 = '''
platform_name: "CUDA" device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 7 } runtime_version { major: 12 minor: 8 }
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 device_memory_size: 84942979072 cuda_compute_capability { major: 9 }
}
'''
KERNELS = ('forward_kernel', 'd_q_kernel', 'd_kv_kernel')
MIB = 2**20

GRID = [(slots, head_dim, group) for slots in (2048, 8192, 32768) for head_dim in (64, 128, 256) for group in (1, 4, 8)]
QUICK = [(2048, 64, 4), (8192, 64, 1), (2048, 128, 1), (8192, 128, 4)]
OTHERS = {'H80': (80, 2), 'H96': (96, 1), 'f16': (128, 4, jnp.float16), 'f32 H64': (64, 1, jnp.float32),
          'f32 H128': (128, 4, jnp.float32), 'f32 H256': (256, 1, jnp.float32), 'capped': (128, 4, jnp.bfloat16, 50.0),
          'capped H256': (256, 2, jnp.bfloat16, 30.0), '40 queries': (64, 2, jnp.bfloat16, None, 40),
          '700 queries': (128, 8, jnp.bfloat16, None, 700)}


@pytest.fixture(scope='module')
def h100():
    pytest.importorskip('jax_cuda12_plugin', reason='needs the extra `cuda`: pip install .[cuda]')
    before = jax.config.jax_enable_compilation_cache
    jax.config.update('jax_enable_compilation_cache', False)  # programs for absent devices are written, but cannot be read
    yield topologies.get_topology_desc(platform='cuda', topology_name='h100', target_config=H100,
                                       topology='1x1x1').devices[0]
    jax.config.update('jax_enable_compilation_cache', before)


def arrays(device, slots, head_dim, group, dtype=jnp.bfloat16, num_queries=None, num_kv_heads=4):
    """(q, k, v, key_range, d_out); device None: of no device, to be lowered only."""
    sharding = device and jax.sharding.SingleDeviceSharding(device)

    def array(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct((1, *shape), dtype, sharding=sharding)

    num_queries = num_queries or slots
    q, k = array(num_queries, num_kv_heads * group, head_dim), array(slots, num_kv_heads, head_dim)
    return q, k, k, KeyRange(*[array(num_queries, dtype=jnp.int32)] * 2), q


def both(q, k, v, key_range, d_out, soft_cap=None):
    def forward(q, k, v):
        return attention(q, k, v, key_range, implementation='pallas_gpu', soft_cap=soft_cap)

    out, pull = jax.vjp(forward, q, k, v)
    return out, *pull(d_out)


def compiled(inputs, soft_cap=None):
    assert choose(*inputs[:3], 'gpu').implementation == 'pallas_gpu'
    way = jax.jit(lambda *inputs: both(*inputs, soft_cap=soft_cap))
    program = way.lower(*inputs).compile({'xla_backend_optimization_level': 3})
    assert all(name in program.as_text() for name in KERNELS)
    return program


def name_of(case):
    return 'S{} H{} G{}'.format(*case)


@pytest.mark.parametrize('case', [(2048, 128, 4), (8192, 64, 1)], ids=name_of)
def test_forward_and_backward_lower(case):
    """Triton's modules are made and verified; no plugin is needed."""
    absent = jax.sharding.AbstractDevice('NVIDIA H100 80GB HBM3', None, 'gpu')  # JAX 0.12 asks which one it is
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=absent)):
        text = jax.jit(both).trace(*arrays(None, *case)).lower(lowering_platforms=('cuda',)).as_text()
    assert all(name in text for name in KERNELS)


@pytest.mark.parametrize('case', QUICK, ids=name_of)
def test_forward_and_backward_compile(h100, case):
    compiled(arrays(h100, *case))


@pytest.mark.slow
@pytest.mark.parametrize('case', [case for case in GRID if case not in QUICK], ids=name_of)
def test_forward_and_backward_compile_everywhere(h100, case):
    compiled(arrays(h100, *case))


@pytest.mark.slow
@pytest.mark.parametrize('name', OTHERS)
def test_other_shapes_and_dtypes_compile(h100, name):
    head_dim, group, dtype, soft_cap, num_queries = (*OTHERS[name], *(jnp.bfloat16, None, None)[len(OTHERS[name]) - 2:])
    compiled(arrays(h100, 1100, head_dim, group, dtype, num_queries), soft_cap)


def test_temporary_memory_is_linear(h100):
    """At most twice the inputs and results at 32,768 slots, and in proportion to the slots."""
    temporary = {slots: compiled(arrays(h100, slots, 128, 4)).memory_analysis().temp_size_in_bytes
                 for slots in (8192, 32768)}
    bound = 2 * 2 * (2 * 32768 * 128 * (16 + 4 + 4 + 16))
    print(f'{temporary[8192] / MIB:.1f}, {temporary[32768] / MIB:.1f} MiB of {bound / MIB:.0f}')
    assert temporary[32768] <= bound
    assert temporary[32768] <= 4.5 * max(temporary[8192], 16 * MIB)
