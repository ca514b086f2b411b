"""Linear layers and norms: plain XLA, and the kernels that are faster on some machines and shapes, or always the same.

T tokens. `deterministic`: a token's result is the same to the bit whatever the other tokens and T; there are kernels
for that on Hopper alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.attention import UnsupportedShapeError
from kernels_pallas.rotary import rms_norm as rms_norm_through_xla
from kernels_pallas.rotary import sum_parts

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": lambda x: jnp.maximum(x, 0),
}


@partial(jax.tree_util.register_dataclass, data_fields=("weight",), meta_fields=("epsilon", "offset"))
@dataclass(frozen=True)
class Norm:
    """An RMS norm: x / rms(x) * (offset + weight [E])."""

    weight: jax.Array
    epsilon: float
    offset: float


@partial(jax.tree_util.register_dataclass, data_fields=("scaled", "squares"), meta_fields=("epsilon",))
@dataclass(frozen=True)
class Normed:
    """The RMS norm of something, as linear layers take it.

    Attributes:
      scaled: [T, E], what its weights have been multiplied into, but which is not divided by its rms yet.
      squares: float32[T, any], what the squares of each row add up to.
      epsilon: of the norm.
    """

    scaled: jax.Array
    squares: jax.Array
    epsilon: float

    @property
    def shape(self) -> tuple[int, ...]:
        return self.scaled.shape

    @property
    def dtype(self) -> jnp.dtype:
        return self.scaled.dtype

    def array(self) -> jax.Array:
        """[T, E], for who needs it as such."""
        mean = jnp.sum(self.squares, axis=1, keepdims=True) / self.shape[1]
        return (self.scaled.astype(jnp.float32) * lax.rsqrt(mean + self.epsilon)).astype(self.scaled.dtype)


def linear(
    x: jax.Array | Normed, kernel: jax.Array, *, out_dtype, backend: str, deterministic: bool = False
) -> jax.Array:
    """x [T, in], kernel [out, in] -> [T, out], accumulated in float32; float32 inputs are rounded nowhere.

    Raises:
      UnsupportedShapeError: `deterministic`, and there is no kernel for this shape.
    """
    parts = linear_parts(x, kernel, out_dtype=out_dtype, backend=backend, deterministic=deterministic)
    return sum_parts(parts, out_dtype)


def linear_parts(
    x: jax.Array | Normed, kernel: jax.Array, *, out_dtype, backend: str, deterministic: bool = False
) -> jax.Array:
    """What `linear` adds up: one part of out_dtype, or several of float32, [parts, T, out]."""
    if _kernel_serves(x, kernel, backend, deterministic):
        from kernels_pallas.gpu import linear

        x, rms = _apart(x)
        return linear.linear_parts(x, kernel, out_dtype=out_dtype, rms=rms)
    return through_xla(array_of(x), kernel, out_dtype)[None]


def add_linear(
    total: jax.Array, x: jax.Array, kernel: jax.Array, norm: Norm, *, backend: str, deterministic: bool = False
) -> tuple[jax.Array, jax.Array | Normed]:
    """total [T, out] + `linear` of x, and the norm of that, where a kernel makes both; else `total` as it is, and the
    parts [any, T, out] that are to be added."""
    if _kernel_serves(x, kernel, backend, deterministic) and not deterministic:
        from kernels_pallas.gpu import linear

        if linear.can_add(x, kernel):
            total, scaled, squares = linear.add_linear(total, x, kernel, norm.weight, norm.offset)
            return total, Normed(scaled, squares, norm.epsilon)
    return total, linear_parts(x, kernel, out_dtype=total.dtype, backend=backend, deterministic=deterministic)


def gated_linear(
    x: jax.Array | Normed, kernel: jax.Array, activation: str, *, backend: str, deterministic: bool = False
) -> jax.Array:
    """activation(gate) * up, where x [T, in] and kernel [2 F, in] give [gate, up] -> [T, F]; the activation is one of
    ACTIVATIONS. Raises as `linear`."""
    if _kernel_serves(x, kernel, backend, deterministic, activation):
        from kernels_pallas.gpu import linear

        x, rms = _apart(x)
        return linear.gated_linear(x, kernel, ACTIVATIONS[activation], rms=rms)
    x = array_of(x)
    gate, up = jnp.split(through_xla(x, kernel, x.dtype), 2, axis=1)
    return ACTIVATIONS[activation](gate) * up


def rms_norm(
    x: jax.Array, weight: jax.Array, epsilon: float, offset: float = 0.0, *, deterministic: bool = False
) -> jax.Array:
    """x [T, E] / rms(x) * (offset + weight), in float32 (arXiv 1910.07467); in weight's dtype."""
    if deterministic:
        from kernels_pallas.gpu import norm

        return norm.rms_norm(x, weight, epsilon, offset)
    return rms_norm_through_xla(x, weight, epsilon, offset)


def add_rms_norm(
    x: jax.Array,
    parts: jax.Array,
    weight: jax.Array,
    epsilon: float,
    offset: float = 0.0,
    *,
    backend: str,
    deterministic: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """x [T, E] + the sum of parts [any, T, E], which is rounded to x's dtype first; and the `rms_norm` of that."""
    if backend == "mosaic_gpu" and x.dtype.itemsize == 2:
        from kernels_pallas.gpu import norm

        return norm.add_rms_norm(x, parts, weight, epsilon, offset)
    x = x + sum_parts(parts, x.dtype)
    return x, rms_norm(x, weight, epsilon, offset, deterministic=deterministic)


def array_of(x: jax.Array | Normed) -> jax.Array:
    """[T, E]."""
    return x.array() if isinstance(x, Normed) else x


def _apart(x: jax.Array | Normed):
    """x as kernels take it, and what its rows are to be divided by, if it is not yet."""
    from kernels_pallas.gpu import linear

    return (x.scaled, linear.Rms(x.squares, x.epsilon)) if isinstance(x, Normed) else (x, linear.WHOLE)


def _kernel_serves(x, kernel, backend: str, deterministic: bool, activation: str | None = None) -> bool:
    if backend != "mosaic_gpu":
        return False
    from kernels_pallas.gpu import linear

    unsupported = linear.unsupported(x, kernel, activation)
    if deterministic and unsupported:
        raise UnsupportedShapeError(f"deterministic: there is no kernel for {unsupported}; leave deterministic off")
    return deterministic or not (unsupported or linear.slower_than_xla(x, kernel, activation))


def through_xla(x: jax.Array, kernel: jax.Array, out_dtype) -> jax.Array:
    """As `linear`."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None

    def dot(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        contract_last = (((1,), (1,)), ((), ()))
        return lax.dot_general(lhs, rhs, contract_last, precision=precision, preferred_element_type=out_dtype)

    def on_cpu(x: jax.Array, kernel: jax.Array) -> jax.Array:
        """XLA repacks a dot's right side on every call: let it be the small one, and the barrier keep the compiler from
        swapping them back. A bfloat16 product with one row takes it 5 times as long as with two."""
        rows = x.shape[0]
        if rows == 1 and x.dtype == jnp.bfloat16:
            x = jnp.pad(x, ((0, 1), (0, 0)))
        return lax.optimization_barrier(dot(kernel, x)).T[:rows]

    return lax.platform_dependent(x, kernel, cpu=on_cpu, default=dot)
