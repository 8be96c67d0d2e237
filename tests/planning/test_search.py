"""What is tried, what is left out, and what to change."""
import dataclasses
import math

import pytest
import test_plan_memory

from vora_jax.planning import advice, kept, search
from vora_jax.planning.child import Finished
from vora_jax.planning.facts import Facts
from vora_jax.planning.topology import Topology, larger, parse
from vora_jax.types import UserError

COSTS = {'full': 4.0, 'attention': 3.5, 'adapters': 3.4, 'no_mlp': 3.3, 'matmuls': 3.1, 'none': 3.0}


def facts_of(peak, mesh=None, parts=0):
    mesh = mesh or {'data': 1, 'fsdp': 8, 'context': 1, 'tensor': 1}
    return Facts(mesh, 'xla', (), {'frozen': parts}, peak, None, 0, 0, (), (), 0, True, 10, Finished(1.0, 1.0, 1, False))


def need_of(candidate):
    """Bytes in an invented world: kept activations by remat, fewer with accumulation and with fsdp."""
    found = 1 + kept.REMATS.index(candidate.remat)
    return 100 / candidate.sizes['fsdp'] + 10 * found / candidate.accumulation


def bound_of(candidate, facts):
    wire = candidate.accumulation * (2 if candidate.gather == 'two_hop' else 3)
    return max(COSTS[candidate.remat], wire) * (1.0 if facts is None else 1.1)


def with_remat(config, remat):
    """The configuration with another `LanguageModel.remat`."""
    stage = config.method.stage(config.stage)
    model = stage.model.clone(llm=dataclasses.replace(stage.model.llm, remat=remat))
    stages = config.method.stages | {config.stage: dataclasses.replace(stage, model=model)}
    return dataclasses.replace(config, method=dataclasses.replace(config.method, stages=stages))


def run(usable, most=100, compile_one=None, **options):
    every = list(search.candidates(8, 1, 32, kept.REMATS, 1))
    compiled = []

    def compiles(candidate):
        compiled.append(candidate)
        return facts_of(int(need_of(candidate) * 1.5))

    found = search.search(every, need_of, usable, bound_of, compile_one or compiles, most, UserError, **options)
    return every, compiled, found


def test_candidates_divide_the_devices_and_the_rows():
    every = list(search.candidates(16, 2, 96, ['full'], 2, [1, 2]))
    assert len(set(every)) == len(every)
    for one in every:
        sizes = one.sizes
        assert math.prod(sizes.values()) == 16 and sizes['context'] == 2 and sizes['data'] % 2 == 0
        assert 96 % (sizes['data'] * sizes['fsdp'] * one.accumulation) == 0
    assert {one.sizes['tensor'] for one in every} == {1, 2}
    assert {one.gather for one in every} == {'compiler'}  # two hops are for data x fsdp alone
    assert {one.gather for one in search.candidates(8, 1, 8, ['full'], 1)} == {'compiler', 'two_hop'}
    assert not list(search.candidates(8, 1, 12, ['full'], 1))


def test_flags_and_bindings():
    one = search.Candidate((('data', 2), ('fsdp', 4)), 'two_hop', 'full', 2)
    assert one.flags == ('--gin.Mesh.data=2', '--gin.Mesh.fsdp=4', '--gin.LanguageModel.remat=full',
                         '--gin.Mesh.gather=two_hop', '--gin.Train.accumulation=2')
    assert one.bindings == tuple(flag.removeprefix('--gin.') for flag in one.flags)
    assert one._replace(remat='').flags == tuple(flag for flag in one.flags if 'remat' not in flag)


def test_the_best_of_all_is_found_with_few_compilations():
    every, compiled, found = run(usable=60)
    fitting = [one for one in every if need_of(one) * 1.5 <= 60]
    assert found[0].fits and found[0].seconds == min(bound_of(one, True) for one in fitting)
    assert len(compiled) < len(every) / 4 and len(set(compiled)) == len(compiled)
    assert [one.fits for one in found] == sorted((one.fits for one in found), reverse=True)
    failed = [one.candidate for one in found if not one.fits]
    for one in compiled:  # nothing was compiled that needs more than what had failed before
        before = [other for other in failed if compiled.index(other) < compiled.index(one)]
        assert not any(other.mesh == one.mesh and other.gather == one.gather and other.accumulation >= one.accumulation
                       and kept.REMATS.index(other.remat) <= kept.REMATS.index(one.remat) for other in before)


def test_nothing_fits_limits_mistakes_and_ctrl_c():
    assert run(usable=1)[1:] == ([], [])
    assert len(run(usable=60, most=2)[1]) == 2

    def refuses(candidate):
        raise UserError('Mesh: no.')

    *_, found = run(60, 3, refuses)
    assert [one.why for one in found] == ['Mesh: no.'] * 3 and not any(one.fits for one in found)
    calls = []

    def interrupted(candidate):
        calls.append(candidate)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return facts_of(10)

    told = []
    *_, found = run(60, 9, interrupted, told=told.append)
    assert len(found) == len(told) == 1 and found[0].candidate == calls[0]


def test_the_lower_bound_of_memory():
    config = test_plan_memory.config_of('vora')
    from vora_jax.planning.memory import part_bytes
    from vora_jax.planning.unplaced import held_on, parameter_shapes
    mesh = {'data': 2, 'fsdp': 4, 'context': 1, 'tensor': 1}
    arrays = held_on(config, parameter_shapes(config), mesh, 'compiler')
    parts = part_bytes(arrays, mesh)
    one = search.Candidate(tuple(mesh.items()), 'compiler', 'full', 2)
    expected = sum(parts.values()) + 2 * parts['trainable'] + 1000.0
    assert search.least_bytes(one, arrays, 16, 1000.0) == expected
    assert search.least_bytes(one._replace(accumulation=1), arrays, 16, 1000.0) == expected - parts['trainable'] + 1000.0


def test_changes_from_the_cheapest_on():
    config = with_remat(test_plan_memory.config_of('vora'), 'adapters')
    assert kept.remat_of(config) == 'adapters'
    facts = facts_of(10**6, {'data': 2, 'fsdp': 4, 'context': 1, 'tensor': 1}, parts=600_000)
    found = advice.changes(config, facts, Topology('v5e', (2, 4)))
    assert [one.flags for one in found] == [
        ('--gin.LanguageModel.remat=attention',), ('--gin.LanguageModel.remat=full',),
        ('--gin.Mesh.data=1', '--gin.Mesh.fsdp=8'), ('--gin.Train.accumulation=2',), ('--topology', 'v5e:4x4')]
    saved = [10**6 - one.peak_bytes for one in found[:2]]
    llm = config.method.stage(config.stage).model.llm
    assert saved[1] - saved[0] == 2 * 40 * llm.num_layers * llm.num_heads * llm.head_dim * 4  # 2 rows, 40 slots, float32
    assert 0 < saved[0] < saved[1] and [one.peak_bytes for one in found[2:]] == [400_000, 800_000, 500_000]
    assert advice.first_that_fits(found, 10**6) == found[0] and advice.first_that_fits(found, 850_000) == found[2]
    assert advice.first_that_fits(found[3:], 550_000) == found[4] and advice.first_that_fits(found, 10) is None


def test_each_policy_keeps_more_than_the_one_before():
    config = test_plan_memory.config_of('vora')
    sizes = [kept.row_bytes(config, remat) for remat in kept.REMATS]
    assert sizes == sorted(set(sizes)) and kept.REMATS[0] == 'full' and kept.REMATS[-1] == 'none'
    model = config.method.stage(config.stage).model
    llm, teacher = model.llm, model.distillation
    states = llm.num_layers * 40 * llm.width
    features = len(teacher.layers) * 27 * teacher.teacher.width
    assert sizes[0] == 4 * (states + features)


def test_what_cannot_be_changed_is_not_proposed():
    config = with_remat(dataclasses.replace(test_plan_memory.config_of('vora'), batch_rows=8), 'full')
    found = advice.changes(config, facts_of(100), Topology('v5e', (2, 4), 1))
    assert [one.flags for one in found] == [('--topology', 'v5e:4x4')] and 'at least 16' in found[0].costs


def test_topologies():
    assert parse('V5P:8x8x8', 2) == Topology('v5p', (8, 8, 8), 2) and parse('v5p:8x8x8').name == 'v5p:8x8x8'
    assert str(parse('v5e:2x4', 3)) == '3 slices of v5e:2x4' and parse('h100:8').platform == 'cuda'
    assert larger(Topology('v5p', (4, 4, 4))).name == 'v5p:4x4x8' and larger(Topology('v5e', (4, 2))).name == 'v5e:4x4'
    assert parse('v4:2x2x1').chip.usable_bytes == 15.25 * 2**30 and parse('v5e:8x8').chip.usable_bytes == 15.75 * 2**30
    for text, slices, told in [('v5e', 1, 'CHIP:SHAPE'), ('v9:2x2', 1, "no chip 'v9'"), ('v5e:2x3', 1, 'whole hosts'),
                               ('v5e:1x1', 1, 'whole hosts'), ('v5p:2x2', 1, 'not a shape of v5p'),
                               ('v5e:2x2', 0, '--slices'), ('h100:8', 2, 'no slices'), ('v5e:axb', 1, 'not a shape')]:
        with pytest.raises(UserError, match=told):
            parse(text, slices)
