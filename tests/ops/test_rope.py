"""Rotary positions against complex rotation."""
import numpy as np
from tiny_model import strict  # noqa: F401

from vora_jax.ops.rope import apply_rope, rope_angles


def test_pairs_half_a_head_apart_are_rotated_by_their_frequency():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 3, 8)).astype(np.float32)
    positions = rng.integers(0, 3000, (2, 5)).astype(np.int32)
    rotated = np.asarray(apply_rope(x, rope_angles(positions, 8, 1e6)))
    frequency = 1e6 ** (-np.arange(0, 8, 2) / 8)
    turn = np.exp(1j * positions[..., None, None] * frequency)
    expected = (x[..., :4] + 1j * x[..., 4:]) * turn
    np.testing.assert_allclose(rotated, np.concatenate([expected.real, expected.imag], -1), atol=1e-3)


def test_position_zero_changes_nothing_and_products_depend_on_distance():
    rng = np.random.default_rng(1)
    q, k = rng.normal(size=(2, 1, 1, 1, 8)).astype(np.float32)

    def product(a, b):
        turned = [apply_rope(x, rope_angles(np.int32([[place]]), 8, 100.0)) for x, place in ((q, a), (k, b))]
        return float((turned[0] * turned[1]).sum())
    np.testing.assert_array_equal(apply_rope(q, rope_angles(np.int32([[0]]), 8, 100.0)), q)
    np.testing.assert_allclose(product(9, 4), product(25, 20), rtol=1e-4)
    assert abs(product(9, 4) - product(9, 8)) > 1e-3
