"""The jitted train step."""
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vora_jax.batch import Batch
from vora_jax.ops.cross_entropy import cross_entropy_sum
from vora_jax.params import combine
from vora_jax.training import guard, losses
from vora_jax.training.mesh import sharding
from vora_jax.training.state import State
from vora_jax.types import Array, Params

Step = Callable[[State, Params, Batch], tuple[State, dict[str, Array]]]
Gradient = Callable[[Params, Params, Batch, losses.Totals, Array], tuple[dict[str, Array], Params]]


def make_step(
    model: Any,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    distill_weight: float,
    accumulation: int,
    seed: int,
    max_sigmas: float = 0.0,
    in_shards: Callable[[Gradient], Gradient] = lambda gradient: gradient,
    cross_entropy: Callable[..., Array] = cross_entropy_sum,
) -> Step:
    """The pure function `(state, frozen, batch) -> (state, metrics)` of one optimizer step.

    A step that `guard.judge` refuses changes nothing but `State.step`; its metrics tell what was refused.

    Args:
        cross_entropy: see `losses.objective`.
        in_shards: wraps what computes the gradient of a micro-batch, see `gather.in_shards`.
    """

    def gradient_of(trainable: Params, frozen: Params, micro: Batch, total: losses.Totals, key: Array):
        def loss(trainable: Params):
            params = combine(trainable, frozen)
            if model.gather is not None:
                params = model.gather('', params)
            return losses.objective(model, params, micro, total, distill_weight, key, cross_entropy)

        # Strict for our own code only: optax mixes dtypes.
        with jax.numpy_dtype_promotion('strict'), jax.numpy_rank_promotion('raise'):
            (value, parts), gradient = jax.value_and_grad(loss, has_aux=True)(trainable)
        return {'loss': value, **parts}, gradient

    def step(state: State, frozen: Params, batch: Batch) -> tuple[State, dict[str, Array]]:
        total = losses.totals(batch)
        key = jax.random.fold_in(jax.random.key(seed), state.step)

        def micro_gradient(index: Array, micro: Batch):
            return in_shards(gradient_of)(state.trainable, frozen, micro, total, jax.random.fold_in(key, index))

        if accumulation == 1:
            parts, gradient = micro_gradient(jnp.int32(0), batch)
        else:
            parts, gradient = _accumulate(micro_gradient, batch, accumulation)
        grad_norm = optax.tree.norm(gradient)
        ok, health = guard.judge(state.health, parts['loss'], grad_norm, max_sigmas)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        trainable, opt_state = guard.choose(ok, (trainable, opt_state), (state.trainable, state.opt_state))
        metrics = {
            **parts,
            'grad_norm': grad_norm,
            # The optimizer counts the steps it has taken, not those that were skipped.
            'lr': jnp.asarray(schedule(state.health.taken), jnp.float32),
            'skipped_steps': 1 - ok.astype(jnp.int32),
            **losses.counts(batch),
        }
        return State(state.step + 1, trainable, opt_state, health), metrics

    return step


def _accumulate(micro_gradient: Callable, batch: Batch, accumulation: int):
    """Sums over micro-batches, one at a time.

    Micro-batch i holds rows i, i + accumulation, ...: each device splits its own rows and none moves.
    """

    def split(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(x.shape[0] // accumulation, accumulation, *x.shape[1:]), 1, 0)

    micros = jax.tree.map(split, batch)
    indices = jnp.arange(accumulation, dtype=jnp.int32)
    first = jax.tree.map(lambda x: x[0], micros)
    zeros = jax.tree.map(
        lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(micro_gradient, indices[0], first)
    )

    def body(sums, inputs):
        return jax.tree.map(jnp.add, sums, micro_gradient(*inputs)), None

    return jax.lax.scan(body, zeros, (indices, micros))[0]


def compile_step(
    step: Step, state_shardings: State, frozen_shardings: Params, mesh: jax.sharding.Mesh
) -> Step:
    """`jax.jit` of a step on a mesh; the state's buffers are reused (donated), so the old state is gone."""
    return jax.jit(
        step,
        in_shardings=(state_shardings, frozen_shardings, sharding.rows(mesh)),
        out_shardings=(state_shardings, sharding.replicated(mesh)),
        donate_argnums=(0,),
    )
