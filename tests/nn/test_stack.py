"""Layer groups: grouping, order, rematerialisation."""
import dataclasses

import jax
import numpy as np
import pytest
from tiny_model import LLM, apply, batch, quick_jit, random_params, strict, vora  # noqa: F401

from vora_jax.nn.adapters import LowRank
from vora_jax.nn.norms import RMSNorm
from vora_jax.nn.stack import LayerGroup, group_layers
from vora_jax.ops.cross_entropy import cross_entropy_sum
from vora_jax.params import flatten, regroup, unflatten

ADAPTERS = (('q_proj', (LowRank(2),)),)


def test_layers_that_are_alike_share_a_group():
    layers = [(ADAPTERS, True), (ADAPTERS, True), (ADAPTERS, False), ((), False), ((), False)]
    assert group_layers(layers) == (LayerGroup(2, ADAPTERS, True), LayerGroup(1, ADAPTERS), LayerGroup(2))
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
    embedded = model.apply({'params': params}, example, method='embed')

    def only(kept):
        def silence(path, leaf):
            if not any(part in path for part in ('o_proj', 'down_proj')):
                return leaf
            return leaf * (np.arange(4) == kept).astype(np.float32).reshape(-1, 1, 1)
        return {path: silence(path, leaf) for path, leaf in flatten(params).items()}

    hidden = [np.asarray(apply(model)(unflatten(only(kept)), example).hidden) for kept in (-1, 0, 3)]
    norm = RMSNorm(LLM.norm_eps).apply({'params': params['decoder']['norm']}, embedded)
    np.testing.assert_allclose(hidden[0], norm, atol=1e-6)
    assert np.abs(hidden[1] - hidden[2]).max() > 0.1


def test_rematerialisation_changes_neither_loss_nor_gradients():
    example = batch()
    results = []
    for remat in ('none', 'full'):
        llm = dataclasses.replace(LLM, num_layers=2, remat=remat)
        model = vora(llm=llm).stage('pretrain').model
        params = random_params(model, example)

        def loss(params, batch, model=model):
            out = model.apply({'params': params}, batch)
            words = cross_entropy_sum(out.hidden, model.unembedding(params), batch.targets, batch.loss_mask)
            return words + out.distill_sum.sum()
        results.append(quick_jit(jax.value_and_grad(loss))(params, example))
    (value, gradients), (other, others) = results
    np.testing.assert_allclose(value, other, rtol=1e-6)
    for path, gradient in flatten(gradients).items():
        limit = 1e-6 * max(1.0, float(np.abs(gradient).max()))
        np.testing.assert_allclose(gradient, flatten(others)[path], rtol=0, atol=limit, err_msg=path)


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
