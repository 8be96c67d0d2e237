"""Attention over slots on several devices against one device, forward and gradient."""
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from tiny_model import batch, quick_jit, strict  # noqa: F401

from vora_jax.ops import blocked_attention, range_attention_gpu, range_attention_tpu, reference_attention
from vora_jax.ops.attention import Kernels, attention
from vora_jax.ops.ring_attention import ring_attention, shard_range, slot_order
from vora_jax.types import KeyRange

SLOTS, HEADS, KV_HEADS, HEAD_DIM = 64, 4, 2, 8


def with_options(module, **options):
    return Kernels(functools.partial(module.forward, **options), functools.partial(module.backward, **options),
                   module.refuses)


IMPLEMENTATIONS = {
    'reference': with_options(reference_attention),
    'xla': with_options(blocked_attention, query_block=8, key_block=4),  # several blocks in each shard
    'pallas_tpu': with_options(range_attention_tpu, interpret=True),
    'pallas_gpu': with_options(range_attention_gpu, interpret=True),
}


def packed(seed):
    """The key range of packed rows with images, and how many images lie across each of three borders."""
    example = batch(seed, rows=2, slots=SLOTS, patches=40)
    borders = np.arange(1, 4) * SLOTS // 4
    start, stop = example.key_range
    across = (stop[:, borders - 1] > borders) & (start[:, borders - 1] < borders)
    return example.key_range, across.sum()


def random_ranges(seed):
    """Ranges of any kind, many of them empty; stop before start is empty too."""
    rng = np.random.default_rng(seed)
    start, stop = rng.integers(0, SLOTS + 1, (2, 2, SLOTS)).astype(np.int32)
    return KeyRange(start, stop)


def tensors(seed, dtype=np.float32):
    """q, k, v and the cotangent of the output."""
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=(2, SLOTS, heads, HEAD_DIM)), dtype)
            for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]


def both_ways(attend):
    """Compiled (q, k, v, d_out, key_range) -> (out, d_q, d_k, d_v)."""
    @quick_jit
    def run(q, k, v, d_out, key_range):
        out, pull = jax.vjp(lambda *qkv: attend(*qkv, key_range), q, k, v)
        return out, *pull(d_out)
    return run


@functools.cache
def on_one_device(soft_cap):
    return both_ways(functools.partial(attention, implementation='reference', soft_cap=soft_cap))


@functools.cache
def on_shards(num_shards, split, name, soft_cap=None):
    """As `on_one_device`: slots are put into the order of the split, cut over the devices, and put back."""
    mesh = jax.make_mesh((num_shards,), ('context',), axis_types=(jax.sharding.AxisType.Auto,),
                         devices=jax.devices()[:num_shards])
    slots = P(None, 'context')
    ring = functools.partial(ring_attention, axis='context', split=split, implementation=IMPLEMENTATIONS[name],
                             soft_cap=soft_cap)
    cut = jax.shard_map(ring, mesh=mesh, in_specs=(slots, slots, slots, KeyRange(slots, slots)), out_specs=slots,
                        check_vma=False)
    run, order = both_ways(cut), slot_order(split, num_shards, SLOTS)

    def run_in_order(*arrays_and_range):
        laid_out = jax.tree.map(lambda x: x[:, order], arrays_and_range)
        return [np.asarray(x)[:, np.argsort(order)] for x in run(*laid_out)]
    return run_in_order


def agree(actual, expected, tolerance):
    for x, wanted in zip(actual, expected, strict=True):
        x, wanted = np.asarray(x, np.float64), np.asarray(wanted, np.float64)
        error = np.abs(x - wanted).max() / max(1, np.abs(wanted).max())
        assert error <= tolerance, error


# The ring is one for all implementations: the quickest goes through all of it, the others through one corner each.
QUICK = {(2, 'contiguous', 'xla'), (2, 'zigzag', 'xla'), (4, 'contiguous', 'xla'), (4, 'zigzag', 'xla'),
         (4, 'contiguous', 'reference'), (4, 'zigzag', 'pallas_tpu')}


@pytest.mark.parametrize('num_shards, split, name', [
    pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
    for case in itertools.product((2, 4), ('contiguous', 'zigzag'), IMPLEMENTATIONS)])
def test_shards_equal_one_device(num_shards, split, name):
    soft_cap = 2.0 if num_shards == 2 else None
    across = 0
    for seed in range(6):
        key_range, images = packed(seed) if seed < 4 else (random_ranges(seed), 0)
        across += images
        q, k, v, d_out = tensors(seed)
        actual = on_shards(num_shards, split, name, soft_cap)(q, k, v, d_out, key_range)
        agree(actual, on_one_device(soft_cap)(q, k, v, d_out, key_range), 2e-6)
        blind = np.asarray(key_range.stop) <= np.asarray(key_range.start)
        assert blind.any() and (actual[0][blind] == 0).all() and (actual[1][blind] == 0).all()
    assert across > 3  # borders of shards cut images


def test_one_shard_is_plain_attention():
    arrays = *tensors(0), packed(0)[0]
    agree(on_shards(1, 'contiguous', 'reference')(*arrays), on_one_device(None)(*arrays), 1e-6)


def test_bfloat16_stays_close():
    q, k, v, d_out = tensors(0, jnp.bfloat16)
    actual = on_shards(4, 'zigzag', 'reference')(q, k, v, d_out, packed(0)[0])
    assert {x.dtype for x in actual} == {jnp.dtype('bfloat16')}
    exact = on_one_device(None)(*(x.astype(jnp.float32) for x in (q, k, v, d_out)), packed(0)[0])
    agree(actual, exact, 0.02)


@pytest.mark.parametrize('split', ['contiguous', 'zigzag'])
@pytest.mark.parametrize('num_shards', [1, 2, 4])
def test_ranges_of_a_shard_count_its_slots(num_shards, split):
    key_range = random_ranges(0)
    for shard, own in enumerate(slot_order(split, num_shards, SLOTS).reshape(num_shards, -1)):
        assert (np.diff(own) > 0).all()
        local = shard_range(key_range, split, shard, num_shards, len(own))
        for actual, slots in zip(local, key_range):
            np.testing.assert_array_equal(actual, np.searchsorted(own, slots))


def test_the_drawn_example():
    key_range = KeyRange(*np.int32([[[0, 0, 5, 5]], [[1, 5, 6, 8]]]))
    drawn = {'contiguous': ([0, 1, 0, 4, 4, 4, 4, 4], [0, 0, 0, 1, 1, 2, 1, 4]),
             'zigzag': ([0, 1, 0, 2, 2, 2, 2, 4], [0, 0, 0, 3, 3, 4, 3, 4])}
    for split, shards in drawn.items():
        for shard, wanted in enumerate(shards):
            local = shard_range(key_range, split, shard, 2, 4)
            np.testing.assert_array_equal(np.stack(local, -1).reshape(-1), wanted)


def test_mistakes_raise():
    with pytest.raises(ValueError, match="no split 'striped'"):
        slot_order('striped', 2, 8)
    with pytest.raises(ValueError, match='10 slots cannot be cut into the 4 chunks of zigzag'):
        slot_order('zigzag', 2, 10)
    with pytest.raises(ValueError, match='the 5 slots of a shard are not 2 chunks of zigzag'):
        shard_range(random_ranges(0), 'zigzag', 0, 2, 5)
