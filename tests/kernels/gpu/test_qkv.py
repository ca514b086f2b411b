"""The fused pass over the projection on the GPU, against its parts in plain jnp."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import QKNorm, quantize, reference, sum_parts
from kernels_pallas.attention import rotated_qkv
from kernels_pallas.gpu.qkv import rotate_and_write
from tests.kernels.gpu import paged

pytestmark = pytest.mark.gpu


SHAPES = [  # T, H, K, D, N, parts of the projection
    (64, 16, 8, 128, 16, 1),
    (1, 32, 8, 128, 64, 4),
    (130, 9, 3, 64, 16, 3),
    (33, 4, 1, 256, 32, 1),
    (7, 64, 8, 128, 16, 2),
    (3, 2, 1, 128, 16, 1),
]


def case(T, H, K, D, N, num_parts, normed, cache_dtype, dtype="bfloat16"):
    """Arguments of rotate_and_write, and what its parts in plain jnp make of them: q, k, v."""
    rng = np.random.default_rng()
    B = T // N + 5
    parts = jnp.asarray(rng.normal(size=(num_parts, T, H + 2 * K, D)), "float32" if num_parts > 1 else dtype)
    angles = jnp.asarray(rng.normal(size=(T, D // 2)) * 30, jnp.float32)
    tables = jnp.cos(angles), jnp.sin(angles)
    weights = tuple(jnp.asarray(rng.normal(size=D), dtype) for _ in range(2)) if normed else None
    cache = tuple(
        jnp.asarray(rng.normal(size=x.shape) * 9, x.dtype)
        for x in reference.cache_shape(B, N, K, D, jnp.dtype(cache_dtype))
    )
    place = rng.permutation(B * N)[:T]
    block, offset = (jnp.asarray(x, jnp.int32) for x in (place // N, place % N))
    norms = QKNorm(*weights, 1e-6, 1.0) if normed else None
    by_parts = jax.jit(lambda parts, *args: rotated_qkv(sum_parts(parts, dtype), *args, H))
    expected = by_parts(parts, tuple(t[:, None] for t in tables), norms)
    options = {"num_heads": H, "dtype": jnp.dtype(dtype), "epsilon": 1e-6, "norm_offset": 1.0}
    return (
        partial(jax.jit(partial(rotate_and_write, **options)), parts, tables, weights),
        cache,
        block,
        offset,
        expected,
    )


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_agrees_with_its_parts(shape, normed, dtype):
    write, cache, block, offset, (q, k, v) = case(*shape, normed, dtype, dtype)
    our_q, ours = write(cache, block, offset)
    our_k, our_v = (x[block, :, offset] for x in ours)
    assert paged.error(our_q, q) < 1e-2
    assert paged.error(our_k, k) < 1e-2
    np.testing.assert_array_equal(our_v.astype(jnp.float32), v.astype(jnp.float32))
    check_the_rest(ours, cache, block, offset)


def check_the_rest(ours, cache, block, offset):
    """Of the cache is as it was."""
    untouched = np.ones((cache[0].shape[0], cache[0].shape[2]), bool)
    untouched[np.asarray(block), np.asarray(offset)] = False
    for x, y in zip(ours, cache, strict=True):
        x, y = (np.moveaxis(np.asarray(z, np.float32), 1, 2)[untouched] for z in (x, y))
        np.testing.assert_array_equal(x, y)


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
    check_the_rest(ours, cache, block, offset)
