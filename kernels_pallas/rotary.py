"""What is between a projection and attention, in plain jnp: adding its parts, norms and rotary embedding of heads."""

import jax
import jax.numpy as jnp
from jax import lax

Tables = tuple[jax.Array, jax.Array]  # cos and sin, float32[T, 1, R / 2]


def sum_parts(parts: jax.Array, dtype) -> jax.Array:
    """[parts, T, ...] -> [T, ...] of dtype, added in their order."""
    return sum(parts[1:], start=parts[0]).astype(dtype)


def rms_norm(x: jax.Array, weight: jax.Array, epsilon: float, offset: float = 0.0) -> jax.Array:
    """x / rms(x) * (offset + weight) over the last axis, in float32 (arXiv 1910.07467); in weight's dtype."""
    y = x.astype(jnp.float32)
    y = y * lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + epsilon)
    return (y * (offset + weight.astype(jnp.float32))).astype(weight.dtype)


def apply_rotary(x: jax.Array, tables: Tables) -> jax.Array:
    """Rotates x [T, H, D] in pairs (i, i + R / 2), in float32; what lies past R stays."""
    cos, sin = tables
    half = cos.shape[-1]
    first, second, rest = jnp.split(x.astype(jnp.float32), [half, 2 * half], axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1).astype(x.dtype)
