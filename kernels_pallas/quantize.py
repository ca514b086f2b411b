"""Eight-bit keys and values: symmetric, with one scale for each token and head.

A scale is what takes the largest element of the head's vector to the largest number of the format, so it follows every
token by itself: nothing is calibrated, and no token changes what another reads as.
"""

import jax
import jax.numpy as jnp

LARGEST = {"float8_e4m3fn": 448.0, "int8": 127.0}
SCALE_DTYPE = jnp.float32


def is_quantized(dtype) -> bool:
    return jnp.dtype(dtype).name in LARGEST


def quantize(x: jax.Array, dtype) -> tuple[jax.Array, jax.Array]:
    """x [..., D] -> values dtype[..., D], rounded to the nearest even, and scales float32[...]: x is about
    values * scales. A vector of zeros, or of numbers below 1e-36, has the scale 0."""
    x = x.astype(SCALE_DTYPE)
    largest = LARGEST[jnp.dtype(dtype).name]
    scales = jnp.max(jnp.abs(x), axis=-1) / largest
    values = jnp.clip(x / jnp.where(scales > 0, scales, 1.0)[..., None], -largest, largest)
    if jnp.issubdtype(dtype, jnp.integer):
        values = jnp.round(values)
    return values.astype(dtype), scales


def vector_bytes(head_dim: int, dtype) -> int:
    """Of one token's key, or value, of one head."""
    dtype = jnp.dtype(dtype)
    return head_dim * dtype.itemsize + (jnp.dtype(SCALE_DTYPE).itemsize if is_quantized(dtype) else 0)
