"""FLOPs of one optimizer step, by part.

Matrix products only: norms, activations, softmax, rotations, gathers and the optimizer are left out. Two totals:

    model     what the method asks for: forward, and the gradients that something trained needs. Slots, places and tokens
              that hold something, attended pairs by the mask's real area, logits of targets. An attention's gradient is
              five products, as scores are never stored.
    executed  what the program computes: padding, static budgets, whole tiles and a kernel's further products, layers
              above the last one that is read, and what the backward pass computes again (`LanguageModel.remat`).

So model / (peak * seconds) is MFU, executed / (peak * seconds) HFU, and model / executed the ceiling of MFU. A frozen weight
has no gradient of its own; a group of layers with nothing trained in it or below it has no backward pass at all. A group has
one scan: where any of its layers has a gradient, all do.
"""
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from vora_jax.training.flops.products import Product, model_products
from vora_jax.training.flops.statistics import Area, BatchStatistics, Count


class Work(NamedTuple):
    """FLOPs of one part of a step.

    forward, backward: what the method needs.    recompute: forward again, for the backward pass.
    overhead: padding, tiles and further products.
    """

    part: str
    forward: float
    backward: float
    recompute: float
    overhead: float

    @property
    def model(self) -> float:
        return self.forward + self.backward

    @property
    def executed(self) -> float:
        return self.model + self.recompute + self.overhead


def step_work(model: Any, trained: Iterable[str], statistics: BatchStatistics, remat: str | None = None) -> tuple[Work, ...]:
    """The work of one optimizer step, in the order in which it runs.

    Args:
        model: a stage's module, a `VisionLanguageModel` or `TokenClassifier`.
        trained: paths of the parameters that are trained (`params.flatten(plan.state.trainable)`).
        statistics: of the step's batch.
        remat: in place of `model.llm.remat`.
    """
    products = model_products(model, frozenset(trained), statistics, remat)
    parts = dict.fromkeys(product.part for product in products)
    return tuple(_work(part, [product for product in products if product.part == part]) for part in parts)


def model_flops(work: Iterable[Work]) -> float:
    """FLOPs that the method needs."""
    return sum(one.model for one in work)


def executed_flops(work: Iterable[Work]) -> float:
    """FLOPs that the program computes."""
    return sum(one.executed for one in work)


def flops_of_row(model: Any, trained: Iterable[str], example: BatchStatistics) -> Callable[[Mapping], tuple[float, float]]:
    """(model, executed) FLOPs of a step, as a function of its metrics (`losses.counts`).

    Args:
        model, trained: as in `step_work`.
        example: statistics of a batch of the run. Shapes are its; the area that tiles add to a mask, and chunks to targets,
            is in proportion to its.

    The metrics `num_attention_pairs` and `num_image_attention_pairs` are taken where a row has them; without, pairs are in
    proportion to the slots (places) that are no padding.
    """
    trained = frozenset(trained)

    def flops(row: Mapping) -> tuple[float, float]:
        slots = example.slots._replace(needed=(1 - float(row['pad_fraction'])) * example.slots.computed)
        places = example.places
        if 'patch_pad_fraction' in row:
            places = places._replace(needed=(1 - float(row['patch_pad_fraction'])) * places.computed)
        now = dataclasses.replace(
            example, slots=slots, places=places,
            vision=example.vision._replace(needed=float(row['num_vision_tokens'])),
            text=example.text._replace(needed=float(row['num_text_tokens'])),
            targets=_in_proportion(example.targets, float(row['num_target_tokens'])),
            attention=_area(example.attention, row.get('num_attention_pairs'), slots, example.slots),
            image_attention=_area(example.image_attention, row.get('num_image_attention_pairs'), places, example.places))
        work = step_work(model, trained, now)
        return model_flops(work), executed_flops(work)

    return flops


def _work(part: str, products: list[Product]) -> Work:
    forward = backward = recompute = overhead = 0.0
    for product in products:
        needed, computed = (2 * product.macs * number for number in product.rows)
        forward += needed
        backward += needed * product.backward
        recompute += computed * product.remade
        overhead += computed * (1 + product.backward_computed) - needed * (1 + product.backward)
    return Work(part, forward, backward, recompute, overhead)


def _in_proportion(count: Count, needed: float) -> Count:
    return Count(needed, count.computed * needed / count.needed if count.needed else needed)


def _area(area: Area, pairs: Any, now: Count, then: Count) -> Area:
    if pairs is None:
        pairs = area.pairs.needed * (now.needed / then.needed if then.needed else 0)
    return area._replace(pairs=_in_proportion(area.pairs, float(pairs)))
