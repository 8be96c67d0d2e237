"""What devices send each other, read from programs."""
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_hlo
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from vora_jax.planning import hlo
from vora_jax.planning.collectives import Collective, collectives, wire_bytes


def test_every_trap_of_a_program_for_tpus():
    found = collectives(tiny_hlo.TPU, tiny_hlo.MESH, data_loops=7)
    expected = [
        Collective('reduce-scatter', 'f32', ('fsdp',), 4, 3 * 16 * 32 * 4, 1, 3),
        Collective('all-gather', 'bf16', ('fsdp',), 4, 3 * 16 * 32 * 2, 1, 3),
        Collective('all-reduce', 'f32', ('data', 'fsdp'), 8, 7 * 64 * 4, 1, 7, data_dependent=True),
        Collective('all-gather', 'bf16', ('fsdp',), 4, 16 * 32 * 2, 1, 1, asynchronous=True),
        Collective('collective-permute', 'f32', ('fsdp',), 2, 400, 1, 1),
        Collective('all-reduce', 'f32', ('fsdp',), 4, 64 * 4, 1, 1),
        Collective('all-reduce', 'bf16', ('fsdp',), 4, 64 * 2, 1, 1, emulates_gather=True),
        Collective('send', 'f32', ('slices',), 2, 100, 1, 1, asynchronous=True),
        Collective('all-gather', 'f32', ('fsdp',), 4, 8 * 4 + 4 * 4, 1, 1, asynchronous=True),
        Collective('all-reduce', 'f32', ('data',), 2, 40, 1, 1),
    ]
    assert sorted(found) == sorted(expected)
    assert [one.bytes for one in found] == sorted((one.bytes for one in found), reverse=True)
    within, between = wire_bytes(found)
    assert between == 100
    assert within == pytest.approx({4: (6144 + 3072 + 1024 + 48) * 3 / 4 + 2 * (256 + 128) * 3 / 4, 8: 2 * 1792 * 7 / 8,
                                    2: 400 + 2 * 40 / 2})


@pytest.mark.parametrize('groups, axes', [
    ('{{0,4},{1,5},{2,6},{3,7}}', ('data',)),
    ('[4,2]<=[2,4]T(1,0)', ('data',)),
    ('[1,8]<=[8]', ('data', 'fsdp')),
    ("mesh['x'=2,'y'=4] {'x','y'}", ('data', 'fsdp')),
    ("mesh['x'=8] {'x':(2)4}", ('fsdp',)),
    ("mesh['x'=8] {'x':(1)2}", ('data',)),
    ("mesh['x'=4,'y'=2], device_ids=([2,4]T(1,0)) {'x'}", ('fsdp',)),
    ('{}', ('data', 'fsdp')),
])
def test_groups_in_every_notation(groups, axes):
    text = ('ENTRY %main (p: f32[4]) -> f32[4] {\n  %p = f32[4]{0} parameter(0)\n'
            f'  ROOT %r = f32[4]{{0}} all-reduce(%p), replica_groups={groups}, to_apply=%add\n}}\n')
    one, = collectives(text, tiny_hlo.MESH)
    assert one.axes == axes and one.group == {('data',): 2, ('fsdp',): 4}.get(axes, 8)


def test_a_loop_that_states_its_length():
    text = tiny_hlo.TPU.replace('body=%data_body', 'body=%data_body, backend_config={"known_trip_count":{"n":"5"}}')
    found = {one.runs for one in collectives(text, tiny_hlo.MESH, 7) if one.dtype == 'f32' and one.group == 8}
    assert found == {5}


def test_text_that_is_no_program():
    with pytest.raises(ValueError, match='no ENTRY'):
        hlo.read('what?')


@pytest.mark.parametrize('data, fsdp', [(2, 4), (1, 8), (8, 1)])
def test_a_program_of_this_machine(data, fsdp):
    """Layers of random sizes in a scan, weights cut over fsdp, gathered by hand: known traffic, forward and backward."""
    rng = np.random.default_rng(data)
    layers, width, rows = int(rng.integers(2, 5)), 8 * int(rng.integers(2, 5)), 16
    sizes = {'data': data, 'fsdp': fsdp}
    mesh = jax.make_mesh((data, fsdp), ('data', 'fsdp'), axis_types=(AxisType.Auto,) * 2)

    def local(w, x):
        def layer(x, w):
            return jnp.tanh(x @ jax.lax.all_gather(w, 'fsdp', axis=0, tiled=True)), None
        return jax.grad(lambda w: jax.lax.scan(jax.checkpoint(layer, prevent_cse=False), x, w)[0].sum())(w)

    step = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(P(None, 'fsdp'), P(('data', 'fsdp'))),
                                 out_specs=P(None, 'fsdp'), check_vma=False))
    shapes = [jax.ShapeDtypeStruct((layers, width, width), 'float32', sharding=NamedSharding(mesh, P(None, 'fsdp'))),
              jax.ShapeDtypeStruct((rows, width), 'float32', sharding=NamedSharding(mesh, P(('data', 'fsdp'))))]
    found = collectives(step.lower(*shapes).compile().as_text(), sizes)
    whole = layers * width * width * 4
    if fsdp == 1:
        assert not found
        return
    by_kind = {one.kind: one for one in found}
    assert by_kind['all-gather'].bytes == 2 * whole and by_kind['all-gather'].runs == 2 * layers
    assert by_kind['reduce-scatter'].bytes == whole and set(by_kind) == {'all-gather', 'reduce-scatter'}
    assert {one.axes for one in found} == {('fsdp',)}


def test_an_instruction_with_brackets_everywhere():
    line = ('  ROOT %x.1 = (f32[2,3]{1,0:T(8,128)(2,1)S(1)}, /*index=1*/s32[]{:T(128)}) fusion(%a, '
            'f32[4]{0} %b, /*index=2*/%c), kind=kLoop, calls=%called.5, metadata={op_name="jit(step)/f(x)"}')
    program = hlo.read('ENTRY %main (a: f32[]) -> f32[] {\n' + line + '\n}\n')
    one, = program.computations['main']
    assert one.name == 'x.1' and one.opcode == 'fusion' and one.operands == ('a', 'b', 'c') and one.is_root and one.is_tuple
    assert one.shapes == (hlo.Shape('f32', (2, 3)), hlo.Shape('s32', ())) and one.called == ('called.5',)
    assert [shape.bytes for shape in one.shapes] == [24, 4] and not re.search('index=', ''.join(one.operands))


@pytest.mark.parametrize('kind, types, operands, size', [
    ('reduce-scatter', '((f32[16]), f32[4])', '%p', 16 * 4),
    ('reduce-scatter', '((f32[16], f32[8]), (f32[4], f32[2]))', '%p, %q', 24 * 4),
    ('all-to-all', '((f32[16]), f32[16], u32[])', '%p', 16 * 4),
    ('all-gather', '(f32[4], f32[16])', '%p', 16 * 4),
    ('all-reduce', 'f32[16]', '%p', 16 * 4),
    ('all-reduce', '(f32[16], f32[8])', '%p, %q', 24 * 4),
    ('collective-permute', '(f32[16], f32[16], u32[], u32[])', '%p', 16 * 4),
])
def test_of_what_is_started_the_results_count(kind, types, operands, size):
    between = 'source_target_pairs={{0,1},{1,0}}' if kind == 'collective-permute' else 'replica_groups=[2,4]<=[8]'
    text = ('ENTRY %main (p: f32[16]) -> f32[4] {\n  %p = f32[16]{0} parameter(0)\n  %q = f32[8]{0} parameter(1)\n'
            f'  ROOT %r = {types} {kind}-start({operands}), {between}\n}}\n')
    one, = collectives(text, tiny_hlo.MESH)
    assert (one.kind, one.bytes, one.asynchronous) == (kind, size, True)
