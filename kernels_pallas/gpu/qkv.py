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


@partial(jax.jit, static_argnames=("num_heads", "epsilon", "norm_offset"))
def rotate_and_write(qkv, tables, norms, keys, values, block, offset, *, num_heads, epsilon, norm_offset):
    """q/k norm, rotary embedding of whole heads, and the write of keys and values.

    Args:
      qkv: [T, H + 2K, D], of the cache's dtype; D is 64, 128 or 256.
      tables: cos and sin, float32[T, D / 2].
      norms: [D] each, the weights of the norms of queries and keys, to which norm_offset is added; None: no norms.
      keys, values: [B, K, N, D], updated in place.
      block, offset: int32[T], where each token's key and value go.

    Returns:
      queries [T, H, D], keys, values.
    """
    T, rows, D = qkv.shape

    keys, values = jax.new_ref(keys), jax.new_ref(values)
    q = plgpu.kernel(
        partial(_rotate, H=num_heads, epsilon=epsilon, norm_offset=None if norms is None else norm_offset),
        out_type=jax.ShapeDtypeStruct((T, num_heads, D), qkv.dtype),
        grid=(T, pl.cdiv(rows, ROWS)),
        grid_names=("token", "tile"),
        kernel_name="rotate_and_write",
        compiler_params=PARAMS,
    )(qkv, *tables, *(norms or tables), block, offset, keys, values)
    return q, jax.freeze(keys), jax.freeze(values)


def _rotate(qkv, cos, sin, q_norm, k_norm, block, offset, keys, values, q, *, H, epsilon, norm_offset):
    token, first_row = lax.axis_index("token"), lax.axis_index("tile") * ROWS
    K, D = keys.shape[1], keys.shape[3]
    halves = [load_heads(qkv.at[token, :, pl.ds(i * D // 2, D // 2)], first_row) for i in range(2)]
    x, y = (half.astype(jnp.float32) for half in halves)
    row = first_row + plgpu.broadcasted_iota(jnp.int32, x.shape, 0, layout=plgpu.Layout.WGMMA)

    def across(ref):
        return lax.broadcast_in_dim(load_row(ref).astype(jnp.float32), x.shape, [1])

    if norm_offset is not None:
        squares = (x * x).sum(axis=1) + (y * y).sum(axis=1)
        inverse = lax.broadcast_in_dim(lax.rsqrt(squares * (1 / D) + epsilon), x.shape, [0])
        for_q, for_k = (
            [across(norm.at[pl.ds(i * D // 2, D // 2)]) + norm_offset for i in range(2)] for norm in (q_norm, k_norm)
        )
        x, y = (
            (half * inverse * jnp.where(row < H, a, b)).astype(qkv.dtype).astype(jnp.float32)
            for half, a, b in zip((x, y), for_q, for_k, strict=True)
        )
    c, s = across(cos.at[token]), across(sin.at[token])
    is_value = row >= H + K
    turned = x * c - y * s, y * c + x * s
    place = block[token], slice(None), offset[token]
    for i, (old, new) in enumerate(zip(halves, turned, strict=True)):
        half = pl.ds(i * D // 2, D // 2)
        new = jnp.where(is_value, old, new.astype(qkv.dtype))
        store_heads(q.at[token, :, half], new, first_row, 0, H)
        store_heads(keys.at[(*place, half)], new, first_row, H, H + K)
        store_heads(values.at[(*place, half)], new, first_row, H + K, H + 2 * K)
