"""Merges the splits of a sequence, each the attention over a run of its cached tokens, into one result."""

from functools import partial, reduce
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from kernels_pallas.gpu.rows import LOG2E, PARAMS, WARPGROUP, num_sms

AT_ONCE = 2048  # values that are on their way


class Sinks(NamedTuple):
    """Learned logits as splits without values: maxima, whole numbers in base 2, and denominators, float32[H] each."""

    maxima: jax.Array
    totals: jax.Array

    @classmethod
    def of(cls, sinks) -> "Sinks":
        logits = sinks.astype(jnp.float32) * LOG2E
        maxima = jnp.round(logits)
        return cls(maxima, jnp.exp2(logits - maxima))


class Unfinished(NamedTuple):
    """Of a sequence and key/value head: splits, and how many of them, from the first on, part 0 already is."""

    seq: jax.Array
    head: jax.Array
    splits: jax.Array
    merged: jax.Array


def stored_rows(G: int, D: int) -> int:
    """Rows kept of a key/value head's G, such that a warpgroup reads them in whole vectors."""
    return G if G * D % WARPGROUP == 0 else G + 1


def merge_splits(found, splits, sinks: Sinks | None, G: int, dtype) -> jax.Array:
    """One online softmax over what the splits of each sequence found.

    Args:
      found: float32[S, K, M, R * D], each split's weighted sum of values, not normalised, where R is stored_rows;
        float32[S, K, M, R] twice, its maximum, in base 2, and denominator.
      splits: int32[S], how many of the M a sequence has.

    Returns:
      dtype[S, K, R * D], zeros where there are no splits.
    """
    (S, K, _, size), R = found[0].shape, found[1].shape[3]
    # Where SMs would have no work, each takes as few rows as give a warpgroup a value for each thread.
    rows = max(1, WARPGROUP * R // size) if num_sms() > S * K else R
    return plgpu.kernel(
        partial(_merge_all, G=G, rows=rows),
        out_type=jax.ShapeDtypeStruct((S, K, size), dtype),
        grid=(S, K, R // rows),
        grid_names=("sequence", "head", "rows"),
        kernel_name="decode_attention_merge",
        compiler_params=PARAMS,
    )(found, splits, sinks or ())


def _merge_all(found, splits, sinks, out, *, G, rows):
    seq, head, first = lax.axis_index("sequence"), lax.axis_index("head"), lax.axis_index("rows") * rows
    merge(found, Unfinished(seq, head, splits[seq], jnp.int32(1)), sinks, out, G, (first, rows))


def clear(out, splits, worker, workers) -> None:
    """Zeros for one of so many workers' share of the sequences that have no split."""
    S, (K, size) = splits.shape[0], out.shape[1:]

    def visit(n, _):
        seq = worker + n * workers

        @pl.when(splits[seq] == 0)
        def store():
            zeros = jnp.zeros((size,), out.dtype)
            for head in range(K):
                out[seq, head] = plgpu.layout_cast(zeros, _layout(size))

    lax.fori_loop(0, lax.div(S - worker + workers - 1, workers), visit, None)


def _layout(size: int):
    return plgpu.Layout.WG_STRIDED((size,), vec_size=next(v for v in (4, 2, 1) if size % (WARPGROUP * v) == 0))


def merge(found, left: Unfinished, sinks, out, G: int, rows=None) -> None:
    """In a warpgroup: what merge_splits gives for one sequence and head, of `found` as that takes it, to out [S, K,
    R * D]; or for some of the R rows, of which `rows` has the first and how many."""
    seq, head, splits, merged = left
    parts, maxima, totals = (ref.at[seq, head] for ref in found)
    D = parts.shape[1] // maxima.shape[1]
    first, R = rows or (0, maxima.shape[1])
    size, here = R * D, pl.ds(first * D, R * D)
    most = 4 if maxima.shape[1] == R else 8  # decode attention itself merges all rows, with few registers left
    at_once = max(1, min(most, AT_ONCE // size))
    layout = _layout(size)
    row = plgpu.broadcasted_iota(jnp.int32, (size,), 0, layout=layout) // D

    def spread(values):
        x = plgpu.layout_cast(jnp.full((size,), values[0], jnp.float32), layout)
        for g in range(1, R):
            x = jnp.where(row == g, values[g], x)
        return x

    def align(carry, maxima_found):
        """The carry with maxima that are those found, too; and what each of these is to be multiplied by."""
        acc, m, total = carry
        m_new = [reduce(jnp.maximum, [x[g] for x in maxima_found], m[g]) for g in range(R)]
        decay = [jnp.exp2(m[g] - m_new[g]) for g in range(R)]
        weights = [[jnp.exp2(x[g] - m_new[g]) for g in range(R)] for x in maxima_found]
        return (acc * spread(decay), m_new, [total[g] * decay[g] for g in range(R)]), weights

    def chunk(c, carry):
        places = [jnp.where(c + u == 0, 0, merged - 1 + c + u) for u in range(at_once)]  # part 0, then those behind it
        at = [jnp.minimum(j, splits - 1) for j in places]
        found = [plgpu.load(parts.at[j, here], layout=layout) for j in at]
        found_m = [
            [jnp.where(j < splits, maxima[i, first + g], -jnp.inf) for g in range(R)]
            for j, i in zip(places, at, strict=True)
        ]
        found_total = [[totals[i, first + g] for g in range(R)] for i in at]
        (acc, m, total), weights = align(carry, found_m)
        for x, x_total, weight in zip(found, found_total, weights, strict=True):
            acc += x * spread(weight)
            total = [total[g] + weight[g] * x_total[g] for g in range(R)]
        return acc, m, total

    left_over = jnp.where(splits > 0, splits - merged + 1, 0)
    zero = jnp.float32(0)
    acc = plgpu.layout_cast(jnp.zeros((size,), jnp.float32), layout)
    carry = acc, [zero - jnp.inf] * R, [zero] * R
    chunks = lax.div(left_over + (at_once - 1), jnp.int32(at_once))
    acc, m, total = lax.fori_loop(0, chunks, lambda i, x: chunk(i * at_once, x), carry)
    if sinks:
        sink = [head * G + jnp.minimum(first + g, G - 1) for g in range(R)]
        (acc, _, total), [weight] = align((acc, m, total), [[sinks[0][i] for i in sink]])
        total = [t + w * sinks[1][i] for t, w, i in zip(total, weight, sink, strict=True)]
    out[seq, head, here] = (acc * reciprocal(spread(total))).astype(out.dtype)


def reciprocal(total):
    return jnp.where(total > 0, 1 / total, 0.0)
