"""Decode attention over eight-bit caches on the GPU, against the reference in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.gpu.decode_eight_bits import decode_eight_bits
from tests.kernels.gpu import paged
from tests.kernels.gpu.test_decode import EIGHT_BITS, LENS, SHAPES, case

pytestmark = pytest.mark.gpu

CACHES = ["int8", "float8_e4m3fn"]


@pytest.mark.parametrize(("shape", "options", "dtype", "cache_dtype"), EIGHT_BITS, ids=str)
def test_agrees_with_the_reference(shape, options, dtype, cache_dtype):
    seed = int(np.random.default_rng().integers(1 << 30))
    q, cache, kv_lens, tables, options = case(seed, *shape, dtype, cache_dtype, **options)
    jnp.full((1 << 28,), jnp.nan).block_until_ready()  # what is left unwritten is then NaN
    out = decode_eight_bits(q, cache, kv_lens, tables, **options)
    expected = paged.expected_decode(q, cache, kv_lens, tables, **options)
    assert paged.error(out, expected) < 1e-2, seed
    assert not np.asarray(out[LENS.index(0)]).any()


@pytest.mark.parametrize("cache_dtype", CACHES)
@pytest.mark.parametrize(("D", "dtype"), [(64, "bfloat16"), (128, "bfloat16"), (128, "float16"), (256, "bfloat16")])
def test_numbers_are_read_exactly(D, dtype, cache_dtype):
    """Every number of the format as an element of a value, and of a key."""
    numbers = np.arange(256, dtype=np.uint8).view(jnp.dtype(cache_dtype))
    numbers = numbers[np.isfinite(numbers.astype(np.float32))]
    numbers = jnp.asarray(np.resize(numbers, (4 * 64, D)))  # row r is numbers r * D to r * D + D - 1
    blocks = numbers.reshape(4, 1, 64, D)
    tables, ones = jnp.arange(4)[None], jnp.ones((4, 1, 64), jnp.float32)
    for length in (1, 2, 9, 64, 65, 200):  # keys of zeros: all weigh the same
        cache = jnp.zeros_like(blocks), blocks, ones, ones
        out = decode_eight_bits(jnp.ones((1, 1, D), dtype), cache, jnp.asarray([length]), tables, scale=1.0)
        mean = numbers[:length].astype(jnp.float32).mean(0)
        np.testing.assert_allclose(np.asarray(out[0, 0], np.float32), mean, rtol=1e-2, atol=1e-2)
    for d in (0, 1, 17, D - 1):  # the softmax of one element of each key; a value shows the weight of its own
        q = jnp.zeros((1, 1, D), dtype).at[..., d].set(1 / 16)
        cache = blocks, jnp.broadcast_to(jnp.eye(64, D, dtype=cache_dtype), blocks.shape), ones, ones
        out = decode_eight_bits(q, cache, jnp.asarray([64]), tables, scale=1.0)
        weights = jax.nn.softmax(numbers[:64, d].astype(jnp.float32) / 16)
        np.testing.assert_allclose(np.asarray(out[0, 0, :64], np.float32), weights, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("cache_dtype", CACHES)
def test_result_of_a_sequence_does_not_depend_on_its_neighbours(cache_dtype):
    q, cache, kv_lens, tables, options = case(3, *SHAPES[0], jnp.bfloat16, cache_dtype)
    together = decode_eight_bits(q, cache, kv_lens, tables, **options)
    for s in range(len(LENS)):
        alone = decode_eight_bits(q[s : s + 1], cache, kv_lens[s : s + 1], tables[s : s + 1], **options)
        np.testing.assert_array_equal(np.asarray(alone[0], np.float32), np.asarray(together[s], np.float32))
