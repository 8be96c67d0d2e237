"""Attention on meshes: every kind of call, and what computes it."""
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from tiny_model import quick_jit

from vora_jax.ops.attention import attention
from vora_jax.training.config import Mesh
from vora_jax.training.mesh import attend as attend_lib
from vora_jax.training.mesh import sharding
from vora_jax.types import KeyRange, UserError

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8
# {call: (queries, keys, whether keys go round a ring of 4)}
CALLS = {
    'a row of itself': (16, 16, True),
    'slots that do not divide': (18, 18, False),
    'prompts': (16, 5, False),
    'a query for each image': (3, 16, False),
    'decoding': (1, 16, False),
    'fewer queries than keys': (8, 16, False),
}


def mesh(**sizes):
    return sharding.make_mesh(Mesh(fsdp=1, **sizes), jax.devices()[:int(np.prod([*sizes.values()]))])


def arrays(num_queries, num_keys):
    """q, k, v, the cotangent of the output, and ranges of which some are empty."""
    rng = np.random.default_rng(0)
    shapes = [(num_queries, HEADS), (num_keys, KV_HEADS), (num_keys, KV_HEADS), (num_queries, HEADS)]
    start = rng.integers(0, num_keys, (2, num_queries), np.int32)
    stop = np.minimum(start + rng.integers(0, num_keys, start.shape, np.int32), num_keys)
    return [rng.normal(size=(2, *shape, HEAD_DIM)).astype(np.float32) for shape in shapes], KeyRange(start, stop)


def both_ways(attend):
    @quick_jit
    def run(q, k, v, d_out, key_range):
        out, pull = jax.vjp(lambda *qkv: attend(*qkv, key_range, soft_cap=3.0), q, k, v)
        return out, *pull(d_out)
    return run


@pytest.mark.parametrize('call', CALLS)
def test_every_call_equals_one_device(call):
    num_queries, num_keys, ring = CALLS[call]
    on = mesh(context=4, tensor=2)
    tensors, key_range = arrays(num_queries, num_keys)
    assert attend_lib.cut_attention(on, *tensors[:3], 'auto').ring == ring
    with sharding.use(on):
        actual = both_ways(attend_lib.make_attend(on, 'xla'))(*tensors, key_range)
    expected = both_ways(functools.partial(attention, implementation='reference'))(*tensors, key_range)
    for x, wanted in zip(actual, expected, strict=True):
        np.testing.assert_allclose(x, wanted, atol=1e-5)


def shapes(num_slots, heads=HEADS):
    return [jax.ShapeDtypeStruct((8, num_slots, n, 64), jnp.dtype('bfloat16')) for n in (heads, KV_HEADS, KV_HEADS)]


def test_auto_goes_by_what_a_shard_holds():
    for sizes, wanted in (({'data': 1}, 'xla'), ({'data': 2}, 'xla'), ({'context': 2}, 'reference')):
        assert attend_lib.cut_attention(mesh(**sizes), *shapes(256), 'auto').choice.implementation == wanted


class FakeDevice(types.SimpleNamespace):
    __hash__ = object.__hash__


def fake_mesh(**of_each):
    """A mesh of two devices on each of data and tensor, which no program can run on."""
    devices = [FakeDevice(id=i, device_kind='fake', **{name: value(i) for name, value in of_each.items()}) for i in range(4)]
    return jax.sharding.Mesh(np.array(devices).reshape(2, 1, 1, 2), sharding.AXES)


def test_auto_goes_by_the_devices_of_the_mesh():
    for platform, kernel in (('tpu', 'pallas_tpu'), ('cpu', 'xla')):
        on = fake_mesh(platform=lambda _, platform=platform: platform)
        assert attend_lib.cut_attention(on, *shapes(2048), 'auto').choice.implementation == kernel


def test_what_cannot_be_served_is_told():
    with pytest.raises(UserError, match=r"Train.attention = 'pallas_tpu': .* platform cpu\. Choose auto"):
        attend_lib.cut_attention(mesh(data=1), *shapes(512), 'pallas_tpu')
    with pytest.raises(UserError, match='Mesh.tensor = 4 does not divide the 2 key/value heads'):
        attend_lib.cut_attention(mesh(tensor=4), *shapes(512), 'auto')
    wide = [jax.ShapeDtypeStruct(x.shape, jnp.dtype('float64')) for x in shapes(512)]
    with pytest.raises(UserError, match="Train.attention = 'xla': .*float64"):
        attend_lib.cut_attention(mesh(data=1), *wide, 'xla')


def test_a_call_may_ask_for_its_own():
    tensors, key_range = arrays(16, 16)
    attend = attend_lib.make_attend(mesh(data=1), 'xla')
    text = [str(jax.make_jaxpr(functools.partial(attend, **options))(*tensors[:3], key_range))
            for options in ({}, {'implementation': 'xla'}, {'implementation': 'reference'})]
    assert text[0] == text[1] != text[2]


def test_the_language_model_is_told_about():
    model, batch = tiny_run.vora().stage('pretrain').model, tiny_run.batch()
    assert attend_lib.language_attention(model, batch, mesh(data=1), 'auto') == 'reference (32 keys are one tile)'
    told = attend_lib.language_attention(model, batch, mesh(context=4), 'xla')
    assert told == 'xla (asked for), keys in a ring of 4 devices'
    assert attend_lib.language_attention(object(), batch, mesh(data=1), 'auto') == ''
