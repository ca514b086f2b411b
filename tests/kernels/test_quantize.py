"""Eight-bit vectors against what the formats can hold."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kernels_pallas import is_quantized, quantize, vector_bytes

vectors = hnp.arrays(np.float32, (3, 8), elements=st.floats(-1e4, 1e4, width=32, allow_subnormal=False))


def representable(dtype) -> np.ndarray:
    numbers = np.arange(256, dtype=np.uint8).view(jnp.dtype(dtype)).astype(np.float64)
    return np.unique(numbers[np.isfinite(numbers)])


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
@settings(max_examples=200)
@given(x=vectors)
def test_each_element_is_the_nearest_that_the_format_holds(dtype, x):
    values, scales = quantize(jnp.asarray(x), jnp.dtype(dtype))
    assert (values.dtype, values.shape, scales.dtype, scales.shape) == (dtype, (3, 8), jnp.float32, (3,))
    values, scales = np.asarray(values).astype(np.float64), np.asarray(scales, np.float64)
    numbers = representable(dtype)
    numbers = numbers[numbers >= -numbers.max()]  # int8's -128 is not used
    np.testing.assert_allclose(scales, np.abs(x).max(-1) / numbers.max(), rtol=1e-6, atol=1e-37)
    for row, stored, scale in zip(x, values, scales, strict=True):
        if scale == 0:
            assert not stored.any()
            continue
        least = np.abs(row[:, None] / scale - numbers).min(-1)
        np.testing.assert_allclose(np.abs(row / scale - stored), least, rtol=1e-4, atol=1e-4)


def test_the_largest_of_a_vector_is_kept():
    x = jnp.asarray([[3.0, -7.5, 1.0], [-2e-9, 0, 1e-9], [0, 0, 0]])
    for dtype in (jnp.int8, jnp.float8_e4m3fn):
        values, scales = quantize(x, dtype)
        back = np.asarray(values.astype(jnp.float32) * scales[:, None])
        np.testing.assert_allclose(np.abs(back).max(-1), [7.5, 2e-9, 0], rtol=1e-6)


def test_bytes():
    assert not any(map(is_quantized, ("float32", "bfloat16", "float16")))
    assert [vector_bytes(128, dtype) for dtype in ("bfloat16", "int8", jnp.float8_e4m3fn)] == [256, 132, 132]
