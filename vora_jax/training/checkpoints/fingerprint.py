"""Content hash of a sharded tree.

Computed where the arrays lie: exact integer sums do not depend on how an array is cut, so every mesh gives
the same hash and nothing is gathered.
"""
import hashlib

import jax
import jax.numpy as jnp
import numpy as np

from vora_jax.params import flatten
from vora_jax.types import Array, Params

_LANES = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F)  # odd: four independent 32-bit sums a leaf


def content_hash(params: Params) -> str:
    """sha256 (hex) over paths, shapes, dtypes and contents; '' for an empty tree."""
    flat = flatten(params)
    if not flat:
        return ''
    sums = jax.device_get(jax.jit(lambda leaves: {path: _sums(x) for path, x in leaves.items()})(flat))
    digest = hashlib.sha256()
    for path, leaf in flat.items():
        digest.update(f'{path} {leaf.shape} {leaf.dtype} '.encode() + np.asarray(sums[path]).tobytes())
    return digest.hexdigest()


def _sums(x: Array) -> Array:
    """u32[4]: sums over elements of a mix of their bits and their place."""
    same_size = {2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(x, same_size).astype(jnp.uint32)
    place, stride = jnp.zeros(x.shape, jnp.uint32), 1
    for dim in reversed(range(x.ndim)):
        place += jax.lax.broadcasted_iota(jnp.uint32, x.shape, dim) * jnp.uint32(stride % 2**32)
        stride *= x.shape[dim]
    mixed = [_mix(bits ^ _mix(place * jnp.uint32(lane) + jnp.uint32(lane))) for lane in _LANES]
    return jnp.stack([jnp.sum(each, dtype=jnp.uint32) for each in mixed])


def _mix(x: Array) -> Array:
    """murmur3's finaliser: every bit of the result depends on every bit of x."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
