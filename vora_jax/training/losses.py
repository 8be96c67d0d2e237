"""Language and distillation losses as sums.

A loss is a sum over slots divided by a count over the *global* batch, known before any micro-batch runs:
never a mean of means.
"""
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vora_jax.batch import Batch
from vora_jax.ops.cross_entropy import cross_entropy_sum
from vora_jax.types import TEXT, Array, Params


class Totals(NamedTuple):
    """What the sums of a global batch are divided by; at least 1, so that an empty batch gives 0 and not NaN.

    targets: f32[] summed loss weight.    vision: f32[] real vision tokens.
    """

    targets: Array
    vision: Array


def totals(batch: Batch) -> Totals:
    """Counts of a whole optimizer step's batch."""
    targets = jnp.sum(batch.loss_mask)
    # Weights may be fractions: only an empty batch is lifted to 1.
    return Totals(
        jnp.where(targets > 0, targets, 1.0),
        jnp.maximum(jnp.sum(batch.vision_slot >= 0), 1).astype(jnp.float32),
    )


def objective(
    model: Any,
    params: Params,
    batch: Batch,
    total: Totals,
    distill_weight: float,
    dropout_key: Array | None = None,
    cross_entropy: Callable[..., Array] = cross_entropy_sum,
) -> tuple[Array, dict[str, Array]]:
    """(f32[] loss, its parts) of one micro-batch, as its share of the global batch's loss.

    Summed over the micro-batches of a step, loss, parts and gradients are those of the whole batch.

    Args:
        model: a module whose call gives a `batch.Output`.
        params: full parameters.
        batch: the micro-batch.
        total: counts of the whole batch.
        distill_weight: weight of the distillation loss; the language loss has weight 1.
        dropout_key: None runs without dropout.
        cross_entropy: `ops.cross_entropy.cross_entropy_sum`, perhaps cut over a mesh.

    Returns:
        The loss, and {'lm_loss', 'distill_loss': f32[], 'distill_layers': f32[L_d]} before weighting.
    """
    if dropout_key is None:
        output = model.clone(deterministic=True).apply({'params': params}, batch)
    else:
        rngs = {'dropout': dropout_key}
        output = model.clone(deterministic=False).apply({'params': params}, batch, rngs=rngs)
    language = cross_entropy(output.hidden, model.unembedding(params), batch.targets, batch.loss_mask)
    lm_loss = language / total.targets
    layers = output.distill_sum / total.vision[None]
    distill_loss = jnp.mean(layers) if layers.size else jnp.zeros((), jnp.float32)
    loss = lm_loss + distill_weight * distill_loss
    return loss, {'lm_loss': lm_loss, 'distill_loss': distill_loss, 'distill_layers': layers}


# The columns of `Batch.tally`, each a list in the order of the sources.
BY_SOURCE = ('good_samples_by_source', 'bad_samples_by_source', 'dropped_turns_by_source')


def counts(batch: Batch) -> dict[str, jax.Array]:
    """What a batch holds: numbers of slots, samples, and the share of slots that is padding."""
    text, vision = jnp.sum(batch.modality == TEXT), jnp.sum(batch.vision_slot >= 0)
    tally = jnp.sum(batch.tally, axis=0)  # [K, 3]
    empty = {}
    if batch.patches is not None:
        empty = {'patch_pad_fraction': jnp.mean((batch.patches.image_id < 0).astype(jnp.float32))}
    return {
        'num_target_tokens': jnp.sum(batch.loss_mask > 0),
        'num_text_tokens': text,
        'num_vision_tokens': vision,
        'num_samples': jnp.sum(tally[:, :2]),
        'bad_samples': jnp.sum(tally[:, 1]),
        'dropped_turns': jnp.sum(tally[:, 2]),
        **{name: tally[:, number] for number, name in enumerate(BY_SOURCE)},
        'pad_fraction': jnp.mean((batch.segment_id == 0).astype(jnp.float32)),
        **empty,
    }
