"""Attention over key ranges on GPUs: Pallas kernels in the Triton lowering, Hopper first.

One program owns one tile of queries (of keys, for d_k and d_v) of one head and loops over the tiles it meets:

    forward   for a query tile: over its key tiles          scores -> online softmax -> sums of out     out, log_sum
    d_q       for a query tile: over its key tiles          scores, weights -> d_scores @ k             d_q
    d_kv      for a key tile: over its query tiles x heads  the same, transposed -> sums over heads     d_k, d_v

Triton has no scalar prefetch and no traced grid: the grid is static, and index maps cannot read the mask. So the walk is a
loop within the program, whose bounds are data. XLA lists the tiles that each program visits (`_visits`), those that need a
mask first and then the full ones, and a program is two loops over its list, the second without mask work. The lists are
exact: nothing is visited for a hole in a column (text before an image is seen by what follows the image, not by the image
itself). To read a tile's number costs 17 of some 600 instructions of a visit; the mask costs 270.

The scale is folded into the exponent of 2: a weight is one multiply-add and one exp2. Sums are f32; weights are rounded to
the inputs' dtype for the second product; f32 inputs are multiplied in full.
"""
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from vora_jax.ops.key_range import MASKED
from vora_jax.ops.tile_walk import Tile, tile_map
from vora_jax.types import KeyRange

LOG2_E = math.log2(math.e)
MIN_SIDE = 16  # of an operand of a product on tensor cores
MAX_HEAD_DIM = 256
COUNTS = 2  # words before the tiles in a list of visits


class Axis(NamedTuple):
    """Slots of queries or keys: how many there are, and the side of a tile."""

    length: int
    side: int

    @property
    def tiles(self) -> int:
        return pl.cdiv(self.length, self.side)


class Problem(NamedTuple):
    """What kernels know when they are compiled."""

    queries: Axis
    keys: Axis
    group: int
    head_dim: int
    soft_cap: float | None

    @property
    def unit(self) -> float:
        """What makes scores of `_scores` exponents of e."""
        return self.head_dim**-0.5 if self.soft_cap is None else self.soft_cap


class Schedule(NamedTuple):
    """How a kernel is run: its tile, the warps that share it, and how many tiles are on their way from memory at once."""

    tile: Tile
    num_warps: int
    num_stages: int


def refuses(q, k, v) -> str:
    """Why these inputs cannot be served; '' where they can."""
    if q.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f'it takes float32, bfloat16 and float16, not {q.dtype}'
    if k.dtype != q.dtype or v.dtype != q.dtype:
        return f'it takes q, k and v of one dtype, not {q.dtype}, {k.dtype} and {v.dtype}'
    if q.shape[-1] > MAX_HEAD_DIM:
        return f'a head dim of {q.shape[-1]} leaves too few registers, {MAX_HEAD_DIM} is the largest'
    return ''


def forward(q, k, v, key_range: KeyRange, soft_cap: float | None = None, *, tile: Tile | None = None,
            interpret: bool = False):
    """(out, log_sum), as `ops.attention.Kernels.forward` has it. interpret: evaluate on any platform, slowly (tests)."""
    batch, num_queries, num_heads, _ = q.shape
    log_sum = jax.ShapeDtypeStruct((batch, num_heads, num_queries), jnp.float32)
    run = functools.partial(_run, schedule=_schedule('forward', q, tile), soft_cap=soft_cap, interpret=interpret)
    return tuple(run(_forward_kernel, (q, k, v), key_range, (q, log_sum)))


def backward(q, k, v, key_range: KeyRange, log_sum, delta, d_out, soft_cap: float | None = None, *,
             tile: Tile | None = None, interpret: bool = False):
    """(d_q, d_k, d_v), as `ops.attention.Kernels.backward` has it."""
    run = functools.partial(_run, soft_cap=soft_cap, interpret=interpret)
    arrays = (q, k, v, d_out.astype(q.dtype), log_sum, delta)
    d_q, = run(_d_q_kernel, arrays, key_range, (q,), schedule=_schedule('d_q', q, tile))
    d_k, d_v = run(_d_kv_kernel, arrays, key_range, (k, v), schedule=_schedule('d_kv', q, tile), by_key=True)
    return d_q, d_k, d_v


# For heads of up to 64, 128 and 256. A tile of 128 slots does 128 operations or more per byte that it reads of the others:
# smaller ones wait for the L2 cache. An H100's registers hold these without spilling, but for some words of d_kv with a
# soft cap from 128 on; larger tiles of d_kv do not fit.
SCHEDULES = {
    'forward': (Schedule(Tile(128, 64), 4, 3), Schedule(Tile(128, 64), 8, 3), Schedule(Tile(128, 64), 8, 2)),
    'd_q': (Schedule(Tile(128, 64), 8, 3), Schedule(Tile(128, 64), 8, 2), Schedule(Tile(128, 32), 8, 2)),
    'd_kv': (Schedule(Tile(64, 128), 8, 2), Schedule(Tile(64, 128), 8, 2), Schedule(Tile(32, 64), 8, 2)),
}
# Full f32 has no tensor cores: operands of products are held in registers.
FULL_PRECISION = {'forward': Schedule(Tile(32, 16), 8, 2), 'd_q': Schedule(Tile(32, 16), 8, 2),
                  'd_kv': Schedule(Tile(16, 32), 8, 2)}


def _schedule(kernel: str, q, tile: Tile | None) -> Schedule:
    size = sum(q.shape[-1] > limit for limit in (64, 128))
    default = FULL_PRECISION[kernel] if q.dtype == jnp.float32 else SCHEDULES[kernel][size]
    return default if tile is None else default._replace(tile=tile)


def _power_of_two(size: int) -> int:
    """The side of an array in a kernel: Triton's are powers of two. Heads of 80 are loaded as 128, of which 48 are 0."""
    return max(MIN_SIDE, pl.next_power_of_2(size))


def _run(kernel, arrays, key_range: KeyRange, results, *, schedule: Schedule, soft_cap: float | None, interpret: bool,
         by_key: bool = False):
    """What `kernel` computes from `arrays`: arrays like `results`, a program for each of their tiles, heads and rows.

    Programs of neighbouring tiles are neighbours: they read the same keys. A program gets the arrays of its row whole, and
    loads what it visits.
    """
    q, k = arrays[:2]
    tile = schedule.tile
    problem = Problem(Axis(q.shape[1], min(tile.queries, _power_of_two(q.shape[1]))),
                      Axis(k.shape[1], min(tile.keys, _power_of_two(k.shape[1]))),
                      q.shape[2] // k.shape[2], q.shape[3], soft_cap)
    added = problem.queries.tiles * problem.queries.side - q.shape[1]  # queries that fill the last tile see nothing
    key_range = KeyRange(*(jnp.pad(x, ((0, 0), (0, added))) for x in key_range))
    visits = _visits(key_range, problem, by_key)

    def row_of(x):
        sides = (*x.shape[1:3], _power_of_two(x.shape[3])) if x.ndim == 4 else x.shape[1:]
        return pl.BlockSpec((None, *sides), lambda tile, head, row: (row, *[0] * len(sides)))

    inputs = (visits, *key_range, *arrays)
    return pl.pallas_call(
        functools.partial(kernel, problem=problem), name=kernel.__name__.strip('_'),
        grid=(visits.shape[1], results[0].shape[2], q.shape[0]),
        in_specs=[row_of(x) for x in inputs], out_specs=[row_of(x) for x in results],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results], interpret=interpret,
        compiler_params=plgpu.CompilerParams(num_warps=schedule.num_warps, num_stages=schedule.num_stages),
    )(*inputs)


def _visits(key_range: KeyRange, problem: Problem, by_key: bool):
    """i32[B, query tiles, 2 + key tiles] (by_key: i32[B, key tiles, 2 + query tiles]): what each program visits.

    Two counts, of visits with a mask and of all visits, then the tiles: those with a mask, the full ones, the rest. A last
    key tile that S does not fill is never full: no range reaches beyond S.
    """
    some, every = tile_map(key_range, problem.keys.tiles * problem.keys.side, Tile(problem.queries.side, problem.keys.side))
    kind = jnp.where(some, every.astype(jnp.int32), 2)
    kind = kind.swapaxes(1, 2) if by_key else kind
    tiles = jnp.argsort(kind, axis=-1, stable=True).astype(jnp.int32)
    masked, visited = (jnp.sum(kind < end, axis=-1, keepdims=True, dtype=jnp.int32) for end in (1, 2))
    return jnp.concatenate([masked, visited, tiles], axis=-1)


def _forward_kernel(visits_ref, start_ref, stop_ref, q_ref, k_ref, v_ref, out_ref, log_sum_ref, *, problem: Problem):
    tile, head = pl.program_id(0), pl.program_id(1)
    kv_head = jax.lax.div(head, problem.group)
    to_log2 = problem.unit * LOG2_E
    q = _load(q_ref, tile, head, problem.queries, problem)
    start, stop = (_load_range(ref, tile, problem)[:, None] for ref in (start_ref, stop_ref))

    def visit(index, sums, masked):
        peak, total, out = sums
        key_tile = visits_ref[tile, COUNTS + index]
        k = _load(k_ref, key_tile, kv_head, problem.keys, problem, masked)
        scores = _scores(q, k, problem)
        if masked:
            keys = _slots(key_tile, problem.keys)[None, :]
            scores = jnp.where((start <= keys) & (keys < stop), scores, -jnp.inf)
        new_peak = jnp.maximum(peak, jnp.max(scores, axis=1))
        weights = jnp.exp2((scores - new_peak[:, None]) * to_log2)
        shrink = jnp.exp2((peak - new_peak) * to_log2)
        v = _load(v_ref, key_tile, kv_head, problem.keys, problem, masked)
        out = out * shrink[:, None] + _dot(weights.astype(v.dtype), v)
        return new_peak, total * shrink + jnp.sum(weights, axis=1), out

    rows = problem.queries.side
    sums = (jnp.full(rows, MASKED, jnp.float32), jnp.zeros(rows, jnp.float32), jnp.zeros(q.shape, jnp.float32))
    peak, total, out = _walk(visits_ref, visit, sums)
    safe = jnp.where(total > 0, total, 1.0)  # a query that sees nothing has none
    _store(out_ref, tile, head, out / safe[:, None], problem.queries, problem)
    log_sum = jnp.where(total > 0, peak * problem.unit + jnp.log(safe), MASKED)
    place = pl.ds(tile * problem.queries.side, problem.queries.side)
    plgpu.store(log_sum_ref.at[head, place], log_sum, mask=_inside(tile, problem.queries))


def _d_q_kernel(visits_ref, start_ref, stop_ref, q_ref, k_ref, v_ref, d_out_ref, log_sum_ref, delta_ref, d_q_ref,
                *, problem: Problem):
    tile, head = pl.program_id(0), pl.program_id(1)
    kv_head = jax.lax.div(head, problem.group)
    q, d_out = (_load(ref, tile, head, problem.queries, problem) for ref in (q_ref, d_out_ref))
    start, stop = (_load_range(ref, tile, problem)[:, None] for ref in (start_ref, stop_ref))
    log_sum, delta = (_load_row(ref, tile, head, problem)[:, None] for ref in (log_sum_ref, delta_ref))

    def visit(index, d_q, masked):
        key_tile = visits_ref[tile, COUNTS + index]
        k, v = (_load(ref, key_tile, kv_head, problem.keys, problem, masked) for ref in (k_ref, v_ref))
        scores = _scores(q, k, problem)
        weights = jnp.exp2(jnp.minimum((scores * problem.unit - log_sum) * LOG2_E, 0.0))
        if masked:
            keys = _slots(key_tile, problem.keys)[None, :]
            weights = jnp.where((start <= keys) & (keys < stop), weights, 0.0)
        d_scores = weights * (_dot(d_out, v.T) - delta) * _slope(scores, problem)
        return d_q + _dot(d_scores.astype(k.dtype), k)

    d_q = _walk(visits_ref, visit, jnp.zeros(q.shape, jnp.float32))
    _store(d_q_ref, tile, head, d_q * problem.head_dim**-0.5, problem.queries, problem)


def _d_kv_kernel(visits_ref, start_ref, stop_ref, q_ref, k_ref, v_ref, d_out_ref, log_sum_ref, delta_ref, d_k_ref, d_v_ref,
                 *, problem: Problem):
    tile, kv_head = pl.program_id(0), pl.program_id(1)
    k, v = (_load(ref, tile, kv_head, problem.keys, problem) for ref in (k_ref, v_ref))
    keys = _slots(tile, problem.keys)[:, None]

    def visit(index, sums, masked):  # a query tile's heads one after another: they are neighbours in memory
        d_k, d_v = sums
        query_tile = visits_ref[tile, COUNTS + jax.lax.div(index, problem.group)]
        head = kv_head * problem.group + jax.lax.rem(index, problem.group)
        q, d_out = (_load(ref, query_tile, head, problem.queries, problem, masked) for ref in (q_ref, d_out_ref))
        log_sum, delta = (_load_row(ref, query_tile, head, problem, masked)[None, :] for ref in (log_sum_ref, delta_ref))
        scores = _scores(k, q, problem)
        weights = jnp.exp2(jnp.minimum((scores * problem.unit - log_sum) * LOG2_E, 0.0))
        if masked:
            start, stop = (_load_range(ref, query_tile, problem)[None, :] for ref in (start_ref, stop_ref))
            weights = jnp.where((start <= keys) & (keys < stop), weights, 0.0)
        d_v = d_v + _dot(weights.astype(d_out.dtype), d_out)
        d_scores = weights * (_dot(v, d_out.T) - delta) * _slope(scores, problem)
        return d_k + _dot(d_scores.astype(q.dtype), q), d_v

    zeros = jnp.zeros(k.shape, jnp.float32)
    d_k, d_v = _walk(visits_ref, visit, (zeros, zeros), problem.group)
    _store(d_k_ref, tile, kv_head, d_k * problem.head_dim**-0.5, problem.keys, problem)
    _store(d_v_ref, tile, kv_head, d_v, problem.keys, problem)


def _walk(visits_ref, visit, sums, repeats: int = 1):
    """`sums` after all visits of the program's tile, each made `repeats` times."""
    masked, visited = (visits_ref[pl.program_id(0), word] * repeats for word in range(COUNTS))
    sums = jax.lax.fori_loop(0, masked, functools.partial(visit, masked=True), sums)
    return jax.lax.fori_loop(masked, visited, functools.partial(visit, masked=False), sums)


def _scores(a, b, problem: Problem):
    """f32 unscaled scores, or what the soft cap leaves of them, in [-1, 1]. Times `problem.unit`: exponents of e."""
    scores = _dot(a, b.T)
    if problem.soft_cap is None:
        return scores
    # tanh(x) = 1 - 2 / (exp(2 x) + 1): a quarter of the instructions of `tanh`; errors are some 1e-7 of the cap.
    return 1.0 - 2.0 / (jnp.exp2(scores * (2 * LOG2_E * problem.head_dim**-0.5 / problem.soft_cap)) + 1.0)


def _slope(scores, problem: Problem):
    """The derivative of the soft cap."""
    return 1.0 if problem.soft_cap is None else 1.0 - scores * scores


def _dot(a, b):
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)


def _slots(tile, axis: Axis):
    return tile * axis.side + jnp.arange(axis.side, dtype=jnp.int32)


def _inside(tile, axis: Axis):
    """bool[side]: which slots of a tile exist; None if all of every tile do."""
    return _slots(tile, axis) < axis.length if axis.length % axis.side else None


def _mask(tile, axis: Axis, width: int, problem: Problem, ragged: bool):
    """bool[side, width]: what exists of a tile of a head; None if all of it does."""
    inside = _inside(tile, axis) if ragged else None
    inside = None if inside is None else jnp.broadcast_to(inside[:, None], (axis.side, width))
    if width == problem.head_dim:
        return inside
    real = jnp.arange(width, dtype=jnp.int32) < problem.head_dim
    real = jnp.broadcast_to(real[None, :], (axis.side, width))
    return real if inside is None else inside & real


def _load(ref, tile, head, axis: Axis, problem: Problem, ragged: bool = True):
    """[side, H]: a tile of a head, 0 where nothing is. ragged: it may reach beyond the last slot; full tiles never do."""
    mask = _mask(tile, axis, ref.shape[-1], problem, ragged)
    place = ref.at[pl.ds(tile * axis.side, axis.side), head, :]
    return plgpu.load(place, mask=mask, other=None if mask is None else 0.0)


def _load_row(ref, tile, head, problem: Problem, ragged: bool = True):
    """f32[side]: one number per query of a tile."""
    mask = _inside(tile, problem.queries) if ragged else None
    place = ref.at[head, pl.ds(tile * problem.queries.side, problem.queries.side)]
    return plgpu.load(place, mask=mask, other=None if mask is None else 0.0)


def _load_range(ref, tile, problem: Problem):
    """i32[side]: starts or stops of a tile's queries; there are some for every slot of every tile."""
    return plgpu.load(ref.at[pl.ds(tile * problem.queries.side, problem.queries.side)])


def _store(ref, tile, head, value, axis: Axis, problem: Problem):
    place = ref.at[pl.ds(tile * axis.side, axis.side), head, :]
    plgpu.store(place, value.astype(ref.dtype), mask=_mask(tile, axis, value.shape[-1], problem, True))
