"""Random ragged batches, with a cache in the reference's layout and in the TPU's."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import AttentionBatch
from kernels_pallas.tpu.layout import Layout


@dataclass(frozen=True)
class Sizes:
    """H query and K key/value heads of D; pages of N tokens; T token and S sequence rows."""

    H: int
    K: int
    D: int
    N: int
    T: int
    S: int
    dtype: str = "float32"
    num_blocks: int = 64


def to_tpu(cache: tuple[jax.Array, jax.Array]) -> jax.Array:
    """[B, K, N, D] keys and values -> the TPU's pages."""
    half = Layout(cache[0].shape[-1]).row_lanes // 2
    return jnp.concatenate([jnp.pad(x, ((0, 0),) * 3 + ((0, half - x.shape[-1]),)) for x in cache], axis=-1)


def from_tpu(cache: jax.Array, D: int) -> tuple[jax.Array, jax.Array]:
    half = cache.shape[-1] // 2
    return cache[..., :D], cache[..., half : half + D]


def make_batch(rng: np.random.Generator, sizes: Sizes, lens: list[tuple[int, int]], num_decodes: int):
    """lens: (tokens in all, of them new) of each sequence, the first `num_decodes` with one new token.

    Returns q, k, v, the reference's cache and the batch. Rows of padding and blocks of nobody hold large numbers.
    """
    S, N, T = sizes.S, sizes.N, sizes.T
    P = max(-(-total // N) for total, _ in lens) + 1
    free = list(rng.permutation(np.arange(1, sizes.num_blocks)))
    tables, kv_lens, cu = np.zeros((S, P), np.int32), np.zeros(S, np.int32), np.zeros(S + 1, np.int32)
    for s, (total, new) in enumerate(lens):
        for b in range(-(-total // N)):
            tables[s, b] = free.pop()
        kv_lens[s], cu[s + 1] = total, cu[s] + new
    cu[len(lens) + 1 :] = cu[len(lens)]
    poison = np.where(np.arange(T) < cu[-1], 1.0, 1e3)[:, None, None]
    q, k, v = (
        jnp.asarray(rng.standard_normal((T, heads, sizes.D)) * poison, sizes.dtype)
        for heads in (sizes.H, sizes.K, sizes.K)
    )
    shape = (sizes.num_blocks, sizes.K, N, sizes.D)
    cache = tuple(jnp.asarray(rng.standard_normal(shape), sizes.dtype) for _ in range(2))
    batch = AttentionBatch(
        jnp.asarray(kv_lens),
        jnp.asarray(tables),
        jnp.asarray(cu),
        jnp.asarray([num_decodes, len(lens)], jnp.int32),
        decode_only=num_decodes == len(lens) and T == S,
    )
    return q, k, v, cache, batch
