"""Ragged paged attention on Hopper: the reference's cache layout, decode and prefill kernels."""

import logging
from collections.abc import Callable
from functools import partial

import jax.numpy as jnp

from kernels_pallas import reference
from kernels_pallas.attention import UnsupportedShapeError, rotated_qkv
from kernels_pallas.gpu.decode import decode_attention, decode_projected
from kernels_pallas.gpu.decode_eight_bits import decode_eight_bits
from kernels_pallas.gpu.prefill import prefill_attention
from kernels_pallas.gpu.qkv import rotate_and_write
from kernels_pallas.quantize import is_quantized
from kernels_pallas.rotary import sum_parts

log = logging.getLogger(__name__)
cache_shape = reference.cache_shape  # a [N, D] slab of one block and head is contiguous: one copy fetches it


def ragged_paged_attention(q, k, v, cache, batch, *, scale, window=None, soft_cap=None, sinks=None):
    """See kernels_pallas.attention."""
    options = {"scale": scale, "window": window, "soft_cap": soft_cap, "sinks": sinks}
    dtype = q.dtype if is_quantized(cache[0].dtype) else cache[0].dtype
    if _falls_back(q.shape[1], dtype, cache, batch):
        return reference.ragged_paged_attention(q, k, v, cache, batch, **options)
    cache = reference.write_cache(k, v, cache, batch)
    out, cache = _attend(q.astype(dtype), cache, batch, **options)
    return out.astype(q.dtype), cache


def qkv_attention(
    parts, rotary, norms, cache, batch, *, num_heads, dtype, scale, window=None, soft_cap=None, sinks=None
):
    """See kernels_pallas.attention."""
    options = {"scale": scale, "window": window, "soft_cap": soft_cap}
    _, T, _, D = parts.shape
    tables = [table.reshape(T, -1) for table in rotary]
    same = dtype == cache[0].dtype or is_quantized(cache[0].dtype)
    if not same or 2 * tables[0].shape[1] != D or _falls_back(num_heads, dtype, cache, batch):
        q, k, v = rotated_qkv(sum_parts(parts, dtype), rotary, norms, num_heads)
        return ragged_paged_attention(q, k, v, cache, batch, sinks=sinks, **options)
    weights, epsilon, norm_offset = (
        (None, 0.0, 0.0) if norms is None else ((norms.q, norms.k), norms.epsilon, norms.offset)
    )
    heads = {"num_heads": num_heads, "epsilon": epsilon, "norm_offset": norm_offset}
    project = partial(decode_projected, parts, tables, weights, **heads, **options)
    from_projection = not (batch.deterministic or is_quantized(cache[0].dtype))
    if from_projection and batch.decode_only:
        return project(cache, batch.kv_lens, batch.block_tables, sinks, batch.arrivals)
    block, offset = reference.places(T, cache, batch)
    q, cache = rotate_and_write(parts, tables, weights, cache, block, offset, dtype=dtype, **heads)
    return _attend(q, cache, batch, sinks, project if from_projection else None, **options)


def _attend(q, cache, batch, sinks, project=None, **options):
    """q [T, H, D] over what is cached, this step's keys and values among it; and the cache. q has the cache's dtype, or
    16 bits where the cache has eight. project: how decode-only steps attend from the projection, if they do; decodes
    beside prompts do so too, for a token's result to be the same in both."""
    decode: Callable = project or partial(_decode, q, **options)
    if batch.deterministic:  # a token's kernel must not follow from the step that it is in
        num_seqs = batch.num_seqs.at[0].set(0)
        return _prefill(q, cache, batch, num_seqs, sinks, **options), cache
    if batch.decode_only:
        return decode(cache, batch.kv_lens, batch.block_tables, sinks, batch.arrivals)
    rows = jnp.arange(min(len(q), len(batch.kv_lens)))  # a decode's only token is in the row of its sequence
    is_decode = rows < batch.num_seqs[0]
    kv_lens = jnp.where(is_decode, batch.kv_lens[: len(rows)], 0)
    decodes, cache = decode(cache, kv_lens, batch.block_tables[: len(rows)], sinks, batch.arrivals)
    out = _prefill(q, cache, batch, batch.num_seqs, sinks, **options)
    return out.at[jnp.where(is_decode, rows, len(q))].set(decodes, mode="drop", unique_indices=True), cache


def _prefill(q, cache, batch, num_seqs, sinks, **options):
    return prefill_attention(q, cache, batch.kv_lens, batch.block_tables, batch.cu_q_lens, num_seqs, sinks, **options)


def _decode(q, cache, kv_lens, block_tables, sinks, arrivals, **options):
    q = q[: len(kv_lens)]
    if is_quantized(cache[0].dtype):
        return decode_eight_bits(q, cache, kv_lens, block_tables, sinks, **options), cache
    return decode_attention(q, *cache, kv_lens, block_tables, sinks, arrivals, **options), cache


def _falls_back(num_heads, dtype, cache, batch) -> bool:
    unsupported = _unsupported(num_heads, dtype, cache)
    if unsupported and batch.deterministic:
        raise UnsupportedShapeError(f"deterministic: there is no attention kernel for {unsupported}")
    if unsupported:
        log.warning("No attention kernel for %s: attention runs through plain XLA", unsupported)
    return bool(unsupported)


def _unsupported(num_heads, dtype, cache) -> str | None:
    """What the kernels cannot do in these shapes, multiplying numbers of `dtype`, in words, or None."""
    _, K, N, D = cache[0].shape
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"{dtype} over a cache of {cache[0].dtype}"
    if D not in (64, 128, 256):
        return f"heads of {D}"
    if num_heads // K > 16:
        return f"{num_heads // K} query heads to a key/value head"
    if N < 8 or N & (N - 1):
        return f"blocks of {N} tokens"
    return None
