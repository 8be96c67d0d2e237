"""Which steps are too bad to take.

A step whose loss or gradient is not finite, or far above what it has been, changes nothing but the step number. The choice
is made on the devices from replicated numbers: all of them agree, nothing is compiled anew and the host need not look.
"""
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vora_jax.types import Array, UserError

WARM_UP = 20  # steps taken before one can be judged by those before it
MEMORY = 100  # steps that mean and variance reach back


class Health(NamedTuple):
    """What the steps taken so far looked like; skipped ones are not in it.

    taken: i32[] how many there were.
    mean, variance: f32[2] of (loss, gradient norm), over about the last `MEMORY` of them.
    """

    taken: Array
    mean: Array
    variance: Array


def start() -> Health:
    """The health of a run before its first step."""
    return Health(jnp.int32(0), jnp.zeros(2, jnp.float32), jnp.zeros(2, jnp.float32))


def judge(health: Health, loss: Array, grad_norm: Array, max_sigmas: float) -> tuple[Array, Health]:
    """(bool[] whether to take the step, the health after it).

    A step is taken if loss and gradient norm (f32[] both) are finite and, where `max_sigmas` > 0 and `WARM_UP` steps were
    taken, neither is above mean + max_sigmas * standard deviation. Falling is never bad.
    """
    seen = jnp.stack([loss, grad_norm]).astype(jnp.float32)
    ok = jnp.all(jnp.isfinite(seen))
    if max_sigmas:
        # A little more than the deviation: numbers that do not change still differ by rounding.
        limit = health.mean + max_sigmas * jnp.sqrt(health.variance) + 1e-5 * jnp.abs(health.mean)
        ok &= (health.taken < WARM_UP) | jnp.all(seen <= limit)
    taken = health.taken + 1
    # A plain mean at first, which then forgets: 1, 1/2, 1/3, ... 1/MEMORY.
    weight = 1.0 / jnp.minimum(taken, MEMORY).astype(jnp.float32)
    change = seen - health.mean
    after = Health(taken, health.mean + weight * change, (1.0 - weight) * (health.variance + weight * change * change))
    return ok, choose(ok, after, health)


def choose(ok: Array, new: Any, old: Any) -> Any:
    """The new tree if the step is taken, else the old one, bit for bit.

    A select on each leaf, not a `lax.cond`: it fuses into the update that computes the leaf, which has read the old value
    anyway, so that it costs no memory and buffers can still be donated.
    """
    return jax.tree.map(lambda after, before: jnp.where(ok, after, before), new, old)


class Streak:
    """Counts skipped steps in a row, from metrics on the host: the same ones on every process.

    number: of those that end with the last step read.
    """

    def __init__(self, max_skips: int):
        self._max_skips, self.number = max_skips, 0

    def read(self, last: int, steps: Sequence[Mapping[str, Any]]) -> UserError | None:
        """The error that ends the run once too many steps in a row were skipped; `steps` are the metrics of those that end
        with number `last` and begin where the previous call ended."""
        error = None
        for done, step in enumerate(steps, last - len(steps) + 1):
            self.number = self.number + 1 if step['skipped_steps'] else 0
            if self.number == self._max_skips and error is None:
                error = UserError(
                    f'steps {done - self._max_skips + 1} to {done} were all skipped, as loss or gradient was not finite or '
                    f'far above the steps before (last: loss {float(step["loss"]):.4g}, gradient norm '
                    f'{float(step["grad_norm"]):.4g}); lower Optimizer.learning_rate in a new --workdir, look at the '
                    'samples of these steps, or raise Guard.max_skips.')
        return error
