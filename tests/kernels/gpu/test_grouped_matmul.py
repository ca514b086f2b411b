"""The grouped matrix product on the GPU against float32, and that a row's result depends on its matrix alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from kernels_pallas import ACTIVATIONS
from kernels_pallas.gpu.grouped_matmul import GroupedConfig, grouped_matmul

pytestmark = pytest.mark.gpu


def random(*shape, dtype=jnp.bfloat16):
    """On the device: a case has up to 400 million weights."""
    return jax.random.normal(jax.random.key(np.random.SeedSequence().generate_state(1)[0]), shape, dtype)


@jax.jit
def exact(x, weights, group_sizes):
    """Every row by every matrix, and of that its own."""
    stop, row = jnp.cumsum(group_sizes), jnp.arange(len(x))

    def add(g, out):
        y = jnp.matmul(x.astype(jnp.float32), weights[g].astype(jnp.float32).T, precision="highest")
        return jnp.where(((row >= stop[g] - group_sizes[g]) & (row < stop[g]))[:, None], y, out)

    return lax.fori_loop(0, len(group_sizes), add, jnp.zeros((len(x), weights.shape[1]), jnp.float32))


def groups(rows: int, count: int) -> list[int]:
    rng = np.random.default_rng()
    return rng.multinomial(rows, rng.dirichlet(np.ones(count))).tolist()


CASES = [
    (1, [0, 1], 16, 64),
    (3, [1, 0, 2], 48, 64),
    (8, [0, 1] * 8, 1536, 2048),
    (512, groups(512, 128), 1536, 2048),
    (512, groups(500, 128), 2048, 768),
    (700, groups(690, 6), 1536, 512),
    (900, [0, 0, 871, 0], 512, 320),
    (900, [0, 3, 871, 5], 512, 320),
    (500, [1, 0, 9, 0, 8, 7, 0, 1], 176, 64),
    (256, groups(256, 32), 5760, 2880),
    (40, [0, 0, 0], 512, 320),
    (4096, groups(4000, 8), 1536, 2048),
]


@pytest.mark.parametrize(
    ("rows", "sizes", "features", "columns"), CASES, ids=lambda x: "" if isinstance(x, list) else x
)
@pytest.mark.parametrize(
    ("activation", "dtype"), [(None, jnp.bfloat16), ("silu", jnp.bfloat16), ("gelu_tanh", jnp.float16)], ids=str
)
def test_agrees_with_float32(rows, sizes, features, columns, activation, dtype):
    """Whatever lies behind the last group, and in the matrices of groups without rows."""
    used, sizes = sum(sizes), jnp.asarray(sizes, jnp.int32)
    x = random(rows, columns, dtype=dtype).at[used:].set(jnp.nan)
    weights = random(len(sizes), features, columns, dtype=dtype) / columns**0.5
    weights = jnp.where((sizes > 0)[:, None, None], weights, jnp.nan)
    y = grouped_matmul(x, weights, sizes, activation and ACTIVATIONS[activation])[:used]
    expected = exact(x, weights, sizes)[:used]
    if activation:
        gate, up = jnp.split(expected, 2, axis=1)
        expected = ACTIVATIONS[activation](gate) * up
    assert y.dtype == dtype and y.shape == expected.shape
    difference = np.asarray(y, np.float64) - np.asarray(expected, np.float64)
    assert np.linalg.norm(difference) <= 4e-3 * np.linalg.norm(expected)


@pytest.mark.parametrize("activation", [None, "silu"])
def test_a_row_is_the_same_bits_in_any_company_and_any_tiles(activation):
    """Alone, among others, behind and before other groups, and in a prompt's tiles of 128 rows."""
    act = activation and ACTIVATIONS[activation]
    x, weights = random(900, 768), random(4, 1536, 768) / 768**0.5
    whole = np.asarray(grouped_matmul(x, weights, jnp.asarray([300, 300, 250, 50], jnp.int32), act), np.float32)
    assert GroupedConfig.of(900, 4, 1536, 768).warpgroups == 2 and GroupedConfig.of(31, 4, 1536, 768).warpgroups == 1
    for start, stop in [(300, 301), (310, 341), (300, 600), (555, 600)]:
        sizes = jnp.asarray([0, stop - start, 0, 0], jnp.int32)
        part = grouped_matmul(x[start:stop], weights, sizes, act)
        np.testing.assert_array_equal(np.asarray(part, np.float32), whole[start:stop])
