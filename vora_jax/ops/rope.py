"""Rotary position embedding, half-split layout."""
import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp

from vora_jax.types import UserError


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for contexts longer than those trained first.

    kind: 'linear' divides every frequency by `factor` (Chen et al. 2023); 'llama3' divides those whose wavelength
        exceeds `original_max_positions / low_freq_factor`, keeps those below `original_max_positions / high_freq_factor`
        and blends in between (Llama 3.1).
    original_max_positions: context length of the first training, slots; read by 'llama3' only.
    """

    factor: float
    kind: Literal['linear', 'llama3'] = 'llama3'
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192

    def __post_init__(self):
        if self.factor < 1 or self.low_freq_factor >= self.high_freq_factor:
            raise UserError(f'RopeScaling: factor {self.factor} must be at least 1, and low_freq_factor '
                            f'{self.low_freq_factor} below high_freq_factor {self.high_freq_factor}.')


def rope_angles(positions: jax.Array, head_dim: int, theta: float,
                scaling: RopeScaling | None = None) -> tuple[jax.Array, jax.Array]:
    """(cos, sin), each f32[B, S, head_dim / 2], of `positions: i32[B, S]` (Su et al. 2021, base `theta`)."""
    exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    frequencies = 1.0 / theta**exponents
    if scaling is not None:
        frequencies = scaled_frequencies(frequencies, scaling)
    angles = positions.astype(jnp.float32)[..., None] * frequencies[None, None]
    return jnp.cos(angles), jnp.sin(angles)


def scaled_frequencies(frequencies: jax.Array, scaling: RopeScaling) -> jax.Array:
    """f32[H / 2]: the rotary frequencies after scaling."""
    if scaling.kind == 'linear':
        return frequencies / scaling.factor
    turns = scaling.original_max_positions * frequencies / (2 * math.pi)  # wavelengths in the original context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1.0 - kept) * frequencies / scaling.factor + kept * frequencies


def apply_rope(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates `x: f[B, S, heads, head_dim]`; pairs are (i, i + head_dim / 2) as in Llama and Qwen checkpoints."""
    cos, sin = (a[:, :, None, :] for a in angles)
    # Not fused with what makes x (biases, adapters, switches): compilers then contract these products in other ways, and a
    # model with its adapters off would differ from the plain one in the last bit (XLA of jax 0.12 on CPUs).
    x = jax.lax.optimization_barrier(x)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
