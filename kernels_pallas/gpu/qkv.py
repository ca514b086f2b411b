"""From the fused projection to rotated queries and a written cache, in one pass over it.

Through XLA this is seven kernels a layer. Here a warpgroup takes some of a token's heads, queries, keys and values.
"""

from functools import partial

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from kernels_pallas.gpu.heads import halves_layout, halves_of, halves_shape, rotated, spread
from kernels_pallas.gpu.rows import PARAMS, load, store
from kernels_pallas.quantize import rounded, scales_of


@partial(jax.jit, static_argnames=("num_heads", "epsilon", "norm_offset", "dtype"))
def rotate_and_write(parts, tables, norms, cache, block, offset, *, num_heads, epsilon, norm_offset, dtype):
    """q/k norm, rotary embedding of whole heads, and the write of keys and values.

    Args:
      parts: [any, T, H + 2K, D], what the projection is the sum of, added in their order and rounded to `dtype`:
        bfloat16 or float16. D is 64, 128 or 256.
      tables: cos and sin, float32[T, D / 2].
      norms: [D] each, the weights of the norms of queries and keys, to which norm_offset is added; None: no norms.
      cache: keys and values [B, K, N, D] of `dtype`, int8 or float8_e4m3fn, and the scales of the latter, float32
        [B, K, N]; updated in place.
      block, offset: int32[T], where each token's key and value go.

    Returns:
      queries [T, H, D] of `dtype` and the cache.
    """
    _, T, heads, D = parts.shape
    cache = tuple(map(jax.new_ref, cache))
    q = plgpu.kernel(
        partial(_rotate, epsilon=epsilon, norm_offset=None if norms is None else norm_offset),
        out_type=jax.ShapeDtypeStruct((T, num_heads, D), dtype),
        grid=(T, pl.cdiv(heads, halves_shape(D)[0])),
        grid_names=("token", "tile"),
        kernel_name="rotate_and_write",
        compiler_params=PARAMS,
    )(parts, *tables, *(norms or tables), block, offset, cache)
    return q, tuple(map(jax.freeze, cache))


def _rotate(parts, cos, sin, q_norm, k_norm, block, offset, cache, q, *, epsilon, norm_offset):
    heads, D = parts.shape[2:]
    H, dtype = q.shape[1], q.dtype
    keys, values, *scales = cache
    K, layout, shape = keys.shape[1], halves_layout(D), halves_shape(D)
    token, first = lax.axis_index("token"), lax.axis_index("tile") * shape[0]
    halves = halves_of(D)

    def heads_of(half):
        found = [load(parts.at[i, token, :, half], shape, layout, heads, first) for i in range(len(parts))]
        return sum(found[1:], start=found[0]).astype(dtype)

    def put(ref, x, start):
        """The heads from `start` on, as many as ref has."""
        of = layout if x.ndim == 2 else layout.reduce(1)
        store(ref, x, start - first, start - first + ref.shape[0], of, first - start)

    old = [heads_of(half) for half in halves]
    place = block[token], slice(None), offset[token]
    norms = () if norm_offset is None else (q_norm, k_norm)
    turned = rotated(old, (cos.at[token], sin.at[token]), norms, H - first, epsilon, norm_offset)
    new_keys, new_values = turned, old
    if scales:
        is_turned = first + plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout) < H + K
        new = [jnp.where(is_turned, *pair).astype(jnp.float32) for pair in zip(turned, old, strict=True)]
        of_heads = scales_of(jnp.maximum(*map(jnp.abs, new)).max(axis=1), keys.dtype)
        new_keys = new_values = [rounded(half, spread(of_heads, 0, D), keys.dtype) for half in new]
        for ref, start in zip(scales, (H, H + K), strict=True):
            put(ref.at[place], of_heads, start)
    for i, half in enumerate(halves):
        put(q.at[token, :, half], turned[i], 0)
        put(keys.at[(*place, half)], new_keys[i], H)
        put(values.at[(*place, half)], new_values[i], H + K)
