"""The grouped matrix product against a matrix product for each row, in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import grouped_matmul
from kernels_pallas.grouped_matmul import LARGEST_TILE, SMALLEST_TILE, tile_rows

TOLERANCE = {jnp.float32: 1e-6, jnp.bfloat16: 2.0**-8}  # of the largest value; bfloat16 rounds the result once
run = jax.jit(partial(grouped_matmul, backend="reference"), static_argnames="activation")


def random_inputs(rng, rows: int, group_sizes, C: int, F: int, dtype):
    x = jnp.asarray(rng.standard_normal((rows, C)), dtype)
    weights = jnp.asarray(rng.standard_normal((len(group_sizes), F, C)), dtype)
    return x, weights, jnp.asarray(group_sizes, jnp.int32)


def check(x, weights, group_sizes) -> None:
    sizes = np.asarray(group_sizes)
    group = np.repeat(np.arange(len(sizes)), sizes)
    rows = np.asarray(x[: len(group)], np.float64)
    expected = np.einsum("mc,mfc->mf", rows, np.asarray(weights, np.float64)[group])
    out = np.asarray(run(x, weights, group_sizes))
    assert out.shape == (len(x), weights.shape[1]) and out.dtype == x.dtype
    largest = np.abs(expected).max(initial=1.0)
    np.testing.assert_allclose(
        out[: len(group)].astype(np.float64), expected, atol=TOLERANCE[x.dtype.type] * largest, rtol=0
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("rows", "groups", "C", "F"), [(1, 1, 8, 8), (24, 6, 48, 40), (200, 16, 32, 56), (700, 3, 24, 16)]
)
def test_random_groups(rows: int, groups: int, C: int, F: int, dtype) -> None:
    """As many rows as there is room for, fewer (the rest is padding), and none."""
    rng = np.random.default_rng(rows)
    for used in (rows, rows * 2 // 3, 0):
        check(*random_inputs(rng, rows, rng.multinomial(used, rng.dirichlet(np.ones(groups))), C, F, dtype))


@pytest.mark.parametrize(
    "group_sizes",
    [[0, 0, 33, 0], [33, 0, 0, 0], [0, 0, 0, 33], [0, 1, 0, 32], [8, 8, 8, 8], [7, 9, 1, 16]],
    ids=str,
)
def test_empty_groups_and_the_edges_of_tiles(group_sizes: list[int]) -> None:
    check(*random_inputs(np.random.default_rng(0), 40, group_sizes, 16, 24, jnp.float32))


def test_padding_rows_and_unused_matrices_do_not_matter() -> None:
    """Not even where they are not numbers."""
    x, weights, group_sizes = random_inputs(np.random.default_rng(0), 20, [5, 0, 6], 16, 24, jnp.float32)
    poisoned = run(x.at[11:].set(jnp.nan), weights.at[1].set(jnp.nan), group_sizes)
    np.testing.assert_array_equal(poisoned[:11], run(x, weights, group_sizes)[:11])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_row_is_the_same_bits_in_any_company(dtype) -> None:
    """Wherever it stands in its group, and whatever the other groups are like."""
    rng = np.random.default_rng(0)
    x, weights, _ = random_inputs(rng, 64, [0] * 4, 48, 40, dtype)
    alone = np.asarray(run(x, weights, jnp.asarray([0, 0, 1, 0], jnp.int32)))[0]
    for before, ahead, after in [(0, 0, 63), (1, 0, 0), (30, 7, 8), (13, 40, 2), (0, 63, 0)]:
        moved = jnp.roll(x, before + ahead, axis=0)  # row 0 comes to stand behind the others
        sizes = jnp.asarray([before, 0, ahead + 1 + after // 2, after - after // 2], jnp.int32)
        np.testing.assert_array_equal(np.asarray(run(moved, weights, sizes))[before + ahead], alone)


def test_one_half_gates_the_other() -> None:
    rng = np.random.default_rng(0)
    x, weights, group_sizes = random_inputs(rng, 20, [5, 0, 6], 16, 24, jnp.float32)
    gate, up = np.split(np.asarray(run(x, weights, group_sizes))[:11], 2, axis=1)
    gated = np.asarray(run(x, weights, group_sizes, activation=jax.nn.silu))
    assert gated.shape == (20, 12)
    np.testing.assert_allclose(gated[:11], gate / (1 + np.exp(-gate)) * up, rtol=1e-5, atol=1e-6)


def test_tiles_fit_the_groups() -> None:
    assert [tile_rows(rows, 8) for rows in (1, 64, 72, 256, 100_000)] == [8, 8, 16, 32, 128]
    assert SMALLEST_TILE == 8 and LARGEST_TILE == 128
