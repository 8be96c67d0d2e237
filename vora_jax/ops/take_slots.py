"""Rows of one sequence taken into another, and back."""
import jax
import jax.numpy as jnp
import numpy as np


@jax.custom_vjp
def take_slots(x: jax.Array, index: jax.Array, inverse: jax.Array) -> jax.Array:
    """f[B, T, D]: `x[b, index[b, t]]` for x: f[B, S, D]; some row of x where `index` is -1.

    The gradient is a gather too: no scatter-add, which is slow on accelerators.

    Args:
        index: i32[B, T] slots of x, none twice; -1 where there is none.
        inverse: i32[B, S] the t that takes each slot; -1 where none does. What stands at -1 must not reach the loss.

    Example: index [2, 0, -1] and inverse [1, -1, 0] take (a, b, c) to (c, a, anything), and back.
    """
    del inverse
    return _rows(x, index)


def _take_forward(x, index, inverse):
    return take_slots(x, index, inverse), (index, inverse)


def _take_backward(residuals, cotangent):
    index, inverse = residuals
    return _masked(_rows(cotangent, inverse), inverse >= 0), *_no_gradients(index, inverse)


take_slots.defvjp(_take_forward, _take_backward)


@jax.custom_vjp
def put_slots(x: jax.Array, new: jax.Array, index: jax.Array, inverse: jax.Array, source: jax.Array) -> jax.Array:
    """f[B, S, D]: x: f[B, S, D] with `new[b, t]` at `index[b, t]`, for new: f[B, T, D]; -1 puts nothing.

    A gather from both, as its gradients are: no arithmetic and no scatter.

    Args:
        index, inverse: as in `take_slots`.
        source: i32[B, S] `inverse + S` where that is not -1, else the slot's own number.

    Example: index [2, 0, -1], inverse [1, -1, 0] and source [4, 1, 3] make (q, b, p) of (a, b, c) and (p, q, r).
    """
    del index, inverse
    if not new.shape[1]:
        return x
    return _rows(jnp.concatenate([x, new], axis=1), source)


def _put_forward(x, new, index, inverse, source):
    return put_slots(x, new, index, inverse, source), (index, inverse, source)


def _put_backward(residuals, cotangent):
    index, inverse, source = residuals
    d_x, d_new = _masked(cotangent, inverse < 0), _masked(_rows(cotangent, index), index >= 0)
    return d_x, d_new, *_no_gradients(index, inverse, source)


put_slots.defvjp(_put_forward, _put_backward)


def _rows(x, index):
    # Indices are in bounds or -1, which this mode clips: no comparison of each gathered value.
    return jnp.take_along_axis(x, index[..., None], axis=1, mode='promise_in_bounds')


def _masked(x, mask):
    return jnp.where(mask[..., None], x, jnp.zeros((), x.dtype))


def _no_gradients(*indices):
    return tuple(np.zeros(index.shape, jax.dtypes.float0) for index in indices)
