"""Eight-bit keys and values: symmetric, with one scale for each token and head.

A scale is what takes the largest element of the head's vector to the largest number of the format, so it follows every
token by itself: nothing is calibrated, and no token changes what another reads as.
"""

import jax
import jax.numpy as jnp
from jax import lax

LARGEST = {"float8_e4m3fn": 448.0, "int8": 127.0}
SCALE_DTYPE = jnp.float32


def is_quantized(dtype) -> bool:
    return jnp.dtype(dtype).name in LARGEST


def quantize(x: jax.Array, dtype) -> tuple[jax.Array, jax.Array]:
    """x [..., D] -> values dtype[..., D], rounded to the nearest even, and scales float32[...]: x is about
    values * scales. A vector of zeros, or of numbers below 1e-36, has the scale 0."""
    x = x.astype(SCALE_DTYPE)
    scales = scales_of(jnp.max(jnp.abs(x), axis=-1), dtype)
    return rounded(x, scales[..., None], dtype), scales


def scales_of(largest: jax.Array, dtype) -> jax.Array:
    """The scales of vectors with these largest elements, float32, 0 where their inverse may not be finite."""
    scales = largest * (1 / LARGEST[jnp.dtype(dtype).name])
    return jnp.where(scales < jnp.finfo(SCALE_DTYPE).tiny, 0.0, scales)


def rounded(x: jax.Array, scales: jax.Array, dtype) -> jax.Array:
    """x / scales, float32, in `dtype`."""
    limit = LARGEST[jnp.dtype(dtype).name]
    x = x * (1 / jnp.where(scales > 0, scales, 1.0))
    x = jnp.minimum(jnp.maximum(x, -limit), limit)
    return (lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN) if jnp.issubdtype(dtype, jnp.integer) else x).astype(dtype)


def vector_bytes(head_dim: int, dtype) -> int:
    """Of one token's key, or value, of one head."""
    dtype = jnp.dtype(dtype)
    return head_dim * dtype.itemsize + (jnp.dtype(SCALE_DTYPE).itemsize if is_quantized(dtype) else 0)
