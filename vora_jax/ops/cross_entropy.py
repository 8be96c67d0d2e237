"""Chunked cross-entropy that computes only target slots."""
import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def cross_entropy_sum(hidden, unembedding, targets, mask, chunk: int = 32):
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
    batch, slots, width = hidden.shape
    chunk = min(chunk, slots)
    num_targets = jnp.sum(mask > 0, axis=1).max()
    # Stable: target slots first, in their order. Padded so that the last chunk reads (and drops) slot `slots`.
    order = jnp.argsort(mask <= 0, axis=1, stable=True).astype(jnp.int32)
    order = jnp.pad(order, ((0, 0), (0, chunk)), constant_values=slots)
    rows = jnp.arange(batch, dtype=jnp.int32)[:, None]
    kernel = unembedding.astype(hidden.dtype)

    def body(index, carry):
        total, d_hidden, d_kernel = carry
        slot = jax.lax.dynamic_slice_in_dim(order, index * chunk, chunk, axis=1)
        states = hidden.at[rows, slot].get(mode='fill', fill_value=0)
        weight = mask.at[rows, slot].get(mode='fill', fill_value=0)
        target = targets.at[rows, slot].get(mode='fill', fill_value=0)
        logits = jnp.einsum('bcd,dv->bcv', states, kernel, preferred_element_type=jnp.float32)
        log_z = jax.nn.logsumexp(logits, axis=-1)
        picked = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
        total = total + jnp.sum(weight * (log_z - picked))
        if with_gradients:
            d_logits = jnp.exp(logits - log_z[..., None])
            d_logits = (d_logits - jax.nn.one_hot(target, logits.shape[-1], dtype=jnp.float32)) * weight[..., None]
            d_states = jnp.einsum('bcv,dv->bcd', d_logits.astype(kernel.dtype), kernel)
            d_hidden = d_hidden.at[rows, slot].set(d_states, mode='drop')
            d_kernel = d_kernel + jnp.einsum('bcd,bcv->dv', states, d_logits.astype(states.dtype),
                                             preferred_element_type=jnp.float32)
        return total, d_hidden, d_kernel

    num_chunks = (num_targets + chunk - 1) // chunk
    zero = (jnp.zeros((), jnp.float32), None, None)
    if with_gradients:
        zero = (zero[0], jnp.zeros_like(hidden), jnp.zeros(unembedding.shape, jnp.float32))
    return jax.lax.fori_loop(0, num_chunks, body, zero)


def _forward(hidden, unembedding, targets, mask, chunk):
    total, d_hidden, d_kernel = _walk(hidden, unembedding, targets, mask, chunk, with_gradients=True)
    return total, (d_hidden, d_kernel.astype(unembedding.dtype))


def _backward(chunk, gradients, cotangent):
    d_hidden, d_kernel = gradients
    return (cotangent.astype(d_hidden.dtype) * d_hidden, cotangent.astype(d_kernel.dtype) * d_kernel, None, None)


cross_entropy_sum.defvjp(_forward, _backward)
