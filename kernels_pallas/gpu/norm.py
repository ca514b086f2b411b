"""RMS norm in one pass, of x or of what x becomes by adding: a warpgroup takes a row, whatever the others are, and adds
its squares in one order."""

import math
from functools import partial

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic.gpu import utils as mgpu
from jax.experimental.mosaic.gpu.fragmented_array import FragmentedArray
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from kernels_pallas.gpu.rows import WARPGROUP

PARAMS = plgpu.CompilerParams(
    approx_math=False, reduction_scratch_bytes=64, lowering_semantics=plgpu.LoweringSemantics.Lane
)


@partial(jax.jit, static_argnames=("epsilon", "offset"))
def rms_norm(x, weight, epsilon: float, offset: float = 0.0) -> jax.Array:
    """As kernels_pallas.rms_norm of x [T, E], both of the same dtype."""
    kernel = partial(_norm, epsilon=epsilon, offset=offset)
    return _call(kernel, "rms_norm", jax.ShapeDtypeStruct(x.shape, weight.dtype), len(x))(x, weight)


@partial(jax.jit, static_argnames=("epsilon", "offset"))
def add_rms_norm(x, parts, weight, epsilon: float, offset: float = 0.0) -> tuple[jax.Array, jax.Array]:
    """As kernels_pallas.add_rms_norm of x [T, E] and parts [any, T, E], weight of x's dtype."""
    out = jax.ShapeDtypeStruct(x.shape, x.dtype)
    kernel = partial(_add_norm, epsilon=epsilon, offset=offset)
    return _call(kernel, "add_rms_norm", (out, out), len(x))(x, parts, weight)


def _call(kernel, name: str, out_type, rows: int):
    return plgpu.kernel(
        kernel, out_type=out_type, grid=(rows,), grid_names=("row",), kernel_name=name, compiler_params=PARAMS
    )


def _norm(x, weight, out, *, epsilon, offset):
    row = lax.axis_index("row")
    _store(out.at[row], _normalized(_load(x.at[row]), _load(weight), x.shape[1], epsilon, offset))


def _add_norm(x, parts, weight, total, out, *, epsilon, offset):
    row = lax.axis_index("row")
    values, scale = _load(x.at[row]), _load(weight)
    added = [_load(parts.at[i, row]).astype(jnp.float32) for i in range(len(parts))]
    values += sum(added[1:], start=added[0]).astype(x.dtype)
    _store(total.at[row], values)
    _store(out.at[row], _normalized(values, scale, x.shape[1], epsilon, offset))


def _normalized(values, scale, E, epsilon, offset):
    """Of E values, and zeros."""
    wide = values.astype(jnp.float32)
    inverse = lax.rsqrt((wide * wide).sum() * (1 / E) + epsilon)
    return (wide * inverse * (scale.astype(jnp.float32) + offset)).astype(scale.dtype)


# ---- rows of any length, as a warpgroup holds them -------------------------------------------------------------------


def _layout(E: int):
    """Of E values with zeros behind them, as many vectors to each thread."""
    vector_size = math.gcd(E, 8)
    step = WARPGROUP * vector_size
    return plgpu.Layout.WG_STRIDED((pl.cdiv(E, step) * step,), vec_size=vector_size)


def _vectors(layout, E: int):
    """For each vector of this thread where it begins, and whether that is before E; None: it is."""
    begins = layout.linear_thread_idxs()
    for i, begin in enumerate(begins, start=1):
        within = i * WARPGROUP * layout.vec_size <= E
        yield begin, None if within else arith.cmpi(arith.CmpIPredicate.slt, begin, mgpu.c(E, begin.type))


def _load(ref) -> jax.Array:
    """ref [E], and zeros."""
    (E,), layout = ref.shape, _layout(ref.shape[0])
    shape = layout.to_mgpu().shape

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),), return_type=plgpu.ShapeDtypeStruct(shape, ref.dtype, layout=layout)
    )
    def load(_, ref):
        strided = layout.to_mgpu()
        kind = strided.registers_element_type(ir.MemRefType(ref.type).element_type)
        zero = vector.broadcast(kind, mgpu.c(0, kind.element_type))
        registers = np.empty(strided.registers_shape(shape), dtype=object)
        for i, (begin, inside) in enumerate(_vectors(strided, E)):
            last = mgpu.c(E - strided.vec_size, begin.type)
            found = vector.load(kind, ref, [begin if inside is None else arith.minsi(begin, last)])
            registers[i] = found if inside is None else arith.select(inside, found, zero)
        return FragmentedArray(_registers=registers, _layout=strided, _is_signed=None)

    return load(ref)


def _store(ref, x) -> None:
    """x, as `_load` gives it, to ref [E]."""
    (E,), layout = ref.shape, _layout(ref.shape[0])

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout))
    def store(_, ref, x):
        for register, (begin, inside) in zip(x.registers.flat, _vectors(x.layout, E), strict=True):
            if inside is None:
                vector.store(register, ref, [begin])
            else:
                with mgpu.when(inside):
                    vector.store(register, ref, [begin])

    store(ref, x)
