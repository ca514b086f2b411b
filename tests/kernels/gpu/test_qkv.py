"""The fused pass over the projection on the GPU, against its parts in plain jnp."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import QKNorm
from kernels_pallas.attention import rotated_qkv
from kernels_pallas.gpu.qkv import rotate_and_write
from tests.kernels.gpu import paged

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(
    ("T", "H", "K", "D", "N"),
    [(64, 16, 8, 128, 16), (1, 32, 8, 128, 64), (130, 9, 3, 64, 16), (33, 4, 1, 256, 32), (7, 64, 8, 128, 16)],
)
def test_agrees_with_its_parts(T, H, K, D, N, normed):
    rng = np.random.default_rng()
    B = T // N + 5
    qkv = jnp.asarray(rng.normal(size=(T, H + 2 * K, D)), jnp.bfloat16)
    angles = jnp.asarray(rng.normal(size=(T, D // 2)) * 30, jnp.float32)
    tables = jnp.cos(angles), jnp.sin(angles)
    weights = tuple(jnp.asarray(rng.normal(size=D), jnp.bfloat16) for _ in range(2)) if normed else None
    cache = tuple(jnp.asarray(rng.normal(size=(B, K, N, D)), jnp.bfloat16) for _ in range(2))
    place = rng.permutation(B * N)[:T]
    block, offset = (jnp.asarray(x, jnp.int32) for x in (place // N, place % N))
    write = jax.jit(
        lambda cache: rotate_and_write(
            qkv, tables, weights, *cache, block, offset, num_heads=H, epsilon=1e-6, norm_offset=1.0
        )
    )
    norms = QKNorm(*weights, 1e-6, 1.0) if normed else None
    q, k, v = rotated_qkv(qkv, tuple(t[:, None] for t in tables), norms, H)
    expected = q, cache[0].at[block, :, offset].set(k), cache[1].at[block, :, offset].set(v)
    for ours, theirs in zip(write(cache), expected, strict=True):
        assert paged.error(ours, theirs) < 1e-2
    np.testing.assert_array_equal(write(cache)[2].astype(jnp.float32), expected[2].astype(jnp.float32))
