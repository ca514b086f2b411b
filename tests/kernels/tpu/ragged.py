"""Random ragged batches over a paged cache, in the reference's layout and in the TPU's."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import AttentionBatch, quantize
from kernels_pallas.tpu.layout import Layout


@dataclass(frozen=True)
class Sizes:
    """H query and K key/value heads of D; pages of N tokens, P in a table; T token and S sequence rows."""

    H: int
    K: int
    D: int
    N: int
    P: int
    T: int
    S: int
    dtype: str = "float32"
    cache_dtype: str = ""  # of eight bits, or empty: dtype


class Case(NamedTuple):
    q: jax.Array  # [T, H, D]
    k: jax.Array  # [T, K, D]
    v: jax.Array  # [T, K, D]
    cache: tuple[jax.Array, ...]  # the reference's: [B, K, N, D], and scales [B, K, N]
    batch: AttentionBatch


def make_case(rng: np.random.Generator, sizes: Sizes, lens: list[tuple[int, int]], num_decodes: int) -> Case:
    """lens: (tokens in all, of them new) of each sequence, the first `num_decodes` with one new token.

    What nobody may read is NaN: rows of padding, blocks of no sequence, and every place that is not written yet.
    """
    S, N, P, T, K, D = sizes.S, sizes.N, sizes.P, sizes.T, sizes.K, sizes.D
    num_blocks = S * P + 9
    free = list(rng.permutation(np.arange(1, num_blocks)))
    tables, kv_lens, cu = np.zeros((S, P), np.int32), np.zeros(S, np.int32), np.zeros(S + 1, np.int32)
    filled = np.zeros((num_blocks, N), bool)
    for s, (total, new) in enumerate(lens):
        for b in range(-(-total // N)):
            tables[s, b] = free.pop()
            filled[tables[s, b], : max(0, total - new - b * N)] = True
        kv_lens[s], cu[s + 1] = total, cu[s] + new
    cu[len(lens) + 1 :] = cu[len(lens)]

    def random(shape, is_real):
        return jnp.asarray(np.where(is_real, rng.standard_normal(shape), np.nan), sizes.dtype)

    is_token = (np.arange(T) < cu[-1])[:, None, None]
    q, k, v = (random((T, heads, D), is_token) for heads in (sizes.H, K, K))
    keys, values = (random((num_blocks, K, N, D), filled[:, None, :, None]) for _ in range(2))
    batch = AttentionBatch(
        jnp.asarray(kv_lens),
        jnp.asarray(tables),
        jnp.asarray(cu),
        jnp.asarray([num_decodes, len(lens)], jnp.int32),
        decode_only=num_decodes == len(lens) and T == S,
    )
    cache = (keys, values)
    if sizes.cache_dtype:
        stored, scales = zip(*(quantize(x, sizes.cache_dtype) for x in cache), strict=True)
        is_filled = filled[:, None, :]  # int8 has no NaN; the scales do
        cache = (*stored, *(jnp.where(is_filled, x, jnp.nan) for x in scales))
    return Case(q, k, v, cache, batch)


def random_lens(rng: np.random.Generator, sizes: Sizes, num_decodes: int, num_prompts: int) -> list[tuple[int, int]]:
    """Decodes, then prompts: whole, chunks behind a cached prefix, single tokens; together at most T."""
    context, room = sizes.N * sizes.P, sizes.T - num_decodes
    lens = [(int(rng.integers(1, context + 1)), 1) for _ in range(num_decodes)]
    cuts = np.sort(rng.choice(np.arange(1, room), num_prompts, replace=False)) if num_prompts else []
    for new in np.diff(cuts, prepend=0):
        new = int(min(new, context))
        cached = int(rng.integers(0, context - new + 1)) * int(rng.integers(0, 2))
        lens.append((cached + new, new))
    return lens


def to_tpu(cache: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """The reference's keys, values and scales -> the TPU's pages and scales."""
    half = Layout(cache[0].shape[-1]).row_lanes // 2
    rows = [jnp.pad(x, ((0, 0),) * 3 + ((0, half - x.shape[-1]),)) for x in cache[:2]]
    return jnp.concatenate(rows, axis=-1), *([jnp.stack(cache[2:], axis=2)] if cache[2:] else [])


def from_tpu(cache: tuple[jax.Array, ...], D: int) -> tuple[jax.Array, ...]:
    pages, *scales = cache
    half = pages.shape[-1] // 2
    return pages[..., :D], pages[..., half : half + D], *(x[:, :, i] for x in scales for i in (0, 1))
