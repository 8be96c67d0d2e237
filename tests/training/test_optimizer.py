"""Schedule, decay, clipping, learning-rate patterns."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vora_jax.training import optimizer
from vora_jax.training.config import Optimizer
from vora_jax.types import UserError

PARAMS = {
    'frontend': {'kernel': jnp.ones((2, 3)), 'bias': jnp.ones(3)},
    'layers': {'scale': jnp.ones((4, 3)), 'kernel': jnp.ones((4, 3, 3))},
}
STACKED = {'layers/scale': 1, 'layers/kernel': 1}


def one_update(config, gradient=0.0):
    transform = optimizer.create(config, PARAMS, STACKED)
    gradients = jax.tree.map(lambda p: jnp.full(p.shape, gradient), PARAMS)
    updates, _ = transform.update(gradients, transform.init(PARAMS), PARAMS)
    return updates


def test_cosine_with_warmup():
    rate = optimizer.schedule(Optimizer(1.0, 'cosine', decay_steps=14, warmup_steps=4, end_fraction=0.1))
    values = [float(rate(step)) for step in range(16)]
    np.testing.assert_allclose(values[:5], [0.25, 0.5, 0.75, 1.0, 1.0])
    np.testing.assert_allclose(values[9], 0.55, rtol=1e-6)
    np.testing.assert_allclose(values[14:], 0.1, rtol=1e-6)
    assert float(optimizer.schedule(Optimizer(1.0, warmup_steps=2))(5)) == 1.0


def test_warmup_from_zero_is_the_original_schedule():
    """(fractional epoch, rate) of LaVIN's released code at dd0a1bf: 20 epochs, 2 of them warm-up."""
    golden = [(0, 0.0), (0.5, 0.00028125), (1, 0.0005625), (2, 0.001125), (5, 0.0010496392896287468), (11, 0.0005625),
              (19, 8.545638930632987e-06), (19.99, 8.567362756728424e-10)]
    per_epoch = 500
    config = Optimizer(1.125e-3, 'cosine', decay_steps=20 * per_epoch, warmup_steps=2 * per_epoch, warmup_from_zero=True)
    rate = jax.jit(optimizer.schedule(config))
    for epoch, expected in golden:
        step = jnp.asarray(round(epoch * per_epoch), jnp.int32)
        np.testing.assert_allclose(rate(step), np.float32(expected), rtol=2.5e-7)  # 2 float32 roundings; measured: 1


def test_norms_and_biases_do_not_decay():
    updates = one_update(Optimizer(0.1, weight_decay=0.5))
    assert not updates['frontend']['bias'].any()
    assert not updates['layers']['scale'].any()  # [L, D]: stacked, one-dimensional per layer
    for part in ('frontend', 'layers'):
        np.testing.assert_allclose(updates[part]['kernel'], -0.05, rtol=1e-6)


def test_patterns_scale_the_learning_rate_and_the_first_match_wins():
    config = Optimizer(0.1, clip_norm=0.0, lr_multipliers=(('frontend/bias', 0.0), ('frontend/*', 3.0)))
    updates = one_update(config, gradient=1.0)
    np.testing.assert_allclose(updates['layers']['kernel'], -0.1, rtol=1e-5)
    np.testing.assert_allclose(updates['frontend']['kernel'], -0.3, rtol=1e-5)
    assert not updates['frontend']['bias'].any()


def test_a_pattern_that_matches_nothing_is_told():
    with pytest.raises(UserError, match="'vision/\\*' matches no trainable parameter"):
        optimizer.create(Optimizer(lr_multipliers=(('vision/*', 2.0),)), PARAMS)


def test_gradients_are_clipped_by_their_global_norm():
    gradients = jax.tree.map(lambda p: 100.0 * p, PARAMS)
    config = Optimizer(1.0, clip_norm=0.5)
    transform = optimizer.create(config, PARAMS)
    _, state = transform.update(gradients, transform.init(PARAMS), PARAMS)
    first_moment = next(
        part.mu for part in jax.tree.leaves(state, is_leaf=lambda s: hasattr(s, 'mu')) if hasattr(part, 'mu')
    )
    np.testing.assert_allclose(optax.global_norm(first_moment), 0.5 * (1 - config.b1), rtol=1e-5)
