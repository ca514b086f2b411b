"""RMS norm in one pass: a warpgroup takes a row, whatever the others are, and adds its squares in one order."""

from functools import partial

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from kernels_pallas.gpu.rows import WARPGROUP

PARAMS = plgpu.CompilerParams(
    approx_math=False, reduction_scratch_bytes=64, lowering_semantics=plgpu.LoweringSemantics.Lane
)


@partial(jax.jit, static_argnames=("epsilon", "offset"))
def rms_norm(x, weight, epsilon: float, offset: float = 0.0) -> jax.Array:
    """As kernels_pallas.rms_norm of x [T, E], both of the same dtype."""
    T, E = x.shape
    missing = -E % WARPGROUP
    if missing:
        x, weight = jnp.pad(x, ((0, 0), (0, missing))), jnp.pad(weight, (0, missing))
    y = plgpu.kernel(
        partial(_norm, E=E, epsilon=epsilon, offset=offset),
        out_type=jax.ShapeDtypeStruct(x.shape, weight.dtype),
        grid=(T,),
        grid_names=("row",),
        kernel_name="rms_norm",
        compiler_params=PARAMS,
    )(x, weight)
    return y[:, :E]


def _norm(x, weight, out, *, E, epsilon, offset):
    row, size = lax.axis_index("row"), x.shape[1]
    vector = next(v for v in (8, 4, 2, 1) if size % (WARPGROUP * v) == 0)
    layout = plgpu.Layout.WG_STRIDED((size,), vec_size=vector)
    values = plgpu.load(x.at[row], layout=layout).astype(jnp.float32)
    scale = plgpu.load(weight, layout=layout).astype(jnp.float32)
    inverse = lax.rsqrt((values * values).sum() * (1 / E) + epsilon)
    out[row] = (values * inverse * (scale + offset)).astype(out.dtype)
