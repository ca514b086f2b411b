"""From the fused projection to rotated queries and a written cache, in one pass over it.

Through XLA this is seven kernels a layer. Here a warpgroup takes one token: its heads, queries, keys and values, are
the rows of a wgmma tile, in whose layout a thread holds both halves of what the rotary embedding turns.
"""

from functools import partial

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from kernels_pallas.gpu.rows import PARAMS, ROWS, load_heads, load_row, store_heads
from kernels_pallas.quantize import rounded, scales_of


@partial(jax.jit, static_argnames=("num_heads", "epsilon", "norm_offset"))
def rotate_and_write(qkv, tables, norms, cache, block, offset, *, num_heads, epsilon, norm_offset):
    """q/k norm, rotary embedding of whole heads, and the write of keys and values.

    Args:
      qkv: [T, H + 2K, D], bfloat16 or float16; D is 64, 128 or 256.
      tables: cos and sin, float32[T, D / 2].
      norms: [D] each, the weights of the norms of queries and keys, to which norm_offset is added; None: no norms.
      cache: keys and values [B, K, N, D] of qkv's dtype, int8 or float8_e4m3fn, and the scales of the latter, float32
        [B, K, N]; updated in place.
      block, offset: int32[T], where each token's key and value go.

    Returns:
      queries [T, H, D] and the cache.
    """
    T, rows, D = qkv.shape
    cache = tuple(map(jax.new_ref, cache))
    q = plgpu.kernel(
        partial(_rotate, H=num_heads, epsilon=epsilon, norm_offset=None if norms is None else norm_offset),
        out_type=jax.ShapeDtypeStruct((T, num_heads, D), qkv.dtype),
        grid=(T, pl.cdiv(rows, ROWS)),
        grid_names=("token", "tile"),
        kernel_name="rotate_and_write",
        compiler_params=PARAMS,
    )(qkv, *tables, *(norms or tables), block, offset, cache)
    return q, tuple(map(jax.freeze, cache))


def _rotate(qkv, cos, sin, q_norm, k_norm, block, offset, cache, q, *, H, epsilon, norm_offset):
    token, first_row = lax.axis_index("token"), lax.axis_index("tile") * ROWS
    keys, values, *scales = cache
    K, D = keys.shape[1], keys.shape[3]
    columns_of_halves = [pl.ds(i * D // 2, D // 2) for i in range(2)]
    halves = [load_heads(qkv.at[token, :, columns], first_row) for columns in columns_of_halves]
    x, y = (half.astype(jnp.float32) for half in halves)
    row = first_row + plgpu.broadcasted_iota(jnp.int32, x.shape, 0, layout=plgpu.Layout.WGMMA)

    def across(ref):
        return lax.broadcast_in_dim(load_row(ref).astype(jnp.float32), x.shape, [1])

    if norm_offset is not None:
        squares = (x * x).sum(axis=1) + (y * y).sum(axis=1)
        inverse = lax.broadcast_in_dim(lax.rsqrt(squares * (1 / D) + epsilon), x.shape, [0])
        for_q, for_k = (
            [across(norm.at[columns]) + norm_offset for columns in columns_of_halves] for norm in (q_norm, k_norm)
        )
        x, y = (
            (half * inverse * jnp.where(row < H, a, b)).astype(qkv.dtype).astype(jnp.float32)
            for half, a, b in zip((x, y), for_q, for_k, strict=True)
        )
    c, s = across(cos.at[token]), across(sin.at[token])
    is_value = row >= H + K
    turned = (half.astype(qkv.dtype) for half in (x * c - y * s, y * c + x * s))
    new = [jnp.where(is_value, old, half) for old, half in zip(halves, turned, strict=True)]
    for half, columns in zip(new, columns_of_halves, strict=True):
        store_heads(q.at[token, :, columns], half, first_row, 0, H)
    place = block[token], slice(None), offset[token]
    if scales:
        new = [half.astype(jnp.float32) for half in new]
        of_rows = scales_of(jnp.maximum(*(jnp.abs(half).max(axis=1) for half in new)), keys.dtype)
        new = [rounded(half, lax.broadcast_in_dim(of_rows, x.shape, [0]), keys.dtype) for half in new]
    for which, (start, stop) in enumerate(((H, H + K), (H + K, H + 2 * K))):
        for half, columns in zip(new, columns_of_halves, strict=True):
            store_heads(cache[which].at[(*place, columns)], half, first_row, start, stop)
        if scales:
            store_heads(scales[which].at[place], of_rows, first_row, start, stop)
