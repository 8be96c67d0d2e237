"""Layer groups: grouping, order, rematerialisation."""
import dataclasses
import itertools

import jax
import numpy as np
import pytest
from tiny_model import SHORT, apply, batch, gradients, quick_jit, random_params, strict, vora  # noqa: F401

from vora_jax.nn.adapters import LowRank
from vora_jax.nn.norms import RMSNorm
from vora_jax.nn.remat import ADDED, kept
from vora_jax.nn.stack import LayerGroup, join_groups
from vora_jax.params import flatten, regroup, unflatten

ADAPTERS = (('q_proj', (LowRank(2),)),)


def test_layers_that_are_alike_share_a_group():
    layers = [LayerGroup(1, ADAPTERS, True), LayerGroup(1, ADAPTERS, True), LayerGroup(1, ADAPTERS), LayerGroup(2)]
    assert join_groups(layers) == (LayerGroup(2, ADAPTERS, True), LayerGroup(1, ADAPTERS), LayerGroup(2))
    assert vora().stage('pretrain').model.groups[0].num_layers == 2


def test_the_cut_into_groups_changes_nothing():
    example = batch()
    model = vora().stage('finetune').model
    params = random_params(model, example)
    whole = apply(model)(params, example).hidden
    sizes = (1, 3)
    cut = model.clone(groups=tuple(LayerGroup(size) for size in sizes))
    np.testing.assert_allclose(apply(cut)(regroup(params, sizes), example).hidden, whole, atol=2e-6)


def test_layers_run_in_order():
    """With output and down projections at zero a layer is the identity: all but one are, in each place."""
    example = batch()
    model = vora().stage('finetune').model
    params = random_params(model, example)

    @quick_jit
    def identity(params, batch):
        embedded = model.apply({'params': params}, batch, method='embed')
        return RMSNorm(model.llm.norm_eps).apply({'params': params['decoder']['norm']}, embedded)

    def only(kept):
        def silence(path, leaf):
            if not any(part in path for part in ('o_proj', 'down_proj')):
                return leaf
            return leaf * (np.arange(4) == kept).astype(np.float32).reshape(-1, 1, 1)
        return {path: silence(path, leaf) for path, leaf in flatten(params).items()}

    hidden = [np.asarray(apply(model)(unflatten(only(kept)), example).hidden) for kept in (-1, 0, 3)]
    np.testing.assert_allclose(hidden[0], identity(params, example), atol=1e-6)
    assert np.abs(hidden[1] - hidden[2]).max() > 0.1


@pytest.fixture(scope='module')
def kept_all():
    return loss_and_gradients('none')


def loss_and_gradients(remat):
    example = batch()
    model = vora(llm=dataclasses.replace(SHORT, remat=remat)).stage('pretrain').model
    one = np.float32(1)
    return gradients(model)(random_params(model, example), example, one, one)


SLOW = ('attention', 'adapters', 'no_mlp')  # between the other two


@pytest.mark.parametrize('remat', [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in ADDED])
def test_rematerialisation_changes_neither_loss_nor_gradients(remat, kept_all):
    (value, computed), (other, recomputed) = kept_all, loss_and_gradients(remat)
    np.testing.assert_allclose(value, other, rtol=1e-6)
    for path, gradient in flatten(computed).items():
        limit = 1e-6 * max(1.0, float(np.abs(gradient).max()))
        np.testing.assert_allclose(gradient, flatten(recomputed)[path], rtol=0, atol=limit, err_msg=path)


def test_each_policy_keeps_what_the_ones_before_it_keep():
    assert kept('full') == () and kept('adapters') == ('attention_out', 'attention_log_sum', 'taught', 'low_rank')
    policies = list(ADDED)
    for less, more in itertools.pairwise(policies):
        assert set(kept(less)) < set(kept(more))


@pytest.mark.parametrize('dtype', [np.float32, 'bfloat16'])
def test_the_norm_computes_in_float32(dtype):
    x = jax.numpy.asarray(np.random.default_rng(0).normal(size=(3, 8)) * 1e3, dtype)
    scale = np.linspace(0.5, 2, 8, dtype=np.float32)
    tolerance = 1e-6 if dtype == np.float32 else 0.01
    normed = RMSNorm(1e-6).apply({'params': {'scale': scale}}, x)
    wide = np.asarray(x, np.float64)
    expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6) * scale
    assert normed.dtype == x.dtype
    np.testing.assert_allclose(np.asarray(normed, np.float64), expected, rtol=tolerance)
