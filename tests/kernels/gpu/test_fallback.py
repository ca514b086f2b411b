"""What the kernels do not serve runs through the reference, and says so."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import AttentionBatch, UnsupportedShapeError, cache_shape, ragged_paged_attention


def case(N, D, K, H, dtype, cache_dtype):
    rng = np.random.default_rng(0)
    cache = tuple(jnp.zeros(x.shape, x.dtype) for x in cache_shape(3, N, K, D, cache_dtype, backend="mosaic_gpu"))
    tables, kv_lens = jnp.asarray([[1], [2]]), jnp.asarray([1, 1])
    batch = AttentionBatch(kv_lens, tables, jnp.arange(3), jnp.asarray([2, 2]), decode_only=True)
    return *(jnp.asarray(rng.standard_normal((2, heads, D)), dtype) for heads in (H, K, K)), cache, batch


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((4, 128, 2, 4, "bfloat16", "int8"), "blocks of 4 tokens"),
        ((64, 128, 1, 17, "bfloat16", "float8_e4m3fn"), "17 query heads to a key/value head"),
        ((64, 128, 2, 4, "float32", "int8"), "float32 over a cache of int8"),
        ((64, 24, 2, 4, "bfloat16", "bfloat16"), "heads of 24"),
    ],
)
def test_the_result_is_the_references_and_the_log_says_why(shape, words, caplog):
    args = case(*shape)
    ours, theirs = (
        ragged_paged_attention(*args, backend=backend, scale=0.1)[0] for backend in ("mosaic_gpu", "reference")
    )
    np.testing.assert_array_equal(np.asarray(ours, np.float32), np.asarray(theirs, np.float32))
    assert words in caplog.text and "plain XLA" in caplog.text


def test_deterministic_is_refused_where_there_is_no_kernel():
    *args, batch = case(64, 24, 2, 4, "bfloat16", "int8")
    batch = dataclasses.replace(batch, deterministic=True)
    with pytest.raises(UnsupportedShapeError, match=r"deterministic: .* heads of 24"):
        ragged_paged_attention(*args, batch, backend="mosaic_gpu", scale=0.1)
