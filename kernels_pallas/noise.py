"""Gumbel noise that a row's key and a token's id alone decide: what drawing from logits through XLA, and in the kernel
of the output head, have in common."""

import jax
import jax.numpy as jnp

RUN = 128
PAIR = 2 * RUN  # a hash gives two words: tokens j and j + 128 of each so many share one
_ROUNDS = 13
_ROTATIONS = (13, 15, 26, 6, 17, 29, 16, 24)
_PARITY = 0x1BD11BDA


def threefry(high: jax.Array, low: jax.Array, counters: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Threefry-2x32 (Salmon et al. 2011) under keys of two words: two words for each counter; all uint32[...].

    With 13 rounds, the fewest of which its authors know no statistical flaw (Random123, threefry.h); jax.random takes
    their default of 20. In operations that kernels have, too.
    """
    keys = (high, low, high ^ low ^ jnp.uint32(_PARITY))
    x, y = high, counters + low
    for done in range(_ROUNDS):
        if done and done % 4 == 0:
            key = done // 4
            x, y = x + keys[key % 3], y + (keys[(key + 1) % 3] + jnp.uint32(key))
        rotation = _ROTATIONS[done % 8]
        x = x + y
        y = x ^ ((y << jnp.uint32(rotation)) | (y >> jnp.uint32(32 - rotation)))
    return x, y


def gumbel(words: jax.Array) -> jax.Array:
    """Random uint32 -> float32, finite for all: -log(-log(1 - u)), in which the precision of u near 0 goes to the
    large values, which decide."""
    whole = (words >> jnp.uint32(1)).astype(jnp.int32).astype(jnp.float32)
    u = jnp.minimum(whole * 2.0**-31 + 2.0**-32, 1 - 2.0**-24)
    series = u * (1 + u * (1 / 2 + u * (1 / 3 + u * (1 / 4 + u * (1 / 5)))))
    return -jnp.log(jnp.where(u < 2.0**-4, series, -jnp.log(1 - u)))
