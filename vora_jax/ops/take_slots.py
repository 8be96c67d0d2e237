"""Rows of one sequence taken into another."""
import jax
import jax.numpy as jnp
import numpy as np


@jax.custom_vjp
def take_slots(x: jax.Array, index: jax.Array, inverse: jax.Array) -> jax.Array:
    """f[B, T, D]: `x[b, index[b, t]]` for x: f[B, S, D]; anything finite where `index` is -1.

    The gradient is a gather too: no scatter-add, which is slow on accelerators.

    Args:
        index: i32[B, T] slots of x, none twice; -1 where there is none.
        inverse: i32[B, S] the t that takes each slot; -1 where none does. What stands at -1 must not reach the loss.

    Example: index [2, 0, -1] and inverse [1, -1, 0] take (a, b, c) to (c, a, anything), and back.
    """
    del inverse
    return jnp.take_along_axis(x, jnp.maximum(index, 0)[..., None], axis=1)


def _forward(x, index, inverse):
    return take_slots(x, index, inverse), (index, inverse)


def _backward(residuals, cotangent):
    index, inverse = residuals
    d_x = take_slots(cotangent, inverse, index)
    none = (np.zeros(a.shape, jax.dtypes.float0) for a in (index, inverse))
    return jnp.where((inverse >= 0)[..., None], d_x, jnp.zeros((), d_x.dtype)), *none


take_slots.defvjp(_forward, _backward)
