"""Gumbel noise that a row's key and a token's id alone decide: what drawing from logits through XLA, and in the kernel
of the output head, have in common."""

import jax
import jax.numpy as jnp
from jax.extend.random import threefry2x32_p

RUN = 128
PAIR = 2 * RUN  # a hash gives two words: tokens j and j + 128 of each so many share one
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


def hash_through_xla(high: jax.Array, low: jax.Array, counters: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Threefry-2x32 (Salmon et al. 2011) under keys of two words: two words for each counter; all uint32[...]."""
    first, second = threefry2x32_p.bind(high, low, jnp.zeros_like(counters), counters)
    return first, second


def hash_in_kernel(high: jax.Array, low: jax.Array, counters: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same, of operations that kernels have."""
    keys = (high, low, high ^ low ^ jnp.uint32(_PARITY))
    x, y = high, counters + low
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            x = x + y
            y = x ^ ((y << jnp.uint32(rotation)) | (y >> jnp.uint32(32 - rotation)))
        x = x + keys[(group + 1) % 3]
        y = y + (keys[(group + 2) % 3] + jnp.uint32(group + 1))
    return x, y


def gumbel(words: jax.Array) -> jax.Array:
    """Random uint32 -> float32, finite for all: -log(-log(1 - u)), in which the precision of u near 0 goes to the
    large values, which decide."""
    whole = (words >> jnp.uint32(1)).astype(jnp.int32).astype(jnp.float32)
    u = jnp.minimum(whole * 2.0**-31 + 2.0**-32, 1 - 2.0**-24)
    series = u * (1 + u * (1 / 2 + u * (1 / 3 + u * (1 / 4 + u * (1 / 5)))))
    return -jnp.log(jnp.where(u < 2.0**-4, series, -jnp.log(1 - u)))
