"""Ragged paged attention on Hopper: the reference's cache layout, decode and prefill kernels."""

import logging

import jax.numpy as jnp

from kernels_pallas import reference
from kernels_pallas.gpu.decode import decode_attention
from kernels_pallas.gpu.prefill import prefill_attention

log = logging.getLogger(__name__)
cache_shape = reference.cache_shape  # a [N, D] slab of one block and head is contiguous: one copy fetches it


def ragged_paged_attention(q, k, v, cache, batch, *, scale, window, soft_cap, sinks):
    """See kernels_pallas.attention."""
    if unsupported := _unsupported(q, cache):
        log.warning("No attention kernel for %s: attention runs through plain XLA", unsupported)
        return reference.ragged_paged_attention(
            q, k, v, cache, batch, scale=scale, window=window, soft_cap=soft_cap, sinks=sinks
        )
    options = {"scale": scale, "window": window, "soft_cap": soft_cap}
    cache = reference.write_cache(k, v, cache, batch)
    queries = q.astype(cache[0].dtype)
    if batch.decode_only:
        out = decode_attention(queries, *cache, batch.kv_lens, batch.block_tables, sinks, **options)
        return out.astype(q.dtype), cache
    out = prefill_attention(
        queries, *cache, batch.kv_lens, batch.block_tables, batch.cu_q_lens, batch.num_seqs, sinks, **options
    )
    rows = jnp.arange(min(len(q), len(batch.kv_lens)))  # a decode's only token is in the row of its sequence
    is_decode = rows < batch.num_seqs[0]
    kv_lens = jnp.where(is_decode, batch.kv_lens[: len(rows)], 0)
    decodes = decode_attention(queries[: len(rows)], *cache, kv_lens, batch.block_tables[: len(rows)], sinks, **options)
    out = out.at[jnp.where(is_decode, rows, len(q))].set(decodes, mode="drop", unique_indices=True)
    return out.astype(q.dtype), cache


def _unsupported(q, cache) -> str | None:
    """What the kernels cannot do in these shapes, in words, or None."""
    _, K, N, D = cache[0].shape
    if cache[0].dtype not in (jnp.bfloat16, jnp.float16):
        return f"a cache of {cache[0].dtype}"
    if D not in (64, 128, 256):
        return f"heads of {D}"
    if q.shape[1] // K > 16:
        return f"{q.shape[1] // K} query heads to a key/value head"
    if N < 8 or N & (N - 1):
        return f"blocks of {N} tokens"
    return None
