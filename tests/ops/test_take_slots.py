"""Gathers there and back, against plain indexing and JAX's own gradients."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import strict  # noqa: F401

from vora_jax.nn.slots import vision_slots
from vora_jax.ops.take_slots import put_slots, take_slots
from vora_jax.types import TEXT, VISION

SLOTS, WIDTH = 9, 3


def arrangement(num_tokens, rows=4, seed=0):
    """(slot i32[B, Q], modality i8[B, S]): row i has min(i * 2, Q) vision slots at random places, in order."""
    rng = np.random.default_rng(seed)
    slot, modality = np.full((rows, num_tokens), -1, np.int32), np.full((rows, SLOTS), TEXT, np.int8)
    for row in range(rows):
        here = np.sort(rng.choice(SLOTS, min(2 * row, num_tokens), replace=False))
        slot[row, :len(here)], modality[row, here] = here, VISION
    return slot, modality


def random(*shape, seed=1):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize('num_tokens', [0, 3, 6])
def test_the_gradient_of_a_take_is_the_scatter_add_of_plain_indexing(num_tokens):
    slot, modality = arrangement(num_tokens)
    index, inverse, _ = vision_slots(slot, modality)
    x, weight = random(4, SLOTS, WIDTH), random(4, num_tokens, WIDTH, seed=2)

    def through(take):
        def loss(x):
            return jnp.sum(jnp.where((slot >= 0)[..., None], jnp.sin(take(x)), 0.0) * weight)
        return jax.value_and_grad(loss)(x)

    value, gradient = through(lambda x: take_slots(x, index, inverse))
    expected = through(lambda x: x[np.arange(4)[:, None], np.maximum(slot, 0)])
    np.testing.assert_array_equal(value, expected[0])
    np.testing.assert_array_equal(gradient, expected[1])
    assert (np.asarray(gradient) != 0).any(-1).sum() == (slot >= 0).sum()


@pytest.mark.parametrize('on', [None, np.array([True, True, False, True]), np.array(False)], ids=['none', 'rows', 'off'])
@pytest.mark.parametrize('num_tokens', [0, 3, 6])
def test_a_put_replaces_rows_and_so_do_its_gradients(num_tokens, on):
    slot, modality = arrangement(num_tokens)
    x, new, weight = random(4, SLOTS, WIDTH), random(4, num_tokens, WIDTH, seed=2), random(4, SLOTS, WIDTH, seed=3)
    rows, tokens = np.nonzero((slot >= 0) & (np.ones((4, 1), bool) if on is None else on.reshape(-1, 1)))

    def ours(x, new):
        return put_slots(x, new, *vision_slots(slot, modality, on))

    def plain(x, new):
        return x.at[rows, slot[rows, tokens]].set(new[rows, tokens])

    def gradients(put):
        return jax.grad(lambda x, new: jnp.sum(put(x, new) * weight), (0, 1))(x, new)

    np.testing.assert_array_equal(ours(x, new), plain(jnp.asarray(x), new))
    for gradient, expected in zip(gradients(ours), gradients(plain)):
        np.testing.assert_array_equal(gradient, expected)


def test_neither_direction_holds_a_scatter():
    slot, modality = arrangement(6)
    x, new = random(4, SLOTS, WIDTH), random(4, 6, WIDTH)

    def loss(x, new):
        index = vision_slots(slot, modality)
        return jnp.sum(put_slots(x, new + take_slots(x, *index[:2]), *index) ** 2)
    assert 'scatter' not in str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(x, new))


def test_the_arrays_of_the_docstrings_example():
    index, inverse, source = vision_slots(np.int32([[1, 2, -1]]), np.int8([[TEXT, VISION, VISION, TEXT]]))
    assert index.tolist() == [[1, 2, -1]] and inverse.tolist() == [[-1, 0, 1, -1]] and source.tolist() == [[0, 4, 5, 3]]
    letters = put_slots(jnp.asarray([[[1], [2], [3]]]), jnp.asarray([[[7], [8], [9]]]), jnp.asarray([[2, 0, -1]]),
                        jnp.asarray([[1, -1, 0]]), jnp.asarray([[4, 1, 3]]))
    assert letters[0, :, 0].tolist() == [8, 2, 7]
