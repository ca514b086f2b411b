"""What a product leaves for the next one in the place of a norm."""

import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import Normed, array_of, rms_norm


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=str)
def test_it_is_the_norm_once_it_is_divided(dtype, offset):
    rng = np.random.default_rng()
    x, weight = (jnp.asarray(rng.standard_normal(shape) * 3, dtype) for shape in ((5, 96), (96,)))
    wide = x.astype(jnp.float32)
    scaled = (wide * (weight.astype(jnp.float32) + offset)).astype(dtype)
    squares = jnp.square(wide).reshape(5, 12, 8).sum(axis=2)
    found = np.asarray(array_of(Normed(scaled, squares, 1e-5)), np.float64)
    expected = np.asarray(rms_norm(x, weight, 1e-5, offset), np.float64)
    np.testing.assert_allclose(found, expected, rtol=3 * jnp.finfo(dtype).eps, atol=1e-7)
    assert array_of(x) is x
