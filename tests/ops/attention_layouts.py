"""Random key ranges, and what attention over them is: float64, from the definition."""
import numpy as np
from hypothesis import strategies

from vora_jax.ops import blocked_attention
from vora_jax.ops.attention import softmax_delta
from vora_jax.types import KeyRange

# A row is a list of runs. A `segment` run begins a sample; text is causal; an image's slots see all of it; a gap is padding.
RUNS = strategies.lists(
    strategies.tuples(strategies.sampled_from(('segment', 'text', 'image', 'gap')), strategies.integers(1, 150)),
    min_size=1, max_size=12)


@strategies.composite
def layouts(draw, rows: int, num_queries: int, num_keys: int) -> KeyRange:
    """Key ranges of packed rows of `num_keys` slots, seen from `num_queries` slots in a row of each.

    Images see what is before them in their segment and themselves, or (`own_only`) themselves alone, so that the queries
    that see a key need not be neighbours.
    """
    whole = [row_ranges(draw(RUNS), num_keys, draw(strategies.booleans())) for _ in range(rows)]
    first = draw(strategies.integers(0, max(0, num_keys - num_queries)))
    start, stop = (np.zeros((rows, num_queries), np.int32) for _ in range(2))
    seen = min(num_queries, num_keys - first)
    for row, (starts, stops) in enumerate(whole):
        start[row, :seen], stop[row, :seen] = starts[first:first + seen], stops[first:first + seen]
    return KeyRange(start, stop)


def row_ranges(runs, num_slots: int, own_only: bool = False):
    """(start, stop) i32[S] of a row made of runs, repeated until it is full."""
    start, stop = np.zeros((2, num_slots), np.int32)
    slot = segment = 0
    while slot < num_slots:
        for kind, length in runs:
            end = min(slot + length, num_slots)
            if kind == 'segment':
                segment = slot
            if kind == 'image':
                start[slot:end], stop[slot:end] = slot if own_only else segment, end
            elif kind != 'gap':
                start[slot:end], stop[slot:end] = segment, np.arange(slot + 1, end + 1)
            slot = end
    return start, stop


def brute_force_mask(key_range: KeyRange, num_keys: int) -> np.ndarray:
    """bool[B, T, S], slot by slot."""
    rows, num_queries = key_range.start.shape
    mask = np.zeros((rows, num_queries, num_keys), bool)
    for b in range(rows):
        for t in range(num_queries):
            mask[b, t, key_range.start[b, t]:key_range.stop[b, t]] = True
    return mask


def dense(q, k, v, d_out, mask, soft_cap=None):
    """(out, (d_q, d_k, d_v)) in float64 NumPy, written from the definition."""
    q, k, v, d_out = (np.asarray(x, np.float64) for x in (q, k, v, d_out))
    group, scale = q.shape[2] // k.shape[2], q.shape[-1] ** -0.5
    q, d_out = (x.transpose(0, 2, 1, 3) for x in (q, d_out))
    wide_k, wide_v = (np.repeat(x, group, axis=2).transpose(0, 2, 1, 3) for x in (k, v))
    scores, slope = q @ wide_k.swapaxes(2, 3) * scale, 1.0
    if soft_cap is not None:
        scores = soft_cap * np.tanh(scores / soft_cap)
        slope = 1 - (scores / soft_cap) ** 2
    scores = np.where(mask[:, None], scores, -np.inf)
    peak = np.where(mask.any(-1)[:, None], scores.max(-1), 0)
    weights = np.exp(scores - peak[..., None])
    weights = weights / np.maximum(weights.sum(-1, keepdims=True), 1e-300)
    out = weights @ wide_v
    d_weights = d_out @ wide_v.swapaxes(2, 3)
    d_scores = weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True)) * slope * scale
    d_q = d_scores @ wide_k
    d_k, d_v = d_scores.swapaxes(2, 3) @ q, weights.swapaxes(2, 3) @ d_out
    d_k, d_v = (x.transpose(0, 2, 1, 3).reshape(*k.shape[:3], group, -1).sum(3) for x in (d_k, d_v))
    return out.transpose(0, 2, 1, 3), (d_q.transpose(0, 2, 1, 3), d_k, d_v)


def both_ways(module, forward_options=(), backward_options=()):
    """(q, k, v, d_out, key_range, soft_cap) -> (out, (d_q, d_k, d_v)) of an implementation's module."""
    def run(q, k, v, d_out, key_range, soft_cap=None):
        out, log_sum = module.forward(q, k, v, key_range, soft_cap, **dict(forward_options))
        delta = softmax_delta(out, d_out)
        return out, module.backward(q, k, v, key_range, log_sum, delta, d_out, soft_cap, **dict(backward_options))
    return run


def in_blocks(query_block, key_block):
    """`both_ways` of blocked attention with small blocks."""
    options = {'query_block': query_block, 'key_block': key_block}
    return both_ways(blocked_attention, options, options)


def relative_error(actual, expected, least: float = 0.0) -> float:
    """max |a - b| / max |b|, or / `least` where that is more."""
    return np.abs(np.asarray(actual, np.float64) - expected).max() / max(np.abs(expected).max(), least, 1e-30)
