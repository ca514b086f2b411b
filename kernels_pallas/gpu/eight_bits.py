"""Eight-bit tiles of cached keys and values as left operands of wgmma, which has them in 16 bits from registers.

A tile is TILE cached tokens. ldmatrix hands each thread words of four bytes, of which the even and the odd ones are
widened to a pair of 16-bit numbers each. For values, whose tile is transposed on the way, the odd bytes belong to
another row of the operand; for keys they are other columns. So both operands have their head dimension in another
order, which costs nothing: queries are stored with theirs in the same order, and the result is put back when it is
stored.
"""

import math
from collections.abc import Callable

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic.gpu import utils as mgpu
from jax.experimental.mosaic.gpu.fragmented_array import FragmentedArray
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm, vector

from kernels_pallas.gpu.rows import TILED, WARPGROUP
from kernels_pallas.quantize import LARGEST

TILE = 64  # cached tokens multiplied at a time: wgmma's rows, and its columns
_SCALES = 32  # copied at least: the copy engine moves multiples of 128 bytes
_LAYOUT = plgpu.Layout.WGMMA


def tile_transforms(D: int) -> tuple:
    """How a tile [TILE, D] lies in shared memory, as the copy engine writes it."""
    width = min(D, 128)
    return plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(width)  # type: ignore[abstract]


def scales_shape(N: int, tile: int = TILE) -> tuple[int, int]:
    """A tile's scales in shared memory, float32: the blocks that it is gathered from, and what is copied of each, its
    scales and, in small blocks, what lies behind them."""
    return max(1, tile // N), max(min(N, tile), _SCALES)


def keys_operand(ref, dtype):
    """A tile of keys as [TILE, D] of `dtype`."""
    D = ref.shape[1]

    def words(base, warp, lane):
        """Row half r of the warp's 16 tokens, bytes 16 * c on."""
        half, later = _bit(lane, 8), _bit(lane, 16)
        row = _add(_mul(warp, 16), _mul(half, 8), _rem(lane, 8))
        for c in range(0, D // 16, 2):
            chunk = arith.addi(later, _i32(c))
            for i, word in enumerate(_load_matrices(base, row, chunk, D, transposed=False)):
                at = c + i // 2
                yield word, (0, 2 * at, i % 2), (0, 2 * at + 1, i % 2)

    return _widened(ref, dtype, (TILE, D), words)


def values_operand(ref, dtype):
    """A tile of values, transposed, as [D, TILE] of `dtype`."""
    D = ref.shape[1]

    def words(base, warp, lane):
        """Eight tokens of the warp's 16 elements of every 64: a word has two tokens of two elements."""
        for m in range(D // 64):
            chunk = arith.addi(warp, _i32(4 * m))
            for b in range(0, TILE // 8, 4):
                row = arith.addi(lane, _i32(8 * b))
                for i, word in enumerate(_load_matrices(base, row, chunk, D, transposed=True)):
                    yield word, (m, b + i, 0), (m, b + i, 1)

    return _widened(ref, dtype, (D, TILE), words)


def load_queries(ref, count: int, R: int) -> jax.Array:
    """The first `count` rows of ref [any, D] in device memory as R rows, flat; further ones repeat the last."""
    D = ref.shape[1]
    width = _queries_of_thread(R * D)
    layout = plgpu.Layout.WG_STRIDED((R * D,), vec_size=width)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),), return_type=plgpu.ShapeDtypeStruct((R * D,), ref.dtype, layout=layout)
    )
    def load(_, ref):
        kind = ir.VectorType.get((width,), ir.MemRefType(ref.type).element_type)
        registers = [
            vector.load(kind, ref, _indices(arith.minui(_div(first, D), _i32(count - 1)), _rem(first, D)))
            for first in _runs_of_thread(R * D, width)
        ]
        return FragmentedArray(_registers=np.array(registers, dtype=object), _layout=layout.to_mgpu(), _is_signed=None)

    return load(ref)


def store_queries(ref, x) -> None:
    """What load_queries found goes to ref [R, D] in shared memory: the even ones of every 16, then the odd ones."""
    R, D = ref.shape
    width = _queries_of_thread(R * D)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(TILED), plgpu.Layout.WG_STRIDED((R * D,), vec_size=width)),
    )
    def store(_, ref, x):
        for first, register in zip(_runs_of_thread(R * D, width), x.registers.flat, strict=True):
            row, column = _div(first, D), _rem(first, D)
            for odd in range(2):
                numbers = vector.shuffle(register, register, list(range(odd, width, 2)))
                place = _add(_mul(_div(column, 16), 16), _i32(8 * odd), _div(_rem(column, 16), 2))
                swizzled = _add(_mul(arith.xori(_rem(_div(place, 8), 8), _rem(row, 8)), 8), _rem(place, 8))
                vector.store(numbers, ref, _indices(_div(row, 8), _div(place, 64), _rem(row, 8), swizzled))

    store(ref, x)


def _queries_of_thread(size: int) -> int:
    """How many neighbours of `size` numbers a thread of a warpgroup takes at once."""
    return min(8, size // WARPGROUP)


def _runs_of_thread(size: int, width: int):
    thread = _rem(mgpu.thread_idx(), WARPGROUP)
    for first in range(0, size, WARPGROUP * width):
        yield arith.addi(_mul(thread, width), _i32(first))


def load_scales(ref, N: int, shape: tuple[int, ...], axis: int) -> jax.Array:
    """A tile's scales, of scales_shape, as float32[shape], whose `axis` are the tokens, at most TILE if that is 0."""
    layout = _LAYOUT.reduce(1 - axis)
    tokens = shape[axis]
    block = min(N, tokens)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),), return_type=plgpu.ShapeDtypeStruct((tokens,), jnp.float32, layout=layout)
    )
    def load(_, ref):
        tiled = layout.to_mgpu()
        kind = tiled.registers_element_type(ir.F32Type.get())
        index = ir.IndexType.get()
        registers = np.empty(tiled.registers_shape((tokens,)), dtype=object)
        token = next(iter(tiled.thread_idxs((tokens,))))[0]  # of the first register; the others' are 8 further each
        place = [operation(token, mgpu.c(block, index)) for operation in (arith.divui, arith.remui)]
        for i in range(registers.size):
            further = divmod(8 * i, block)
            registers.flat[i] = vector.load(
                kind, ref, [arith.addi(x, mgpu.c(y, index)) for x, y in zip(place, further, strict=True)]
            )
        return FragmentedArray(_registers=registers, _layout=tiled, _is_signed=None)

    return lax.broadcast_in_dim(load(ref), shape, [axis])


def lift(dtype) -> float:
    """By how much, in base 2, a softmax's weights are larger over eight bits: times its scale, a value's weight is then
    at most the value's largest element, where small scales would leave float16 few digits. The result is the same, as
    its numerator and denominator are both larger."""
    return math.log2(LARGEST[jnp.dtype(dtype).name])


def widen_tile(ref, wide) -> None:
    """An eight-bit tile [tokens, D] goes to `wide`, of 16 bits, as wgmma reads it. They may share their memory: all is
    read before anything is written.

    A warp takes 8 tokens and 64 columns at a time, a thread of it 16 columns of a token, such that neither in the reads
    nor in the writes any two of 8 neighbouring threads meet in a bank.
    """
    tokens, D = ref.shape
    name, dtype = jnp.dtype(ref.dtype).name, jnp.dtype(wide.dtype).name
    runs = range(tokens * D // (16 * WARPGROUP))

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(tile_transforms(D)), plgpu.RefType(TILED)))
    def widen(_, ref, wide):
        words = ir.VectorType.get((4,), ir.IntegerType.get_signless(32))
        thread = _rem(mgpu.thread_idx(), WARPGROUP)
        warp, lane = _div(thread, 32), _rem(thread, 32)
        chunk, row = _rem(lane, 4), arith.xori(_div(lane, 8), _mul(_bit(lane, 4), 5))
        rows, columns = _div(warp, D // 64), _rem(warp, D // 64)
        offset = _offset(_add(_mul(rows, 8), row), _add(_mul(columns, 4), chunk), D)
        source = _at(mgpu.memref_ptr(ref), offset)
        targets = []
        for half in range(2):
            swizzled = arith.xori(_add(_mul(chunk, 2), _i32(half)), row)
            offset = _add(_mul(warp, 1024), _mul(row, 128), _mul(swizzled, 16))
            targets.append(_at(mgpu.memref_ptr(wide), offset))
        found = [llvm.load(words, _at(source, 16 * WARPGROUP * i), alignment=16) for i in runs]
        mgpu.warpgroup_barrier()
        for i in runs:
            pairs = [
                pair
                for word in range(4)
                for pair in _widen_neighbours(vector.extract(found[i], [], [word]), name, dtype)
            ]
            for half, target in enumerate(targets):
                part = vector.from_elements(words, pairs[4 * half : 4 * half + 4])
                llvm.store(part, _at(target, 32 * WARPGROUP * i), alignment=16)
        mgpu.commit_shared()

    widen(ref, wide)


def reduce_rows(x, kind: str, scratch):
    """The sum ("add") or maximum ("max") down the rows of x [TILE, R]. scratch: float32[reduction_scratch(R)]."""
    R = x.shape[1]

    @plgpu.inline_mgpu(
        arg_types=(_LAYOUT, plgpu.RefType()),
        return_type=plgpu.ShapeDtypeStruct((R,), x.dtype, layout=_LAYOUT.reduce(0)),
    )
    def reduce(_, x, scratch):
        return x.reduce(kind, 0, scratch)

    return reduce(x, scratch)


def reduction_scratch(R: int) -> int:
    """Floats that reduce_rows needs: two columns a thread at a time."""
    return 2 * WARPGROUP * R // 8


def store_result(ref, x, count: int) -> None:
    """The first `count` columns of x [D, R], a product with values_operand on its left, go to ref, flat [any * D]."""
    D = x.shape[0]

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _LAYOUT))
    def store(_, ref, x):
        for (row, column), register in zip(x.layout.thread_idxs(x.shape), x.registers.flat, strict=True):
            row = _element_of_row(row)
            for i in range(2):
                head = arith.addi(column, mgpu.c(i, column.type))
                with mgpu.when(arith.cmpi(arith.CmpIPredicate.ult, head, mgpu.c(count, head.type))):
                    place = arith.addi(arith.muli(head, mgpu.c(D, head.type)), row)
                    vector.store(mgpu.vector_slice(register, slice(i, i + 1)), ref, [place])

    store(ref, x)


def store_row(ref, x, count: int) -> None:
    """The first `count` values of x [R], as reduce_rows makes it, go to ref [any]."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _LAYOUT.reduce(0)))
    def store(_, ref, x):
        for (column,), register in zip(x.layout.thread_idxs(x.shape), x.registers.flat, strict=True):
            for i in range(2):
                head = arith.addi(column, mgpu.c(i, column.type))
                with mgpu.when(arith.cmpi(arith.CmpIPredicate.ult, head, mgpu.c(count, head.type))):
                    vector.store(mgpu.vector_slice(register, slice(i, i + 1)), ref, [head])

    store(ref, x)


def _widened(ref, dtype, shape, words: Callable):
    """An array of `shape` in wgmma's layout from the words of an eight-bit tile and where their even and odd bytes go,
    each as (64 rows, 8 columns, half of 16 rows)."""
    name = jnp.dtype(ref.dtype).name

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(tile_transforms(ref.shape[1])),),
        return_type=plgpu.ShapeDtypeStruct(shape, dtype, layout=_LAYOUT),
    )
    def widen(_, ref):
        element = mgpu.dtype_to_ir_type(dtype)
        tiled = _LAYOUT.to_mgpu()
        registers = np.empty(tiled.registers_shape(shape), dtype=object)
        thread = _rem(mgpu.thread_idx(), WARPGROUP)
        for word, *places in words(mgpu.memref_ptr(ref), _div(thread, 32), _rem(thread, 32)):
            for odd, (m, n, half) in enumerate(places):
                pair = _widen(word, bool(odd), name, jnp.dtype(dtype).name)
                registers[m, n, 0, 0, half, 0, 0, 0, 0] = mgpu.bitcast(pair, ir.VectorType.get((2,), element))
        return FragmentedArray(_registers=registers, _layout=tiled, _is_signed=None)

    return widen(ref)


def _load_matrices(base, row, chunk, D: int, transposed: bool):
    """Four matrices of 8 rows of 16 bytes, the thread's word of each; `row` and `chunk` are where the lane's row is."""
    i32 = ir.IntegerType.get_signless(32)
    found = nvvm.ldmatrix(
        _at(base, _offset(row, chunk, D)),
        layout=nvvm.MMALayout.col if transposed else nvvm.MMALayout.row,
        num=4,
        shape=ir.Attribute.parse("#nvvm.ld_st_matrix_shape<m=8, n=8>"),
        elt_type=nvvm.LdStMatrixEltType.B16,
    )
    return [llvm.extractvalue(i32, found, [i]) for i in range(4)]


def _offset(row, chunk, D: int):
    """In bytes, of 16 numbers of a row of an eight-bit tile."""
    width = min(D, 128)
    chunks = width // 16
    in_tile = _rem(row, 8)
    swizzled = arith.xori(_rem(chunk, chunks), in_tile if width == 128 else _div(in_tile, 2))
    tile = arith.addi(_mul(_div(row, 8), D // width), _div(chunk, chunks))
    return _add(_mul(tile, 8 * width), _mul(in_tile, width), _mul(swizzled, 16))


def _widen_neighbours(word, name: str, wide: str):
    """The four bytes of a word, in order, as two pairs of numbers of 16 bits."""
    for places in (0x1100, 0x3322):  # a byte for each of four, so that two neighbours are every other one
        spread = mgpu.prmt(word, word, _i32(places))
        yield _widen(spread, name != "int8", name, wide)


def _widen(word, odd: bool, name: str, wide: str):
    """The even or odd two bytes of a word as two numbers of 16 bits. Exact: both formats have more digits.

    An int8 becomes the last digits of a number whose unit they are, less that number. The digits of an e4m3 are moved
    to where the wider format has them, and its exponent is put right by a multiplication.
    """
    short = {"bfloat16": "bf16x2", "float16": "f16x2"}[wide]
    if name == "int8":
        word = arith.shrui(word, _i32(8)) if odd else word
        if wide == "bfloat16":  # 7 digits below the first: the sign is subtracted by itself
            rest = arith.ori(arith.andi(word, _i32(0x007F007F)), _i32(0x43004300))
            sign = arith.ori(arith.andi(word, _i32(0x00800080)), _i32(0x43004300))
            return _ptx(f"sub.{short}", rest, sign)
        biased = arith.xori(arith.andi(word, _i32(0x00FF00FF)), _i32(0x64806480))
        return _ptx(f"sub.{short}", biased, _i32(0x64806480))
    word = word if odd else arith.shli(word, _i32(8))
    shift, digits, factor = {"bfloat16": (4, 0x07F007F0, 0x7B807B80), "float16": (1, 0x3F803F80, 0x5C005C00)}[wide]
    sign = arith.andi(word, _i32(-0x7FFF8000))
    number = arith.ori(sign, arith.andi(arith.shrui(word, _i32(shift)), _i32(digits)))
    return _ptx(f"mul.{short}", number, _i32(factor))


def _element_of_row(row):
    """Of every 16 rows of a product with values_operand, the first 8 are even elements."""
    eight, two = mgpu.c(8, row.type), mgpu.c(2, row.type)
    sixteen = mgpu.c(16, row.type)
    group = arith.muli(arith.divui(row, sixteen), sixteen)
    place = arith.muli(arith.remui(row, eight), two)
    odd = arith.remui(arith.divui(row, eight), two)
    return arith.addi(arith.addi(group, place), odd)


def _at(base, offset):
    return mgpu.getelementptr(base, [offset], ir.IntegerType.get_signless(8))


def _ptx(operation: str, x, y):
    return mgpu.inline_ptx(f"{operation} $0, $1, $2;", x, y, result_types=x.type)


def _i32(value: int):
    return mgpu.c(value, ir.IntegerType.get_signless(32))


def _mul(x, factor: int):
    return arith.muli(x, _i32(factor))


def _div(x, divisor: int):
    return arith.divui(x, _i32(divisor))


def _rem(x, divisor: int):
    return arith.remui(x, _i32(divisor))


def _bit(x, value: int):
    return _rem(_div(x, value), 2)


def _add(*xs):
    total, *more = xs
    for x in more:
        total = arith.addi(total, x)
    return total


def _indices(*xs):
    return [arith.index_cast(ir.IndexType.get(), x) for x in xs]
