"""Merges the splits of a sequence, each the attention over a run of its cached tokens, into one result.

This is a kernel of its own: letting the last split to finish merge all of them saves a launch, but the fences that it
takes cost every split more (64 x 4,096 tokens went from 387 to 663 us).
"""

from functools import partial, reduce

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from kernels_pallas.gpu.rows import LOG2E, PARAMS, WARPGROUP


def stored_rows(G: int, D: int) -> int:
    """Rows kept of a key/value head's G, such that a warpgroup reads them in whole vectors."""
    return G if G * D % WARPGROUP == 0 else G + 1


def merge_splits(parts, maxima, totals, splits, sinks, G: int, dtype) -> jax.Array:
    """One online softmax over what the splits of each sequence found.

    Args:
      parts: float32[S, K, M, R * D], each split's weighted sum of values, not normalised. R is stored_rows.
      maxima, totals: float32[S, K, M, R], each split's maximum, in base 2, and denominator.
      splits: int32[S], how many of the M a sequence has.
      sinks: float32[K * G] or None.

    Returns:
      dtype[S, K, R * D], zeros where there are no splits.
    """
    S, K, _, size = parts.shape
    return plgpu.kernel(
        partial(_merge, G=G, R=totals.shape[-1], sinks_given=sinks is not None),
        out_type=jax.ShapeDtypeStruct((S, K, size), dtype),
        grid=(S, K),
        grid_names=("sequence", "head"),
        kernel_name="decode_attention_merge",
        compiler_params=PARAMS,
    )(parts, maxima, totals, splits, splits if sinks is None else sinks)


def _merge(parts, maxima, totals, splits, sinks, out, *, G, R, sinks_given):
    seq, head = lax.axis_index("sequence"), lax.axis_index("head")
    parts, maxima, totals = (ref.at[seq, head] for ref in (parts, maxima, totals))
    splits = splits[seq]
    size = parts.shape[1]
    D = size // R
    at_once = max(1, min(4, 512 // size))
    layout = plgpu.Layout.WG_STRIDED((size,), vec_size=next(v for v in (4, 2, 1) if size % (WARPGROUP * v) == 0))
    row = plgpu.broadcasted_iota(jnp.int32, (size,), 0, layout=layout) // D

    def spread(values):
        x = plgpu.layout_cast(jnp.full((size,), values[0], jnp.float32), layout)
        for g in range(1, R):
            x = jnp.where(row == g, values[g], x)
        return x

    def chunk(c, carry):
        acc, m, total = carry
        js = [c * at_once + u for u in range(at_once)]
        at = [jnp.minimum(j, splits - 1) for j in js]
        found = [plgpu.load(parts.at[j], layout=layout) for j in at]
        found_m = [
            [jnp.where(j < splits, maxima[i, g], -jnp.inf) for g in range(R)] for j, i in zip(js, at, strict=True)
        ]
        found_total = [[totals[i, g] for g in range(R)] for i in at]
        m_new = [reduce(jnp.maximum, [x[g] for x in found_m], m[g]) for g in range(R)]
        decay = [jnp.exp2(m[g] - m_new[g]) for g in range(R)]
        acc = acc * spread(decay)
        total = [total[g] * decay[g] for g in range(R)]
        for x, x_m, x_total in zip(found, found_m, found_total, strict=True):
            weight = [jnp.exp2(x_m[g] - m_new[g]) for g in range(R)]
            acc += x * spread(weight)
            total = [total[g] + weight[g] * x_total[g] for g in range(R)]
        return acc, m_new, total

    zero = jnp.float32(0)
    m = [sinks[head * G + min(g, G - 1)] * LOG2E if sinks_given else zero - jnp.inf for g in range(R)]
    total = [zero + sinks_given] * R
    acc = plgpu.layout_cast(jnp.zeros((size,), jnp.float32), layout)
    acc, _, total = lax.fori_loop(0, lax.div(splits + (at_once - 1), jnp.int32(at_once)), chunk, (acc, m, total))
    out[seq, head] = (acc * spread([jnp.where(x > 0, 1 / x, 0.0) for x in total])).astype(out.dtype)
