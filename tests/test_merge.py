"""Merging: the same hidden states from a plain model."""
import dataclasses

import flax.linen as nn
import jax
import numpy as np
import pytest
from tiny_methods import METHODS
from tiny_model import LLM, TEACHER, VOCAB, apply, batch, random_params, strict, vora  # noqa: F401

from vora_jax import variants
from vora_jax.merge import Fold, merge, merged_model, plan_fold
from vora_jax.nn.adapters import DualLowRank, LowRank, ModalityKernel
from vora_jax.nn.stack import LayerGroup
from vora_jax.params import flatten, unflatten
from vora_jax.types import UserError


@pytest.fixture(scope='module')
def merged():
    """(batch, method, random params, merged params, merged model) with adapters of scale 0.7."""
    example, method = batch(), vora()
    model = method.stage('pretrain').model
    params = random_params(model, example)
    return example, method, params, *merge(params, model)


def test_the_merged_model_is_the_next_stages(merged):
    example, method, _, params, model = merged
    stage = method.stage('pretrain')
    assert model == merged_model(stage.model) == method.stage(stage.merges_into).model
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), example)['params'])
    described = {path: (leaf.shape, leaf.dtype) for path, leaf in flatten(params).items()}
    assert described == {path: (leaf.shape, leaf.dtype) for path, leaf in flatten(shapes).items()}


def test_hidden_states_and_greedy_tokens_agree(merged):
    example, method, params, merged_params, model = merged
    before = apply(method.stage('pretrain').model)(params, example).hidden
    after = apply(model)(merged_params, example).hidden
    assert np.abs(before - after).max() <= 1e-5  # measured 4e-6, of values up to 4
    best = [np.asarray(hidden @ model.unembedding(merged_params)).argmax(-1) for hidden in (before, after)]
    np.testing.assert_array_equal(*best)  # at every slot: greedy answers are the same
    plain = apply(model)(merge(without_b(params), method.stage('pretrain').model)[0], example).hidden
    assert np.abs(before - plain).max() > 0.1


EYES, ALL = LowRank(2, 1.3, scope='vision'), LowRank(3, 0.6)
MIXED = (('q_proj', (ALL, ModalityKernel(), EYES, ALL)), ('k_proj', (EYES,)), ('v_proj', (ALL, EYES)),
         ('o_proj', (EYES, ModalityKernel())), ('gate_proj', (ModalityKernel(), ALL)), ('up_proj', (ALL, ALL)))


def described(params):
    return {path: (leaf.shape, leaf.dtype) for path, leaf in flatten(params).items()}


@pytest.mark.parametrize('name', ['vision', 'every_scope', 'other_layers'])
def test_what_acts_on_vision_slots_becomes_their_kernel(name):
    """On linears with biases and without; q, k and v have some."""
    example = batch()
    model = vora(scope='vision').stage('pretrain').model
    if name != 'vision':
        first, rest = model.groups
        model = model.clone(groups=(dataclasses.replace(first, adapters=MIXED), rest))
    if name == 'other_layers':  # two groups become one, in which one layer's kernels start from its own and one's do not
        groups = (LayerGroup(1, (('q_proj', (adapter,)),)) for adapter in (EYES, ModalityKernel()))
        model = model.clone(groups=(*groups, LayerGroup(2)), distillation=None)
    params = random_params(model, example)
    merged_params, merged = merge(params, model)
    kinds = {adapter for group in merged.groups for _, adapters in group.adapters for adapter in adapters}
    assert kinds == {ModalityKernel()} and [group.num_layers for group in merged.groups] == [2, 2]
    assert described(merged_params) == described(random_params(merged, example))
    before, after = apply(model)(params, example).hidden, apply(merged)(merged_params, example).hidden
    assert np.abs(before - after).max() <= 1e-5
    shared = without_vision_kernels(merged_params)
    assert np.abs(before - apply(merged)(shared, example).hidden).max() > 0.1


def without_vision_kernels(params):
    flat = flatten(params)
    return unflatten({path: flat[path.replace('adapter_0/', '')] for path in flat})


def test_folds_follow_the_order_of_a_linears_adapters():
    assert plan_fold((ALL, ALL)) == Fold((0, 1), None) and Fold((0, 1), None).adapters == ()
    assert plan_fold((ALL, EYES, ALL)) == Fold((0, 2), (None, (0, 1, 2)))
    # A kernel hides what stands before it from vision slots.
    assert plan_fold((ALL, EYES, ModalityKernel(), ALL)) == Fold((0, 3), (2, (3,)))


@pytest.mark.parametrize('adapter,message', [
    (DualLowRank(2), 'a DualLowRank multiplies'), (DualLowRank(2, scope='vision'), 'a DualLowRank multiplies'),
    (LowRank(2, scope='text'), "scope 'text' cannot be folded"), (ModalityKernel('text'), "scope 'text' cannot be folded")])
def test_what_no_kernel_can_express_is_told_in_a_sentence(adapter, message):
    model = vora(adapter=adapter).stage('pretrain').model
    with pytest.raises(UserError, match=message) as told:
        merge({}, model)
    assert '\n' not in str(told.value) and str(told.value).startswith('merge: ') and str(told.value).endswith('.')


@pytest.mark.parametrize('name,message', [
    ('vce_dual_lora', 'DualLowRank'), ('dual_on_llava', 'DualLowRank'), ('lavin', 'ModalityMixture'),
    ('llavit', 'nothing to merge'), ('llava', 'nothing to merge')])
def test_methods_that_do_not_merge_say_why(name, message):
    method, stage = METHODS[name]
    assert method.stage(stage).merges_into is None
    with pytest.raises(UserError, match=message):
        merge({}, method.stage(stage).model)


@pytest.mark.parametrize('name', ['vora_vision', 'kernels_on_patches', 'llava_lora'])
def test_methods_that_merge_lead_to_the_merged_model(name):
    method, stage = METHODS[name]
    stage = method.stage(stage)
    assert merged_model(stage.model) == method.stage(stage.merges_into).model


def test_there_must_be_something_to_merge(merged):
    _, _, _, params, model = merged
    with pytest.raises(UserError, match='nothing to merge'):
        merge(params, model)
    with pytest.raises(UserError, match='nothing to merge'):
        merge({}, variants.language_model(LLM).stage('pretrain').model)
    with pytest.raises(UserError, match='TokenClassifier has no adapters'):
        merge({}, variants.image_tagger(TEACHER, VOCAB).stage('pretrain').model)


def without_b(params):
    return unflatten({path: leaf * (not path.endswith('/b')) for path, leaf in flatten(params).items()})
