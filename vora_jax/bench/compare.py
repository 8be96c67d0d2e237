"""Attention on a random packed batch: time and achieved FLOP/s of implementations that take turns."""
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import tqdm

from vora_jax.bench.sides import BASELINES, Case, Side, range_attention
from vora_jax.bench.tile_statistics import true_area
from vora_jax.bench.timing import median_seconds
from vora_jax.types import KeyRange

# bfloat16 FLOP/s of one JAX device, dense, as the makers tell them. A TPU7x chip has 2307e12 and shows as two devices.
PEAK_FLOPS = {'TPU v4': 275e12, 'TPU v5 lite': 197e12, 'TPU v5e': 197e12, 'TPU v5': 459e12, 'TPU v5p': 459e12,
              'TPU v6 lite': 918e12, 'TPU v6e': 918e12, 'TPU7x': 2307e12 / 2, 'NVIDIA H100 80GB HBM3': 989e12}


@dataclasses.dataclass(frozen=True)
class Timing:
    """Of one implementation. Seconds a call; FLOP/s count the pairs that the mask lets through, whatever was computed.

    difference: of the outputs from those of the first implementation, the largest; None for another mask.
    """

    name: str
    forward_seconds: float
    both_seconds: float
    forward_flops_per_second: float
    both_flops_per_second: float
    difference: float | None


def forward_flops(key_range: KeyRange, num_heads: int, head_dim: int) -> int:
    """FLOPs of the forward pass: two products of `head_dim` multiply-adds for each head and pair of query and key.

    The backward pass has five such products, one of them the scores again: 2.5 times as many.
    """
    return 4 * true_area(key_range) * num_heads * head_dim


def peak_flops(dtype: str) -> float | None:
    """What the present device can do at most; None where that is not known."""
    return PEAK_FLOPS.get(jax.devices()[0].device_kind) if dtype == 'bfloat16' else None


def compare(case: Case, implementations: Sequence[str], repeats: int, baselines: bool = True,
            progress: Callable[..., Any] = functools.partial(tqdm.tqdm, disable=True),
            ) -> tuple[list[Timing], dict[str, str]]:
    """(the timings, what could not run with the reason), our implementations first.

    Args:
        progress: a tqdm-like class; default: shows nothing.
    """
    makers = {name: lambda case, name=name: range_attention(case, name) for name in implementations}
    makers |= BASELINES if baselines else {}
    sides, outputs, reasons = _warm_up(case, makers, progress(total=2 * len(makers), desc='compiling'))
    calls = {(name, way): getattr(side, way) for name, side in sides.items() for way in ('forward', 'both')}
    with progress(total=len(calls) * (1 + repeats), desc='timing') as bar:
        seconds = median_seconds(calls, repeats, bar.update)
    flops = forward_flops(case.key_range, *case.q.shape[2:])
    seen = np.asarray(case.key_range.stop > case.key_range.start)[..., None, None]
    first = next(iter(outputs.values()), None)
    timings = []
    for name, side in sides.items():
        forward, both = seconds[name, 'forward'], seconds[name, 'both']
        difference = float(np.abs(np.where(seen, outputs[name] - first, 0)).max()) if side.same_mask else None
        timings.append(Timing(name, forward, both, flops / forward, 3.5 * flops / both, difference))
    return timings, reasons


def _warm_up(case: Case, makers: Mapping[str, Callable[[Case], Side]], progress: Any):
    """(sides, their outputs, reasons of those that cannot run): each has run both ways once."""
    sides, outputs, reasons = {}, {}, {}
    with progress as bar:
        for name, make in makers.items():
            try:
                side = make(case)
                out = side.computed(side.forward())
                bar.update()
                jax.block_until_ready(side.both())
                bar.update()
            except (ValueError, NotImplementedError, ImportError, RuntimeError) as error:  # no memory is a RuntimeError
                reasons[name] = (str(error).splitlines() or [''])[0] or type(error).__name__
            else:
                sides[name], outputs[name] = side, out
    return sides, outputs, reasons
