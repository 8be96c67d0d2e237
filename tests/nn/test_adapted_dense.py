"""A linear layer with low-rank adapters: value, scope, switch, fold."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import random_params, strict  # noqa: F401

from vora_jax.merge import plan_fold
from vora_jax.nn.adapted_dense import AdaptedDense
from vora_jax.nn.adapters import LowRank
from vora_jax.nn.slots import SlotContext, vision_slots
from vora_jax.types import PAD, TEXT, VISION, UserError

MODALITY = np.int8([[TEXT, VISION, VISION, TEXT, PAD], [TEXT, TEXT, TEXT, PAD, PAD]])
X = np.random.default_rng(0).normal(size=(2, 5, 6)).astype(np.float32)


def context(adapters_on=None):
    vision = vision_slots(np.int32([[1, 2, -1], [-1, -1, -1]]), MODALITY, adapters_on)
    return SlotContext(None, MODALITY, adapters_on=adapters_on, vision=vision)


def layer(*adapters):
    """(jitted call, params) of a layer of width 6 -> 4 with random parameters."""
    module = AdaptedDense(4, ('embed', 'mlp'), adapters, use_bias=True)

    class Shaped:  # `random_params` asks for `init(key, example)`
        init = staticmethod(lambda key, x: module.init(key, x, context()))
    params = random_params(Shaped, X)
    return jax.jit(lambda adapters_on=None: module.apply({'params': params}, X, context(adapters_on))), params


def test_the_branch_is_scale_times_the_low_rank_product():
    call, params = layer(LowRank(2, scale=1.5), LowRank(3))
    expected = X @ params['kernel'] + params['bias']
    for name, scale in (('adapter_0', 1.5), ('adapter_1', 1.0)):
        expected = expected + scale * (X @ params[name]['a'] @ params[name]['b'])
    np.testing.assert_allclose(call(), expected, atol=1e-5)


@pytest.mark.parametrize('scope,acts', [('all', MODALITY > -1), ('vision', MODALITY == VISION),
                                        ('text', MODALITY == TEXT)])
def test_an_adapter_acts_on_its_scope_only(scope, acts):
    call, params = layer(LowRank(2, scope=scope))
    base = np.asarray(call(jnp.asarray(False)))
    np.testing.assert_allclose(base, X @ params['kernel'] + params['bias'], atol=1e-5)
    changed = (np.asarray(call()) != base).any(-1)
    np.testing.assert_array_equal(changed, acts)
    for_row_1 = (np.asarray(call(np.array([False, True]))) != base).any(-1)
    np.testing.assert_array_equal(for_row_1, acts & np.array([[False], [True]]))


def test_an_adapter_starts_at_zero():
    module = AdaptedDense(4, ('embed', 'mlp'), (LowRank(16),))
    params = module.init(jax.random.key(0), X, context())['params']['adapter_0']
    a, b = params['a'].value, params['b'].value
    assert not b.any() and 0.9 / 6**0.5 < np.abs(a).max() <= 1 / 6**0.5


def test_dropout_acts_on_the_branch_and_only_in_training():
    adapters = (LowRank(2, dropout=0.5),)
    call, params = layer(*adapters)
    training = AdaptedDense(4, ('embed', 'mlp'), adapters, use_bias=True, deterministic=False)

    @jax.jit
    def train(seed, adapters_on):
        rngs = {'dropout': jax.random.key(seed)}
        return training.apply({'params': params}, X, context(adapters_on), rngs=rngs)
    drawn = [np.asarray(train(seed, True)) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert (drawn[0] != drawn[2]).any() and (drawn[0] != call()).any()
    np.testing.assert_array_equal(train(0, False), call(jnp.asarray(False)))


def test_folding_gives_the_same_layer():
    call, params = layer(LowRank(2, scale=0.5))
    kernel = LowRank(2, scale=0.5).fold(params['kernel'], params['adapter_0'])
    np.testing.assert_allclose(X @ np.asarray(kernel) + params['bias'], call(), atol=1e-5)
    stacked = LowRank(2, scale=0.5).fold(*jax.tree.map(lambda x: np.stack([x, 2 * x]),
                                                       (params['kernel'], params['adapter_0'])))
    np.testing.assert_allclose(stacked[0], kernel, atol=1e-6)
    with pytest.raises(UserError, match="scope 'text' cannot be folded"):
        plan_fold((LowRank(2, scope='text'),))
