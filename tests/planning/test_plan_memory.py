"""What a chip holds, and the least it sends."""
import dataclasses
import json

import jax
import numpy as np
import pytest
import tiny_hlo
import tiny_methods

from vora_jax.params import flatten
from vora_jax.planning import memory, work
from vora_jax.planning.child import Finished
from vora_jax.planning.facts import facts, largest
from vora_jax.planning.traffic import least_traffic, uses
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
    def most(live=tiny_hlo.LIVE, dims=(2, 3, 4, 2), itemsize=2, program=tiny_hlo.MAKERS):
        return memory.live_at_once(tiny_hlo.ASSIGNMENT, live, dims, itemsize, program)

    assert most() == 2
    assert most(tiny_hlo.LIVE.replace('copy.3{}:11', 'copy.3{}:13')) == 1
    # Unknown: no such dimensions, no such dtype, nothing that the teacher's blocks made.
    assert most(dims=(2, 3, 4)) is most(itemsize=4) is most(program=tiny_hlo.MAKERS.replace('teacher/', 'student/')) is None


@pytest.mark.parametrize('missing', ['', 'memory-usage-report.txt', 'live-range.txt'])
def test_both_ways_to_compile_tell_what_is_assigned(missing, tmp_path):
    """The total of the report, with or without what `memory_analysis` says; a report that is missing is told."""
    (tmp_path / 'dump').mkdir()
    for ending, text in {'optimizations.txt': tiny_hlo.TPU, 'memory-usage-report.txt': tiny_hlo.REPORT,
                         'live-range.txt': tiny_hlo.LIVE}.items():
        if ending != missing:
            (tmp_path / 'dump' / f'module_0000.jit_step.after_{ending}').write_text(text)
    (tmp_path / 'errors.txt').write_text('')
    plan = {'platform': 'tpu', 'mesh': tiny_hlo.MESH, 'devices': 8, 'held': [], 'stack': [2, 3, 4, 2], 'attention': 'x'}
    (tmp_path / 'plan.json').write_text(json.dumps(plan))
    found = []
    for complete in (False, True):
        if complete:
            (tmp_path / 'result.json').write_text('{"peak_bytes": 5}')
        if missing:
            with pytest.raises(RuntimeError, match=f'no .*{missing}'):
                facts(tmp_path, Finished(1.0, 1.0, 1, complete), 1, 2)
            continue
        found.append(facts(tmp_path, Finished(1.0, 1.0, 1, complete), 1, 2))
        assert found[-1].peak_bytes == found[-1].working_bytes == 35751199232 and found[-1].stacks is None
    assert len(found) == (0 if missing else 2)


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
    assert least.groups == pytest.approx({4: (least.gather + least.scatter) * 3 / 4, 2: shard, 8: 2 * bias * 7 / 8})
    assert least.wire == pytest.approx(sum(least.groups.values()))
    assert least_traffic(arrays, dict.fromkeys(mesh, 1), 2, 1) == (0, 0, 0, 0, {})
    # With the slots of a row on 5 devices their gradients are summed, too.
    longer = least_traffic(arrays, mesh | {'context': 5}, itemsize=2, accumulation=3)
    assert longer.groups == pytest.approx({4: least.groups[4], 10: 2 * shard * 9 / 10, 40: 2 * bias * 39 / 40})
    # A table that is the head, too, is gathered once a micro-batch, cut over tensor as it is.
    tied = least_traffic([one for one in arrays if one.path != 'decoder/lm_head'], mesh, itemsize=2, accumulation=3)
    assert least.gather - tied.gather == 3 * (8 * 32 * 2 - 32 * 8 * 2 / 2)


def test_how_often_weights_are_used():
    """The backward pass needs what lies above something trained."""
    def times(path, *trained, part='frozen', tied=False):
        return uses(memory.Held(part, path, (2,), 2, ()), frozenset(trained), tied)

    low, high = (f'decoder/layers/group_{i}/block/q_proj/kernel' for i in (0, 1))
    assert [times(path, 'decoder/layers/group_1/block/q_proj/adapter_0/a') for path in (low, high)] == [1, 2]
    assert [times(path, 'frontend/projector_0/kernel') for path in (low, high)] == [2, 2]
    assert [times(path, 'decoder/lm_head', 'decoder/layers/group_0/side/kernel') for path in (low, high)] == [1, 1]
    assert times('frontend/encoder/blocks/kernel', low) == 1
    assert times('frontend/encoder/blocks/kernel', 'frontend/encoder/blocks/kernel') == 2
    assert times('teacher/blocks/kernel', low, part='teacher') == times('decoder/lm_head', low) == 1
    assert [times('decoder/embedding', low, tied=tied) for tied in (False, True)] == [0, 1]


def test_bytes_of_hbm_count_each_pass_once():
    """Frozen weights of a row of one slot a device, in float32: written and read in 3 passes, the teacher's in 1, the
    table's in none."""
    config = config_of('vora')
    sizes = dict.fromkeys(('data', 'fsdp', 'context', 'tensor'), 1)

    def moved(path, part):
        return work._hbm_bytes(config, [memory.Held(part, path, (1000,), 4, ())] + [head, trained], sizes, 'full')

    head = memory.Held('frozen', 'decoder/lm_head', (0,), 4, ())
    trained = memory.Held('trainable', 'frontend/out_proj', (0,), 4, ())
    table = moved('decoder/embedding', 'frozen')
    assert moved('teacher/blocks/kernel', 'teacher') - table == 2 * 4000 * config.accumulation
    assert moved('decoder/layers/group_0/block/up_proj/kernel', 'frozen') - table == 3 * 2 * 4000 * config.accumulation
