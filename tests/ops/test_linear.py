"""A matrix product and its own gradients."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import strict  # noqa: F401

from vora_jax.ops.linear import linear


@pytest.mark.parametrize('dtype,tolerance', [('float32', 1e-6), ('bfloat16', 0.02)])
def test_value_and_gradients_equal_the_plain_product(dtype, tolerance):
    rng = np.random.default_rng(0)
    x, cotangent = (jnp.asarray(rng.normal(size=(2, 5, width)), dtype) for width in (6, 4))
    kernel = jnp.asarray(rng.normal(size=(6, 4)), jnp.float32)
    y, pull = jax.vjp(linear, x, kernel)
    d_x, d_kernel = pull(cotangent)
    assert (y.dtype, d_x.dtype, d_kernel.dtype) == (x.dtype, x.dtype, kernel.dtype)
    wide_x, wide_kernel, wide = (np.asarray(z, np.float64) for z in (x, kernel.astype(dtype), cotangent))
    for actual, expected in ((y, wide_x @ wide_kernel), (d_x, wide @ wide_kernel.T),
                             (d_kernel, np.einsum('bsd,bsf->df', wide_x, wide))):
        error = np.abs(np.asarray(actual, np.float64) - expected).max() / np.abs(expected).max()
        assert error <= tolerance
