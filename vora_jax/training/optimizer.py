"""AdamW, schedule, clipping, per-path rates.

A pair of pure functions (`optax.GradientTransformation`) over the trainable parameters only.
"""
import fnmatch

import jax
import jax.numpy as jnp
import optax

from vora_jax.params import flatten, unflatten
from vora_jax.training.config import Optimizer
from vora_jax.types import Array, Params, UserError


def schedule(config: Optimizer) -> optax.Schedule:
    """The learning rate, f32[], as a function of the optimizer steps done so far (the first step sees 0)."""
    peak, length = config.learning_rate, config.decay_steps - config.warmup_steps

    def cosine(step):
        # (1 + cos(pi * done)) / 2 = sin(pi / 2 * left)^2, which keeps its digits where little is left.
        left = jnp.clip((length - step) / length, 0.0, 1.0)
        return peak * (config.end_fraction + (1.0 - config.end_fraction) * jnp.sin(jnp.pi / 2 * left)**2)

    after = cosine if config.schedule == 'cosine' else optax.constant_schedule(peak)
    if not config.warmup_steps:
        return after
    if config.warmup_from_zero:
        warmup = optax.linear_schedule(0.0, peak, config.warmup_steps)
    else:
        # 1 / warmup_steps at the first step: a step with rate 0 would be a step wasted.
        warmup = optax.linear_schedule(peak / config.warmup_steps, peak, max(config.warmup_steps - 1, 1))
    return optax.join_schedules([warmup, after], [config.warmup_steps])


def create(config: Optimizer, trainable: Params, num_stacked: dict[str, int] | None = None):
    """The optimizer for a tree of trainable parameters (arrays or shapes).

    Args:
        config: the optimizer's fields.
        trainable: nested dict; only paths and numbers of dimensions are read.
        num_stacked: leading dimensions of a path that only stack layers (a norm's scale in a scanned stack is
            `f32[L, D]` and still one-dimensional per layer); 0 where a path is missing.

    Returns:
        An `optax.GradientTransformation`; its state has leaves for `trainable` only.

    Raises:
        UserError: a pattern of `lr_multipliers` matches no trainable parameter.
    """
    stacked = num_stacked or {}
    flat = flatten(trainable)
    decays = unflatten({path: leaf.ndim - stacked.get(path, 0) >= 2 for path, leaf in flat.items()})
    parts = [
        optax.scale_by_adam(config.b1, config.b2, config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=decays),
        optax.scale_by_learning_rate(schedule(config)),
    ]
    if config.clip_norm:
        parts.insert(0, optax.clip_by_global_norm(config.clip_norm))
    factors = multipliers(config.lr_multipliers, list(flat))
    if any(factor != 1.0 for factor in factors.values()):
        parts.append(_scale_each(unflatten(factors)))
    return optax.chain(*parts)


def multipliers(patterns: tuple[tuple[str, float], ...], paths: list[str]) -> dict[str, float]:
    """The learning-rate factor of each path: that of the first matching pattern, else 1.

    Raises:
        UserError: a pattern matches none of the paths.
    """
    for pattern, _ in patterns:
        if not fnmatch.filter(paths, pattern):
            raise UserError(
                f'Optimizer.lr_multipliers: the pattern {pattern!r} matches no trainable parameter; the '
                'first of '
                f'{len(paths)} is {min(paths)!r}.'
            )
    return {
        path: next((factor for pattern, factor in patterns if fnmatch.fnmatchcase(path, pattern)), 1.0)
        for path in paths
    }


def _scale_each(factors: Params) -> optax.GradientTransformation:
    def update(updates: Params, state: optax.EmptyState, params: Array = None):
        del params
        return jax.tree.map(lambda u, factor: u * factor, updates, factors), state

    return optax.GradientTransformation(lambda _: optax.EmptyState(), update)
