"""Parameter trees: partition, combine, regroup."""
import numpy as np
import pytest
from tiny_model import batch, random_params, vora, without

from vora_jax.params import check_patterns, combine, count, flatten, partition, regroup, unflatten
from vora_jax.types import UserError


@pytest.fixture(scope='module')
def params():
    return random_params(vora(num_adapted_layers=3).stage('pretrain').model, batch())


def equal(a, b):
    a, b = flatten(a), flatten(b)
    return a.keys() == b.keys() and all(np.array_equal(a[path], b[path]) for path in a)


def test_flat_paths_and_back(params):
    flat = flatten(params)
    assert flat['decoder/layers/group_0/block/q_proj/adapter_0/a'].shape == (2, 16, 4)
    assert list(flat) == sorted(flat)
    assert equal(unflatten(flat), params)


def test_trainable_and_frozen_share_nothing_and_make_the_whole(params):
    stage = vora(num_adapted_layers=3).stage('pretrain')
    trainable, frozen = partition(params, stage.trainable)
    assert not flatten(trainable).keys() & flatten(frozen).keys()
    assert equal(combine(trainable, frozen), params) and equal(combine(frozen, trainable), params)
    assert count(trainable) + count(frozen) == count(params)
    assert all(path.startswith('frontend/') or '/adapter_0/' in path or '/side/' in path
               for path in flatten(trainable))
    assert not any('adapter' in path or '/side/' in path for path in flatten(frozen))
    assert {path.split('/')[0] for path in flatten(frozen)} == {'decoder', 'teacher'}


def test_a_pattern_that_matches_nothing_is_told(params):
    with pytest.raises(UserError, match=r"trainable: the pattern '\*/adaptor_\*' matches no parameter"):
        partition(params, ('frontend/*', '*/adaptor_*'))
    with pytest.raises(UserError, match="lr_multipliers: the pattern 'x'"):
        check_patterns(params, ('x',), 'lr_multipliers')


def test_a_leaf_in_two_parts_raises(params):
    with pytest.raises(ValueError, match='decoder/embedding stands in two parts'):
        combine({'decoder': {'embedding': 1}}, {'decoder': {'embedding': 2, 'norm': 3}})


@pytest.mark.parametrize('sizes', [(4,), (1, 3), (1, 1, 1, 1), (3, 1)])
def test_layers_are_cut_anew_in_their_order(params, sizes):
    def kernels(tree, num_groups):
        return [flatten(tree)[f'decoder/layers/group_{i}/block/q_proj/kernel'] for i in range(num_groups)]
    base = without(params, '/side/', 'adapter')
    cut = regroup(base, sizes)
    assert [len(kernel) for kernel in kernels(cut, len(sizes))] == list(sizes)
    np.testing.assert_array_equal(np.concatenate(kernels(cut, len(sizes))), np.concatenate(kernels(base, 3)))
    assert count(cut) == count(base)
    assert equal(regroup(cut, (2, 1, 1)), base)


def test_leaves_that_only_some_layers_have_are_left_out(params):
    flat = flatten(regroup(params, (3, 1)))
    assert 'decoder/layers/group_0/block/q_proj/adapter_0/a' in flat  # layers 0 to 2 have one
    assert not any('/side/' in path for path in flat)  # layer 2 has no head
    assert not any('adapter' in path for path in flatten(regroup(params, (4,))))


def test_another_number_of_layers_is_told(params):
    with pytest.raises(UserError, match='a stack of 4 layers does not fit a model of 5 layers'):
        regroup(params, (2, 3))
