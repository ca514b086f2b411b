"""What the attention kernels share; above all, moving the first rows of a wgmma tile to and from device memory.

The copy engine moves whole, aligned tiles; a ragged batch begins and ends anywhere.
"""

import math

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic.gpu import utils as mgpu
from jax.experimental.mosaic.gpu.fragmented_array import (
    WGMMA_LAYOUT,
    WGMMA_LAYOUT_UPCAST_2X,
    WGMMA_LAYOUT_UPCAST_4X,
    FragmentedArray,
)
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

ROWS = 64  # of a wgmma
WARPGROUP = 128  # threads
LOG2E = math.log2(math.e)
TILED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # type: ignore[abstract]  # what wgmma reads
PARAMS = plgpu.CompilerParams(
    approx_math=True, reduction_scratch_bytes=0, lowering_semantics=plgpu.LoweringSemantics.Lane
)
SCALAR = plgpu.Layout.WG_SPLAT(())


def num_sms() -> int:
    """Of the device, or of the one that is compiled for."""
    if device := jax.sharding.get_abstract_mesh().abstract_device:
        return device.num_cores
    return getattr(jax.devices()[0], "core_count", 1)  # what is no GPU is refused when it is compiled for


def sync_warpgroup() -> None:
    """No warp of the warpgroup goes on before all have come here."""
    plgpu.inline_mgpu()(lambda _: mgpu.warpgroup_barrier())()


def tiles_of_8(x):
    """x [rows, ...] with zeros behind it up to a multiple of 8 rows, the least that the copy engine moves."""
    return jnp.pad(x, ((0, -len(x) % 8),) + ((0, 0),) * (x.ndim - 1))


def block_at(tables, seq, token, N, p):
    """The block that holds the p-th slab of the tile at `token`; behind the table's end, its last entry."""
    index = lax.div(token, jnp.int32(N)) + p
    return tables[seq, jnp.minimum(index, tables.shape[1] - 1)]


def load_rows(ref, count) -> jax.Array:
    """The first `count` rows of ref [any, D], as [ROWS, D]; the rest repeat the last, or row 0 where there is none."""
    return load(ref, (ROWS, ref.shape[1]), plgpu.Layout.WGMMA, count)


def load_column(ref, count) -> jax.Array:
    """ref [any] as [ROWS], what can be broadcast along the columns of [ROWS, D]; from `count` on, the last again."""
    return load(ref, (ROWS,), plgpu.Layout.WGMMA.reduce(1), count)


def store_rows(ref, x, stop, start=0, to=0) -> None:
    """Stores rows `start` to `stop` - 1 of x [ROWS, D] to ref [any, D], `to` rows further on, or flat, [any * D].

    A row of 16-bit numbers in ref must begin at a multiple of 16 bytes.
    """
    store(ref, x, start, stop, plgpu.Layout.WGMMA, to)


def store_column(ref, x, count) -> None:
    """Stores the first `count` values of x [ROWS] to ref [any]."""
    store(ref, x, 0, count, plgpu.Layout.WGMMA.reduce(1))


def load(ref, shape, layout, count=None, first=0) -> jax.Array:
    """ref as an array of `shape` in a tiled layout. With `count`, row r is ref's row first + r, or its row count - 1
    where that comes before (row 0, if there is none)."""

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), SCALAR, SCALAR),
        return_type=plgpu.ShapeDtypeStruct(shape, ref.dtype, layout=layout),
    )
    def load_registers(_, ref, count_, first):
        index, tiled = ir.IndexType.get(), layout.to_mgpu()
        first, last = (arith.index_cast(index, x.registers.item()) for x in (first, count_))
        last = arith.maxsi(arith.subi(last, mgpu.c(1, index)), mgpu.c(0, index))
        kind = tiled.registers_element_type(ir.MemRefType(ref.type).element_type)
        registers = np.empty(tiled.registers_shape(shape), dtype=object)
        for i, (row, *column) in enumerate(tiled.thread_idxs(shape)):
            row = row if count is None else arith.minsi(arith.addi(row, first), last)
            registers.flat[i] = vector.load(kind, ref, [row, *column])
        return FragmentedArray(_registers=registers, _layout=tiled, _is_signed=None)

    return load_registers(ref, jnp.asarray(0 if count is None else count, jnp.int32), jnp.asarray(first, jnp.int32))


def store(ref, x, start, stop, layout, shift=0) -> None:
    """Rows `start` to `stop` - 1 of x, in a tiled layout, go to ref's rows that are `shift` further."""
    flat = len(ref.shape) < x.ndim

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout, SCALAR, SCALAR, SCALAR))
    def store_registers(_, ref, x, *bounds):
        index = ir.IndexType.get()
        first, end, shift = (arith.index_cast(index, bound.registers.item()) for bound in bounds)
        for offset, part in _in_wide_pieces(x):
            for (row, *column), register in zip(part.layout.thread_idxs(part.shape), part.registers.flat, strict=True):
                below = arith.cmpi(arith.CmpIPredicate.slt, row, end)
                with mgpu.when(arith.andi(below, arith.cmpi(arith.CmpIPredicate.sge, row, first))):
                    place = [arith.addi(row, shift), *(arith.addi(c, mgpu.c(offset, index)) for c in column)]
                    if flat:
                        place = [arith.addi(arith.muli(place[0], mgpu.c(x.shape[1], index)), place[1])]
                    vector.store(register, ref, place, alignment=bytes_of(register))

    store_registers(ref, x, *(jnp.asarray(bound, jnp.int32) for bound in (start, stop, shift)))


def bytes_of(register) -> int:
    """Of a thread's vector: where it is stored is a multiple of that. Not told so, LLVM cuts pairs of floats in two."""
    kind = ir.VectorType(register.type)
    return mgpu.bitwidth(kind.element_type) * kind.shape[0] // 8


def _in_wide_pieces(x):
    """x, or columns of it with the number of the first, such that a thread has as many neighbours as it can store at
    once."""
    if mgpu.bitwidth(x.mlir_dtype) != 16 or x.layout != WGMMA_LAYOUT:
        return [(0, x)]
    pieces, begin = [], 0
    for words in (4, 2, 1):
        end = x.shape[1] // (8 * words) * (8 * words)
        if end > begin:
            pieces.append((begin, _neighbours(x[:, begin:end], words)))
        begin = end
    return pieces


def _neighbours(x, words):
    """x [ROWS, D] of 16 bits with 2 * `words` neighbouring columns in a thread, where wgmma leaves 2.

    The four threads of a row hold as many words of each run of 32 columns, and pairs of them of 16: they transpose
    them.
    """
    if words == 1:
        return x
    layout = {2: WGMMA_LAYOUT_UPCAST_2X, 4: WGMMA_LAYOUT_UPCAST_4X}[words]
    i32 = ir.IntegerType.get_signless(32)
    together = ir.VectorType.get((2 * words,), x.mlir_dtype)
    registers = np.empty(layout.registers_shape(x.shape), dtype=object)
    runs = x.registers.reshape(-1, words, 2)  # of words, for each half of a warp's 16 rows
    for i, half in np.ndindex(len(runs), 2):
        mine = [mgpu.bitcast(word, i32) for word in runs[i, :, half]]
        for distance in (1, 2)[: words // 2]:
            bit = arith.andi(mgpu.thread_idx(), mgpu.c(distance, i32))
            upper = arith.cmpi(arith.CmpIPredicate.ne, bit, mgpu.c(0, i32))
            for a, b in [(w, w + distance) for w in range(words) if not w & distance]:
                got = mgpu.shfl_bfly(arith.select(upper, mine[a], mine[b]), distance)
                mine[a], mine[b] = arith.select(upper, got, mine[a]), arith.select(upper, mine[b], got)
        joined = mgpu.vector_concat([vector.broadcast(ir.VectorType.get((1,), i32), word) for word in mine])
        registers.flat[2 * i + half] = mgpu.bitcast(joined, together)
    return FragmentedArray(_registers=registers, _layout=layout, _is_signed=x.is_signed)
