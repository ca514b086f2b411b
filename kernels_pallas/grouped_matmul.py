"""Grouped matrix product: rows sorted by group, each group with a matrix of its own (the experts of a sparse layer).

What is read is the matrices of groups that have rows, and what is computed is their rows, in tiles. A TPU has this
as an operation (lax.ragged_dot), and Hopper a kernel of ours. XLA on CPUs and CUDA turns that operation into a dense
product over all groups, so a loop over the tiles that there are takes its place everywhere else.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

SMALLEST_TILE, LARGEST_TILE = 8, 128


def grouped_matmul(
    x: jax.Array,
    weights: jax.Array,
    group_sizes: jax.Array,
    activation: Callable[[jax.Array], jax.Array] | None = None,
    *,
    backend: str,
) -> jax.Array:
    """Row r of the result is x[r] @ weights[group of r].T, accumulated in float32.

    Args:
      x: [M, C], the rows of group 0 first, then those of group 1 and so on.
      weights: [X, F, C], of x's dtype.
      group_sizes: int32[X], how many rows each group has; their sum is at most M.
      activation: given, the result is activation(gate) * up instead, where the product is [gate, up].
      backend: a resolved name of attention_backend; "mosaic_gpu" has a kernel, for 16-bit dtypes and most sizes.

    Returns:
      [M, F], or [M, F / 2] with an activation, in x's dtype; rows behind the last group are unspecified. A row's
      value depends on the row, its matrix and, without the kernel, M alone: not on the other rows, nor on where in
      its group it stands.
    """
    if backend == "mosaic_gpu":
        from kernels_pallas.gpu import grouped_matmul as kernel

        if kernel.serves(x, weights):
            return kernel.grouped_matmul(x, weights, group_sizes, activation)
    y = lax.platform_dependent(x, weights, group_sizes, tpu=_ragged_dot, default=_loop_over_tiles)
    if activation is None:
        return y
    gate, up = jnp.split(y, 2, axis=1)
    return activation(gate) * up


def _ragged_dot(x, weights, group_sizes):
    rows_by_matrix = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (2,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
    )
    return lax.ragged_dot_general(
        x, weights, group_sizes, rows_by_matrix, precision=_precision(x), preferred_element_type=x.dtype
    )


def _loop_over_tiles(x, weights, group_sizes):
    """A tile that reaches over its group's end also computes what follows it, with the wrong matrix; the next group's
    first tile starts right there and writes over it."""
    M, F = x.shape[0], weights.shape[1]
    tile = tile_rows(M, weights.shape[0])
    x = jnp.pad(x, ((0, tile), (0, 0)))
    tiles = (group_sizes + tile - 1) // tile
    tiles_through = jnp.cumsum(tiles)
    first_tile, first_row = tiles_through - tiles, jnp.cumsum(group_sizes) - group_sizes

    def multiply(i, out):
        group = jnp.searchsorted(tiles_through, i, side="right", method="compare_all")
        row = first_row[group] + (i - first_tile[group]) * tile
        rows = lax.dynamic_slice_in_dim(x, row, tile)
        matrix = lax.dynamic_index_in_dim(weights, group, keepdims=False)
        return lax.dynamic_update_slice_in_dim(out, _product(rows, matrix), row, axis=0)

    return lax.fori_loop(0, tiles_through[-1], multiply, jnp.zeros((M + tile, F), x.dtype))[:M]


def tile_rows(num_rows: int, num_groups: int) -> int:
    """Rows multiplied at a time: about as many as a group has if all have the same number; a power of two."""
    share = -(-num_rows // num_groups)
    return min(LARGEST_TILE, max(SMALLEST_TILE, 1 << (share - 1).bit_length()))


def _product(rows, matrix):
    """[tile, C], [F, C] -> [tile, F]. XLA:CPU repacks a dot's right side on every call: let it be the small one, and
    the barrier keep the compiler from swapping them back."""

    def dot(lhs, rhs):
        contract_last = (((1,), (1,)), ((), ()))
        return lax.dot_general(lhs, rhs, contract_last, precision=_precision(rows), preferred_element_type=rows.dtype)

    return lax.platform_dependent(
        rows, matrix, cpu=lambda rows, matrix: lax.optimization_barrier(dot(matrix, rows)).T, default=dot
    )


def _precision(x):
    return lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
