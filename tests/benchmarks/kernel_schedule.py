"""Bundles of the TPU kernels' bodies beside splash attention's, without a TPU.

    python tests/benchmarks/kernel_schedule.py [TOPOLOGY ...]        default v5e:2x2

libtpu (extra `plan`) writes the final schedule of each kernel as text; a body is a region of it. Bundles are not cycles:
they compare bodies of the same work. Work here: 512 rows x 512 keys of head_dim 128 and 64, bf16; a row is a query of one
head (ours: 4 query heads x 128 queries of a kv head; splash: 512 queries of a head). Splash always masks, causally and by
segment; ours has a body each for half tiles, full and partial ones (in this order).
"""
import argparse
import functools
import os
import pathlib
import re
import subprocess
import sys
import tempfile

# libtpu looks for a TPU machine around it, and locks the chips it finds.
ENVIRONMENT = {'TPU_SKIP_MDS_QUERY': '1', 'TPU_WORKER_HOSTNAMES': 'localhost', 'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
               'TPU_MIN_LOG_LEVEL': '3', 'TPU_STDERR_LOG_LEVEL': '3', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1'}
SLOTS, GROUP, KV_HEADS = 4096, 4, 4
KERNELS = ('forward', 'resident backward', 'walked backward', 'splash forward', 'splash backward', 'splash fused backward')


def compile_one(kernel: str, head_dim: int, topology: str, tile: str) -> None:
    """Compiles one kernel; libtpu dumps its schedule as LIBTPU_INIT_ARGS says."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    from vora_jax.ops import range_attention_tpu
    from vora_jax.ops.tile_walk import Tile
    from vora_jax.types import KeyRange

    device = topologies.get_topology_desc(platform='tpu', topology_name=topology).devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    heads = GROUP * KV_HEADS

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    if kernel.startswith('splash'):
        names = ('block_q', 'block_kv', 'block_kv_compute', 'block_q_dkv', 'block_kv_dkv', 'block_kv_dkv_compute')
        sizes = dict.fromkeys(names, 512)
        fused = 'fused' in kernel
        if not fused:
            sizes |= {'block_q_dq': 512, 'block_kv_dq': 512}
        sizes = splash_attention_kernel.BlockSizes(**sizes, use_fused_bwd_kernel=fused)
        mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((SLOTS, SLOTS))] * heads)
        attend = splash_attention_kernel.make_splash_mha_single_device(mask, block_sizes=sizes)
        segments = array(SLOTS, dtype=jnp.int32)
        arrays = [array(heads, SLOTS, head_dim), array(KV_HEADS, SLOTS, head_dim), array(KV_HEADS, SLOTS, head_dim)]

        def run(q, k, v, segments):
            return attend(q, k, v, segment_ids=splash_attention_kernel.SegmentIds(segments, segments))

        if 'backward' in kernel:
            run = jax.grad(lambda *a, forward=run: forward(*a).astype(jnp.float32).sum(), (0, 1, 2))
        jax.jit(run).lower(*arrays, segments).compile()
        return
    tile = Tile(*map(int, tile.split('x'))) if tile else None
    ranges = KeyRange(array(1, SLOTS, dtype=jnp.int32), array(1, SLOTS, dtype=jnp.int32))
    q, k = array(1, SLOTS, heads, head_dim), array(1, SLOTS, KV_HEADS, head_dim)
    if kernel == 'forward':
        jax.jit(functools.partial(range_attention_tpu.forward, tile=tile)).lower(q, k, k, ranges).compile()
    else:
        rows = array(1, heads, SLOTS, dtype=jnp.float32)
        run = functools.partial(range_attention_tpu.backward, resident=kernel.startswith('resident'), tile=tile)
        jax.jit(run).lower(q, k, k, ranges, rows, rows, q).compile()


def bodies(folder: pathlib.Path) -> dict[str, list[int]]:
    """{kernel: bundles of the innermost large regions that hold products} of all dumped schedules."""
    found = {}
    for path in sorted(folder.glob('*final_bundles.txt')):
        name = re.sub(r'^\d+-|(\.\d+)?-\d+-final_bundles.txt$', '', path.name)
        if 'schedule-analysis' in path.name or not re.search('attention|splash', name):
            continue
        begun, regions, products, place = {}, [], [], 0
        for line in path.read_text().splitlines():
            match = re.match(r'\s*(0x[0-9a-f]+|0)\s.*:', line)
            place = int(match.group(1), 16) if match else place
            if 'vmatmul' in line or 'vmatpush' in line:
                products.append(place)
            for event, region in re.findall(r'(Start|End) region (\d+)', line):
                if event == 'Start':
                    begun[region] = place
                elif region in begun:
                    regions.append((begun[region], place))
        with_products = [r for r in regions if any(r[0] <= p <= r[1] for p in products)]
        inner = [r for r in with_products if not any(o != r and r[0] <= o[0] and o[1] <= r[1] for o in with_products)]
        found[name] = sorted(last - first + 1 for first, last in inner)
    return found


def measure(kernel: str, head_dim: int, topology: str, tile: str) -> dict[str, list[int]]:
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | ENVIRONMENT | {
            'LIBTPU_INIT_ARGS': f'--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true', 'JAX_PLATFORMS': 'cpu'}
        command = [sys.executable, __file__, '--compile', kernel, str(head_dim), topology, tile]
        subprocess.run(command, env=environment, check=True)
        return bodies(pathlib.Path(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('topologies', nargs='*', default=['v5e:2x2'])
    parser.add_argument('--compile', nargs=4, metavar=('KERNEL', 'HEAD_DIM', 'TOPOLOGY', 'TILE'), help=argparse.SUPPRESS)
    parser.add_argument('--kernels', default=','.join(KERNELS))
    parser.add_argument('--head-dims', default='128,64')
    parser.add_argument('--tile', default='', help='queries x keys of our tiles, as 128x512')
    args = parser.parse_args()
    if args.compile:
        kernel, head_dim, topology, tile = args.compile
        compile_one(kernel, int(head_dim), topology, tile)
        return
    for topology in args.topologies:
        for head_dim in map(int, args.head_dims.split(',')):
            for kernel in args.kernels.split(','):
                for name, bundles in measure(kernel, head_dim, topology, args.tile).items():
                    print(f'{topology}  H {head_dim:3}  {kernel:22} {name:50} {bundles}', flush=True)


if __name__ == '__main__':
    main()
