"""Chunked cross-entropy that computes only target slots."""
import functools

import jax
import jax.numpy as jnp

CHUNK = 32  # slots of a row whose logits exist at a time


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def cross_entropy_sum(hidden, unembedding, targets, mask, chunk: int = CHUNK):
    """f32[]: sum over slots of `mask * -log softmax(hidden @ unembedding)[targets]`.

    Args:
        hidden: f[B, S, D] last hidden states.
        unembedding: f[D, V] head.
        targets: i32[B, S] ids; read only where mask > 0.
        mask: f32[B, S] weights, not differentiated.
        chunk: slots of each row whose logits exist at the same time.

    Each row's slots with a target are moved to its front, and a loop whose length is data walks over them, so
    `[B, S, V]` never exists and slots without a target cost nothing. The loss is linear in its cotangent, so the
    gradients are computed in the same walk.
    """
    return _walk(hidden, unembedding, targets, mask, chunk, with_gradients=False)[0]


def _walk(hidden, unembedding, targets, mask, chunk, *, with_gradients):
    slots = hidden.shape[1]
    chunk = min(chunk, slots)
    num_targets = jnp.sum(mask > 0, axis=1).max()
    # Stable: target slots first, in their order. Padded so that the last chunk reads, and drops, slot `slots`. Rows are
    # moved once and whole, not chunk by chunk: on a mesh no row then leaves its device.
    order = jnp.argsort(mask <= 0, axis=1, stable=True).astype(jnp.int32)
    back = jnp.argsort(order, axis=1).astype(jnp.int32)
    order = jnp.pad(order, ((0, 0), (0, chunk)), constant_values=slots)
    states_first, weights_first, targets_first = (_moved(x, order) for x in (hidden, mask, targets))
    kernel = unembedding.astype(hidden.dtype)

    def body(index, carry):
        total, d_states_first, d_kernel = carry
        states, weight, target = (jax.lax.dynamic_slice_in_dim(x, index * chunk, chunk, axis=1)
                                  for x in (states_first, weights_first, targets_first))
        logits = jnp.einsum('bcd,dv->bcv', states, kernel, preferred_element_type=jnp.float32)
        log_z = jax.nn.logsumexp(logits, axis=-1)
        picked = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
        total = total + jnp.sum(weight * (log_z - picked))
        if with_gradients:
            d_logits = jnp.exp(logits - log_z[..., None])
            d_logits = (d_logits - jax.nn.one_hot(target, logits.shape[-1], dtype=jnp.float32)) * weight[..., None]
            d_states = jnp.einsum('bcv,dv->bcd', d_logits.astype(kernel.dtype), kernel)
            d_states_first = jax.lax.dynamic_update_slice_in_dim(d_states_first, d_states, index * chunk, axis=1)
            d_kernel = d_kernel + jnp.einsum('bcd,bcv->dv', states, d_logits.astype(states.dtype),
                                             preferred_element_type=jnp.float32)
        return total, d_states_first, d_kernel

    num_chunks = (num_targets + chunk - 1) // chunk
    zero = (jnp.zeros((), jnp.float32), None, None)
    if with_gradients:
        zero = (zero[0], jnp.zeros_like(states_first), jnp.zeros(unembedding.shape, jnp.float32))
    total, d_states_first, d_kernel = jax.lax.fori_loop(0, num_chunks, body, zero)
    return total, _moved(d_states_first, back) if with_gradients else None, d_kernel


def _moved(x, order):
    """[B, T, ...]: slots `order: i32[B, T]` of each row of x; 0 where there is none of that number."""
    order = order.reshape(*order.shape, *[1] * (x.ndim - 2))
    return jnp.take_along_axis(x, order, axis=1, mode='fill', fill_value=0)


def _forward(hidden, unembedding, targets, mask, chunk):
    total, d_hidden, d_kernel = _walk(hidden, unembedding, targets, mask, chunk, with_gradients=True)
    return total, (d_hidden, d_kernel.astype(unembedding.dtype))


def _backward(chunk, gradients, cotangent):
    d_hidden, d_kernel = gradients
    return (cotangent.astype(d_hidden.dtype) * d_hidden, cotangent.astype(d_kernel.dtype) * d_kernel, None, None)


cross_entropy_sum.defvjp(_forward, _backward)
