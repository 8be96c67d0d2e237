"""Key ranges as dense masks, and the numerics that implementations of attention share."""
import jax
import jax.numpy as jnp

from vora_jax.types import KeyRange

# Score of a key that a query does not see, and log-sum-exp of a query that sees none. Finite: exp(MASKED - MASKED) must
# not be NaN.
MASKED = -1e30


def sum_dtype(x) -> jnp.dtype:
    """What scores and sums over `x` are kept in: float64 for float64, else float32."""
    return jnp.dtype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)


def soft_capped(scores, soft_cap: float | None):
    """(`soft_cap * tanh(scores / soft_cap)`, its derivative); the scores themselves and 1.0 without a cap."""
    if soft_cap is None:
        return scores, 1.0
    bent = jnp.tanh(scores / soft_cap)
    return bent * soft_cap, 1 - bent * bent


def dense_mask(key_range: KeyRange, num_keys: int) -> jax.Array:
    """bool[B, T, S]: True where query t sees key s, i.e. `start[t] <= s < stop[t]`. Only references build it."""
    keys = jnp.arange(num_keys, dtype=jnp.int32)[None, None]
    return (keys >= key_range.start[..., None]) & (keys < key_range.stop[..., None])


def causal(batch: int, num_slots: int) -> KeyRange:
    """The key range of plain causal rows: `[0, q + 1)`."""
    stop = jnp.broadcast_to(jnp.arange(1, num_slots + 1, dtype=jnp.int32), (batch, num_slots))
    return KeyRange(jnp.zeros_like(stop), stop)
