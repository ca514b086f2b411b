"""Heads of queries, keys and values between the projection and attention, as a warpgroup holds some of them.

A thread has 4 neighbours of a head's first half and the 4 of the second that the rotary embedding turns them with (8 of
each in heads of 256), so that it moves vectors and a head's sums stay within a warp.
"""

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic.gpu.fragmented_array import FragmentedArray
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from kernels_pallas.gpu.rows import SCALAR, WARPGROUP, load


def _threads(D: int) -> int:
    """Of a head. With half as many, a token takes 0.1 us longer and 2,048 take 1 us less (one H100, heads of 128)."""
    return min(D // 8, 16)


def halves_shape(D: int) -> tuple[int, int]:
    """Of a half of each head that a warpgroup has, [heads, D / 2]."""
    return WARPGROUP // _threads(D), D // 2


def halves_layout(D: int):
    """Of an array of halves_shape."""
    heads, half = halves_shape(D)
    tiles = plgpu.Tiling(((heads, half), (heads // 4, half), (half // _threads(D),)))
    return plgpu.Layout.TILED(tiles, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)


def halves_of(D: int) -> list:
    """Their columns in a head."""
    return [pl.ds(i * D // 2, D // 2) for i in range(2)]


def spread(x, axis: int, D: int):
    """x, along `axis` of halves, as halves that are the same along the other."""
    return plgpu.layout_cast(lax.broadcast_in_dim(x, halves_shape(D), [axis]), halves_layout(D))


def rotated(old, tables, norms, queries, epsilon: float, offset: float) -> list:
    """The halves `old` of some heads of one token after q/k norm and rotary embedding, of old's dtype.

    Args:
      tables: cos and sin, float32[D / 2] in device memory.
      norms: [D] each in device memory, of queries and keys, to which `offset` is added, or empty: no norms.
      queries: so many of the heads, from the first on, are queries.
      epsilon: of the norms.
    """
    shape, dtype = old[0].shape, old[0].dtype
    D = 2 * shape[1]
    layout = halves_layout(D)
    cos, sin = (spread(load(table, shape[1:], layout.reduce(0)), 1, D) for table in tables)
    x, y = (half.astype(jnp.float32) for half in old)
    if norms:
        of_q, of_k = norms
        weights = [_of_q_or_k(of_q.at[half], of_k.at[half], queries, shape, layout) for half in halves_of(D)]
        inverse = spread(lax.rsqrt((x * x + y * y).sum(axis=1) * (1 / D) + epsilon), 0, D)
        scales = [weight.astype(jnp.float32) + offset for weight in weights]
        x, y = (
            (half * inverse * scale).astype(dtype).astype(jnp.float32)
            for half, scale in zip((x, y), scales, strict=True)
        )
    return [half.astype(dtype) for half in (x * cos - y * sin, y * cos + x * sin)]


def _of_q_or_k(of_q, of_k, queries, shape, layout):
    """of_q [D / 2] in the first `queries` rows of what has this shape and layout, of_k in the others."""

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.RefType(), SCALAR),
        return_type=plgpu.ShapeDtypeStruct(shape, of_q.dtype, layout=layout),
    )
    def load_registers(_, of_q, of_k, queries):
        tiled, index = layout.to_mgpu(), ir.IndexType.get()
        queries = arith.index_cast(index, queries.registers.item())
        kind = tiled.registers_element_type(ir.MemRefType(of_q.type).element_type)
        registers = np.empty(tiled.registers_shape(shape), dtype=object)
        for i, (row, column) in enumerate(tiled.thread_idxs(shape)):
            is_query = arith.cmpi(arith.CmpIPredicate.slt, row, queries)
            registers.flat[i] = vector.load(kind, arith.select(is_query, of_q, of_k), [column])
        return FragmentedArray(_registers=registers, _layout=tiled, _is_signed=None)

    return load_registers(of_q, of_k, queries)
