"""Merges the splits of a sequence: the last warpgroup to finish one merges them all (stream-K's fix-up)."""

from functools import reduce

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import utils as mgpu
from jax.experimental.mosaic.gpu.fragmented_array import FragmentedArray
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, memref

WARPGROUP = 128  # threads
_SCALAR = plgpu.Layout.WG_SPLAT(())


def stored_rows(G: int, D: int) -> int:
    """Rows kept of a key/value head's G, such that a warpgroup reads them in whole vectors."""
    return G if G * D % WARPGROUP == 0 else G + 1


def is_last(counter, shared, splits) -> jax.Array:
    """Whether all other splits have arrived. What they stored before is then visible to this warpgroup.

    Args:
      counter: int32[1] in device memory, zero before the first arrives and zero again after the last.
      shared: int32[1] in shared memory, of this warpgroup.
      splits: int32, how many arrive.
    """

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.RefType(), _SCALAR),
        return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=_SCALAR),
    )
    def arrive(_, counter, shared, last):
        i32, zero = ir.IntegerType.get_signless(32), mgpu.c(0, ir.IndexType.get())
        mgpu.warpgroup_barrier()
        with mgpu.single_thread(mgpu.ThreadSubset.WARPGROUP):
            before = llvm.inline_asm(
                i32,
                [mgpu.memref_ptr(counter), last.registers.item()],
                "fence.acq_rel.gpu; atom.acq_rel.gpu.inc.u32 $0, [$1], $2; fence.acq_rel.gpu;",
                "=r,l,r,~{memory}",
                has_side_effects=True,
            )
            memref.store(before, shared, [zero])
        mgpu.warpgroup_barrier()
        return FragmentedArray.splat(memref.load(shared, [zero]), (), is_signed=True)

    return arrive(counter, shared, splits - 1) == splits - 1


def merge(parts, maxima, totals, sinks, splits, D: int) -> jax.Array:
    """One online softmax over what the splits of one sequence and key/value head found.

    Args:
      parts: ref float32[M, R * D], each split's weighted sum of values, not normalised. R is at least G.
      maxima, totals: refs float32[M, R], in base 2, each split's maximum and denominator.
      sinks: G scalars in base 2, or None.
      splits: int32, how many of the M count.

    Returns:
      float32[R * D].
    """
    size = parts.shape[1]
    G = size // D
    at_once = max(1, min(4, 512 // size))
    layout = plgpu.Layout.WG_STRIDED((size,), vec_size=next(v for v in (4, 2, 1) if size % (WARPGROUP * v) == 0))
    row = plgpu.broadcasted_iota(jnp.int32, (size,), 0, layout=layout) // D

    def spread(values):
        x = plgpu.layout_cast(jnp.full((size,), values[0], jnp.float32), layout)
        for g in range(1, G):
            x = jnp.where(row == g, values[g], x)
        return x

    def chunk(c, carry):
        acc, m, total = carry
        js = [c * at_once + u for u in range(at_once)]
        at = [jnp.minimum(j, splits - 1) for j in js]
        found = [plgpu.load(parts.at[j], layout=layout) for j in at]
        found_m = [
            [jnp.where(j < splits, maxima[i, g], -jnp.inf) for g in range(G)] for j, i in zip(js, at, strict=True)
        ]
        found_total = [[totals[i, g] for g in range(G)] for i in at]
        m_new = [reduce(jnp.maximum, [x[g] for x in found_m], m[g]) for g in range(G)]
        decay = [jnp.exp2(m[g] - m_new[g]) for g in range(G)]
        acc = acc * spread(decay)
        total = [total[g] * decay[g] for g in range(G)]
        for x, x_m, x_total in zip(found, found_m, found_total, strict=True):
            weight = [jnp.exp2(x_m[g] - m_new[g]) for g in range(G)]
            acc += x * spread(weight)
            total = [total[g] + weight[g] * x_total[g] for g in range(G)]
        return acc, m_new, total

    zero = jnp.float32(0)
    m = [zero - jnp.inf] * G if sinks is None else sinks
    total = [zero if sinks is None else zero + 1] * G
    acc = plgpu.layout_cast(jnp.zeros((size,), jnp.float32), layout)
    acc, _, total = lax.fori_loop(0, lax.div(splits + (at_once - 1), jnp.int32(at_once)), chunk, (acc, m, total))
    return acc * spread([1 / x for x in total])
