"""AdamW, schedule, clipping, per-path rates.

A pair of pure functions (`optax.GradientTransformation`) over the trainable parameters only.
"""
import fnmatch

import jax
import optax

from vora_jax.params import flatten, unflatten
from vora_jax.training.config import Optimizer
from vora_jax.types import Array, Params, UserError


def schedule(config: Optimizer) -> optax.Schedule:
    """The learning rate as a function of the optimizer steps done so far (the first step sees 0)."""
    peak = config.learning_rate
    if config.schedule == 'cosine':
        length = config.decay_steps - config.warmup_steps
        after = optax.cosine_decay_schedule(peak, length, alpha=config.end_fraction)
    else:
        after = optax.constant_schedule(peak)
    if not config.warmup_steps:
        return after
    # 1 / warmup_steps at the first step: a step with rate 0 would be a step wasted.
    start = peak / config.warmup_steps
    warmup = optax.linear_schedule(start, peak, max(config.warmup_steps - 1, 1))
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
