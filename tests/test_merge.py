"""Merging: the same hidden states from a plain model."""
import flax.linen as nn
import jax
import numpy as np
import pytest
from tiny_model import LLM, TEACHER, VOCAB, apply, batch, random_params, strict, vora  # noqa: F401

from vora_jax import variants
from vora_jax.merge import merge, merged_model
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


def test_a_scope_that_one_kernel_cannot_express_raises():
    method = vora(scope='vision')
    params = random_params(method.stage('pretrain').model, batch())
    with pytest.raises(UserError, match="scope 'vision' cannot be folded"):
        merge(params, method.stage('pretrain').model)


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
