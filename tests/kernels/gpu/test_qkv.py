"""The fused pass over the projection on the GPU, against its parts in plain jnp."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import QKNorm, quantize, reference
from kernels_pallas.attention import rotated_qkv
from kernels_pallas.gpu.qkv import rotate_and_write
from tests.kernels.gpu import paged

pytestmark = pytest.mark.gpu


SHAPES = [  # T, H, K, D, N
    (64, 16, 8, 128, 16),
    (1, 32, 8, 128, 64),
    (130, 9, 3, 64, 16),
    (33, 4, 1, 256, 32),
    (7, 64, 8, 128, 16),
]


def case(T, H, K, D, N, normed, dtype):
    """Arguments of rotate_and_write, and what its parts in plain jnp make of them: q, k, v."""
    rng = np.random.default_rng()
    B = T // N + 5
    qkv = jnp.asarray(rng.normal(size=(T, H + 2 * K, D)), jnp.bfloat16)
    angles = jnp.asarray(rng.normal(size=(T, D // 2)) * 30, jnp.float32)
    tables = jnp.cos(angles), jnp.sin(angles)
    weights = tuple(jnp.asarray(rng.normal(size=D), jnp.bfloat16) for _ in range(2)) if normed else None
    cache = tuple(
        jnp.asarray(rng.normal(size=x.shape) * 9, x.dtype) for x in reference.cache_shape(B, N, K, D, jnp.dtype(dtype))
    )
    place = rng.permutation(B * N)[:T]
    block, offset = (jnp.asarray(x, jnp.int32) for x in (place // N, place % N))
    norms = QKNorm(*weights, 1e-6, 1.0) if normed else None
    parts = jax.jit(rotated_qkv, static_argnums=3)(qkv, tuple(t[:, None] for t in tables), norms, H)
    write = jax.jit(partial(rotate_and_write, num_heads=H, epsilon=1e-6, norm_offset=1.0))
    return partial(write, qkv, tables, weights), cache, block, offset, parts


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_its_parts(shape, normed):
    write, cache, block, offset, (q, k, v) = case(*shape, normed, jnp.bfloat16)
    expected = q, cache[0].at[block, :, offset].set(k), cache[1].at[block, :, offset].set(v)
    ours = write(cache, block, offset)
    ours = ours[0], *ours[1]
    for x, y in zip(ours, expected, strict=True):
        assert paged.error(x, y) < 1e-2
    np.testing.assert_array_equal(ours[2].astype(jnp.float32), expected[2].astype(jnp.float32))


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_eight_bits_are_those_of_quantize(shape, dtype, normed):
    write, cache, block, offset, parts = case(*shape, normed, dtype)
    q, ours = write(cache, block, offset)
    assert paged.error(q, parts[0]) < 1e-2
    for which, part in enumerate(parts[1:]):
        values, scales = (x[block, :, offset] for x in (ours[which], ours[2 + which]))
        expected, expected_scales = jax.jit(quantize, static_argnums=1)(part, dtype)
        if which == 1:  # nothing turned it
            np.testing.assert_array_equal(values.astype(jnp.float32), expected.astype(jnp.float32))
            np.testing.assert_array_equal(scales, expected_scales)
        np.testing.assert_allclose(scales, expected_scales, rtol=2e-2)
        step = {"int8": 1 / 127, "float8_e4m3fn": 1 / 14}[dtype]  # of the largest element, from one number to the next
        numbers = values.astype(jnp.float32) * scales[..., None]
        close = np.abs(numbers - part.astype(jnp.float32)) <= (step / 2 + 1e-2) * np.abs(part).max(-1, keepdims=True)
        assert np.asarray(close).all()
    untouched = np.ones(cache[0].shape[:3], bool)
    untouched[np.asarray(block), :, np.asarray(offset)] = False
    for x, y in zip(ours, cache, strict=True):
        np.testing.assert_array_equal(np.asarray(x, np.float32)[untouched], np.asarray(y, np.float32)[untouched])
