"""FLOPs of the matrix products that a jaxpr runs: an independent count.

Only equations whose results are used count (XLA drops the others), times the trips of the loops around them.
"""
import math

from jax.extend.core import Literal

CALLS = ('jit', 'pjit', 'checkpoint', 'remat2', 'custom_vjp_call', 'custom_jvp_call', 'closed_call', 'shard_map')
PLAIN = ('scatter-add', 'scatter', 'scatter_add', 'reduce', 'argmax', 'sort', 'reduce_precision')  # they run no products


def matmul_flops(closed, trips: int) -> int:
    """FLOPs of a closed jaxpr; loops whose length is data run `trips` times."""
    return _count(closed.jaxpr, [True] * len(closed.jaxpr.outvars), trips)[0]


def _count(jaxpr, used_out, trips):
    """(FLOPs, which of the inputs are used)."""
    live = {var for var, used in zip(jaxpr.outvars, used_out, strict=True) if used and not isinstance(var, Literal)}
    total = 0
    for eqn in reversed(jaxpr.eqns):
        used = [var in live for var in eqn.outvars]
        if not any(used):
            continue
        flops, used_in = _equation(eqn, used, trips)
        total += flops
        live |= {var for var, need in zip(eqn.invars, used_in, strict=True) if need and not isinstance(var, Literal)}
    return total, [var in live for var in jaxpr.invars]


def _equation(eqn, used, trips):
    name, params = eqn.primitive.name, eqn.params
    everything = [True] * len(eqn.invars)
    if name == 'dot_general':
        contracted = math.prod(eqn.invars[0].aval.shape[dim] for dim in params['dimension_numbers'][0][0])
        return 2 * math.prod(eqn.outvars[0].aval.shape) * contracted, everything
    if name == 'scan':
        consts, carry = _scan_inputs(params)
        flops, used_in = _loop(params['jaxpr'].jaxpr, used, consts, carry, trips)
        return flops * params['length'], used_in
    if name == 'while':
        cond_consts, consts = params['cond_nconsts'], params['body_nconsts']
        _, cond = _count(params['cond_jaxpr'].jaxpr, [True], trips)
        carry = [a or b for a, b in zip(used, cond[cond_consts:])]
        flops, used_in = _loop(params['body_jaxpr'].jaxpr, carry, consts, len(used), trips)
        return flops * trips, [*cond[:cond_consts], *used_in]
    if name == 'cond':
        counts = [_count(branch.jaxpr, used, trips) for branch in params['branches']]
        return max(flops for flops, _ in counts), [True, *map(any, zip(*(need for _, need in counts)))]
    if name in CALLS:
        body = next(value for value in params.values() if hasattr(value, 'eqns') or hasattr(value, 'jaxpr'))
        return _count(getattr(body, 'jaxpr', body), used, trips)
    assert name in PLAIN or not any(hasattr(value, 'eqns') or hasattr(value, 'jaxpr') for value in params.values()), name
    return 0, everything


def _scan_inputs(params):
    """How many constants and carried values come first among the inputs of a scan."""
    if 'num_consts' in params:
        return params['num_consts'], params['num_carry']
    consts, carry, _ = params['ft_in'].unpack()  # from JAX 0.12 on
    return len(consts), len(carry)


def _loop(body, used, consts, carry, trips):
    """A body whose carry is used where its next turn uses it."""
    used = list(used)
    while True:
        flops, used_in = _count(body, used, trips)
        grown = [a or b for a, b in zip(used[:carry], used_in[consts:consts + carry])]
        if grown == used[:carry]:
            return flops, used_in
        used[:carry] = grown
