"""What a chip holds, and the least it sends."""
import dataclasses

import jax
import numpy as np
import pytest
import tiny_hlo
import tiny_methods

from vora_jax.params import flatten
from vora_jax.planning import memory
from vora_jax.planning.facts import largest
from vora_jax.planning.traffic import least_traffic
from vora_jax.planning.unplaced import held_on, parameter_shapes
from vora_jax.training import program
from vora_jax.training.config import Mesh, Optimizer
from vora_jax.training.mesh import sharding

GIB = 2**30


def test_what_the_compiler_writes_down():
    assert memory.peak_bytes(tiny_hlo.REPORT) == 35751199232
    assert memory.peak_bytes('') is None
    told = 'Ran out of memory in memory space hbm. Used 33.29G of 15.75G hbm. Exceeded hbm capacity by 17.55G.'
    assert memory.exceeded(told) == pytest.approx((33.29 * GIB, 15.75 * GIB))
    told = 'the total memory required for HLO temporaries (3.5T) exceeds available HBM (512M).'
    assert memory.exceeded(told) == pytest.approx((3.5 * 1024 * GIB, GIB / 2))
    assert memory.exceeded('out of luck') is None


def test_buffers_of_one_shape_at_the_same_time():
    """Two places in use from 11 to 12: copy.3 while copy.2, which took while.1's place, is still read."""
    assert memory.live_at_once(tiny_hlo.ASSIGNMENT, tiny_hlo.LIVE, (2, 3, 4, 2)) == 2
    assert memory.live_at_once(tiny_hlo.ASSIGNMENT, tiny_hlo.LIVE.replace('copy.3{}:11', 'copy.3{}:13'), (2, 3, 4, 2)) == 1
    assert memory.live_at_once(tiny_hlo.ASSIGNMENT, tiny_hlo.LIVE, (2, 3, 4)) == 0


def test_the_largest_buffers():
    program = ('  %copy.2 = bf16[2,3,4,2]{3,2,1,0} copy(%x), metadata={op_name="jit(step)/a/b"}\n'
               '  %while.1 = (s32[], f32[16]{0}) while(%t), condition=%c, body=%b\n')
    first, second = largest(tiny_hlo.LIVE, program)
    assert first == ('copy.2', 96, 'bf16[2,3,4,2]', 'jit(step)/a/b')
    assert second == ('while.1', 64, 'f32[16]', '')


def config_of(name, tmp=None, **changes):
    """A `Train` of a tiny method."""
    from vora_jax.data.config import Data, Source
    from vora_jax.training.config import Train
    method, stage = tiny_methods.METHODS[name]
    data = Data((Source('nowhere'), Source('elsewhere')), 'nowhere', max_slots=40, max_patches=27, max_images=4)
    config = Train(method, data, stage, 1, 16, optimizer=Optimizer(), mesh=Mesh(data=2, fsdp=4))
    return dataclasses.replace(config, **changes)


@pytest.mark.parametrize('name', ['vora', 'lavin'])
def test_parts_are_what_devices_of_this_machine_hold(name):
    """Every array is made on eight devices; the bytes of the first are added up."""
    from vora_jax.planning.abstract_batch import batch_shapes
    config = config_of(name)
    mesh = sharding.make_mesh(config.mesh)
    with sharding.use(mesh):
        plan = program.build(config, batch_shapes(config), mesh).plan
    arrays = memory.held(plan)
    parts = memory.part_bytes(arrays, mesh.shape)

    def on_first(tree):
        made = [jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding) for leaf in jax.tree.leaves(tree)]
        return sum(array.addressable_shards[0].data.nbytes for array in made)

    frozen = flatten(plan.frozen)
    assert parts['trainable'] == on_first(plan.state.trainable) and parts['optimizer'] == on_first(plan.state.opt_state)
    assert parts['teacher'] == on_first({path: leaf for path, leaf in frozen.items() if path.startswith('teacher/')})
    assert parts['frozen'] == on_first({path: leaf for path, leaf in frozen.items() if not path.startswith('teacher/')})
    assert (parts['teacher'] > 0) == (name == 'vora')
    if name == 'vora':
        layers, rows, tokens, width = memory.stack_dims(plan, mesh.shape)
        assert (rows, tokens) == (2, plan.batch.vision_slot.shape[1])
        assert (layers, width) == (len(plan.model.distillation.layers), plan.model.distillation.teacher.width)
    else:
        assert memory.stack_dims(plan, mesh.shape) is None


def test_without_devices_it_is_the_same():
    """But for the optimizer's counts."""
    from vora_jax.planning.abstract_batch import batch_shapes
    config = config_of('vora')
    mesh = sharding.make_mesh(config.mesh)
    with sharding.use(mesh):
        plan = program.build(config, batch_shapes(config), mesh).plan
    placed = memory.part_bytes(memory.held(plan), mesh.shape)
    alone = memory.part_bytes(held_on(config, parameter_shapes(config), dict(mesh.shape), 'compiler'), mesh.shape)
    assert {**alone, 'optimizer': 0} == {**placed, 'optimizer': 0}
    assert 0 <= placed['optimizer'] - alone['optimizer'] < 100


def test_the_least_traffic_by_hand():
    mesh = {'data': 2, 'fsdp': 4, 'context': 1, 'tensor': 2}

    def one(part, path, shape, itemsize, *axes):
        return memory.Held(part, path, shape, itemsize, axes)

    arrays = [
        one('frozen', 'decoder/layers/group_0/block/q_proj/kernel', (3, 8, 16), 2, (), ('fsdp',), ('tensor',)),  # twice
        one('trainable', 'decoder/layers/group_0/block/q_proj/adapter_0/a', (3, 8, 4), 4, (), ('fsdp',)),  # twice
        one('optimizer', '.mu', (3, 8, 4), 4, (), ('fsdp',)),
        one('frozen', 'decoder/embedding', (32, 8), 2, ('tensor',), ('fsdp',)),  # never
        one('frozen', 'decoder/lm_head', (8, 32), 2, ('fsdp',)),  # once
        one('frozen', 'frontend/encoder/blocks/kernel', (8, 8), 2, ('fsdp',)),  # once: nothing in it is trained
        one('teacher', 'teacher/blocks/kernel', (4, 4), 4, ('fsdp',)),  # once, in two bytes
        one('trainable', 'frontend/projector_0/bias', (8,), 4),  # whole everywhere
    ]
    least = least_traffic(arrays, mesh, itemsize=2, accumulation=3)
    gather = 2 * 3 * 8 * 8 * 2 + 2 * 3 * 8 * 4 * 2 + 8 * 32 * 2 + 8 * 8 * 2 + 4 * 4 * 2
    assert least.gather == 3 * gather
    assert least.scatter == 3 * 3 * 8 * 4 * 2
    # Over data the shard of the gradient is summed once; what is whole everywhere over data x fsdp.
    shard, bias = 3 * 2 * 4 * 2, 8 * 2
    assert least.reduce == shard + bias
    assert least.wire == pytest.approx((least.gather + least.scatter) * 3 / 4 + 2 * shard / 2 + 2 * bias * 7 / 8)
    assert least_traffic(arrays, dict.fromkeys(mesh, 1), 2, 1) == (0, 0, 0, 0)
