"""Ragged paged attention in plain jnp: the oracle for the kernels, and the path where there is no kernel.

One layer's cache is a pair of arrays [B, K, N, D], keys and values, or one array that is both; in eight bits there are
two more, their scales [B, K, N]. Attention walks over chunks of cached tokens with an online softmax (arXiv
1805.02867), so it gathers only blocks in use and keeps no score matrix; how far it walks is decided at run time by the
longest sequence. A chunk that lies wholly behind a sequence's end changes nothing in that sequence's sums, to the bit,
so a result never depends on the neighbours in the batch.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.quantize import SCALE_DTYPE, is_quantized, quantize

KV_CHUNK = 128  # cached tokens gathered at a time
Q_TILE = 128  # prompt tokens that share one walk over the cache
SAME_EXP = 4096  # XLA:CPU takes another exp for arrays with fewer elements, whose last bit differs
MASKED = -1e30  # finite, so that a fully masked row yields no NaN


class Options(NamedTuple):
    scale: float
    window: int | None
    soft_cap: float | None
    sinks: jax.Array | None


class Softmax(NamedTuple):
    """Running maximum and denominator [..., 1] and weighted sum of values [..., D], all float32."""

    maximum: jax.Array
    denominator: jax.Array
    weighted: jax.Array


def cache_shape(num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int, dtype):
    slab = jax.ShapeDtypeStruct((num_blocks, num_kv_heads, block_size, head_dim), dtype)
    scales = (jax.ShapeDtypeStruct(slab.shape[:3], SCALE_DTYPE),) * 2 if is_quantized(dtype) else ()
    return slab, slab, *scales


def ragged_paged_attention(q, k, v, cache, batch, *, scale, window, soft_cap, sinks):
    """See kernels_pallas.attention."""
    options = Options(scale, window, soft_cap, sinks)
    cache = write_cache(k, v, cache, batch)
    if batch.decode_only:
        return attend_decodes(q, cache, batch.kv_lens, batch.block_tables, options), cache
    S = batch.kv_lens.shape[0]
    is_decode = jnp.arange(S) < batch.num_seqs[0]
    decodes = attend_decodes(_rows(q, S), cache, jnp.where(is_decode, batch.kv_lens, 0), batch.block_tables, options)
    out = jnp.zeros_like(q).at[: min(S, len(q))].set(decodes[: len(q)])
    return attend_prompts(q, out, cache, batch, options), cache


def write_cache(k, v, cache, batch):
    """Puts token t's key and value at its position's block and offset."""
    block, offset = places(len(k), cache, batch)
    if is_quantized(cache[0].dtype):
        values, scales = zip(*(quantize(x, cache[0].dtype) for x in (k, v)), strict=True)
        news = (*values, *scales)
    else:
        news = (k, v)[: len(cache)]
    return tuple(x.at[block, :, offset].set(new.astype(x.dtype)) for x, new in zip(cache, news, strict=True))


def places(num_tokens, cache, batch):
    """int32[T] each: the block and the offset in it of every token of the step; padding goes to block 0."""
    tokens = jnp.arange(num_tokens)
    if batch.decode_only:
        seq, position = tokens, batch.kv_lens - 1
    else:
        seq = jnp.searchsorted(batch.cu_q_lens[1:], tokens, side="right")
        seq = jnp.minimum(seq, batch.kv_lens.shape[0] - 1)
        position = batch.kv_lens[seq] - batch.cu_q_lens[seq + 1] + tokens
    valid = (position >= 0) & (tokens < batch.num_tokens)
    block_size = cache[0].shape[2]
    position = jnp.where(valid, position, 0)
    block = jnp.where(valid, batch.block_tables[seq, position // block_size], 0)
    return block, position % block_size


class Chunk(NamedTuple):
    """Cached tokens as they are multiplied: keys, values [..., C, D]; scales [..., C] of eight-bit ones, else None."""

    keys: jax.Array
    values: jax.Array
    key_scales: jax.Array | None
    value_scales: jax.Array | None

    @classmethod
    def gather(cls, cache, blocks, heads, dtype):
        """The tokens of some blocks, of some heads; keys, and what was eight bits, in `dtype`."""
        rows = jnp.broadcast_shapes(blocks.shape, heads.shape)[:-1]
        keys, *more = (x[blocks, heads].reshape(*rows, -1, *x.shape[3:]) for x in cache)
        values, key_scales, value_scales = (*more, None, None)[:3] if more else (keys, None, None)
        return cls(keys.astype(dtype), values if key_scales is None else values.astype(dtype), key_scales, value_scales)


def _scaled(x, scales):
    """x [..., rows, C] times scales [..., C]."""
    return x if scales is None else x * scales[..., None, :]


def attend_decodes(q, cache, kv_lens, block_tables, options: Options):
    """One query token for each sequence. q [S, H, D]; rows with kv_lens 0 give zeros."""
    rows, H, D = q.shape
    S = max(rows, -(-SAME_EXP // (H * KV_CHUNK)))
    q, kv_lens, block_tables = (_rows(x, S) for x in (q, kv_lens, block_tables))
    K, N = cache[0].shape[1:3]
    queries = q.reshape(S, K, H // K, D)
    block_tables, blocks_per_chunk = _whole_chunks(block_tables, N)
    chunk = blocks_per_chunk * N
    position = kv_lens - 1

    def walk(i, state):
        pages = lax.dynamic_slice_in_dim(block_tables, i * blocks_per_chunk, blocks_per_chunk, axis=1)
        part = Chunk.gather(cache, pages[:, None, :], jnp.arange(K)[None, :, None], q.dtype)
        scores = jnp.einsum("skgd,skcd->skgc", queries, part.keys, preferred_element_type=jnp.float32)
        cached = i * chunk + jnp.arange(chunk)
        visible = _visible(position[:, None], cached[None, :], options.window)[:, None, None, :]
        return _accumulate(state, scores, visible, part, partial(jnp.einsum, "skgc,skcd->skgd"), options)

    first = jnp.where(kv_lens > 0, _first_visible(position, options.window), jnp.iinfo(jnp.int32).max)
    start = jnp.min(first) // chunk
    stop = (jnp.max(kv_lens) + chunk - 1) // chunk
    state = lax.fori_loop(start, stop, walk, _empty((S, K, H // K), D, options, K, H))
    out = _normalise(state).reshape(S, H, D)
    return jnp.where((kv_lens > 0)[:, None, None], out, 0).astype(q.dtype)[:rows]


def attend_prompts(q, out, cache, batch, options: Options):
    """Sequences num_seqs[0]..num_seqs[1]-1, a tile of up to Q_TILE query tokens of one sequence at a time."""
    T, H, D = q.shape
    tile = min(Q_TILE, T)
    q_lens = batch.cu_q_lens[1:] - batch.cu_q_lens[:-1]
    S = q_lens.shape[0]
    is_prompt = (jnp.arange(S) >= batch.num_seqs[0]) & (jnp.arange(S) < batch.num_seqs[1])
    tiles_through = jnp.cumsum(jnp.where(is_prompt, (q_lens + tile - 1) // tile, 0))
    q, out = (jnp.pad(x, ((0, tile), (0, 0), (0, 0))) for x in (q, out))
    block_tables, blocks_per_chunk = _whole_chunks(batch.block_tables, cache[0].shape[2])

    def attend(i, out):
        s = jnp.searchsorted(tiles_through, i, side="right")
        first = (i - jnp.where(s > 0, tiles_through[s - 1], 0)) * tile  # of the sequence's tokens in this step
        row = batch.cu_q_lens[s] + first
        position = batch.kv_lens[s] - q_lens[s] + first + jnp.arange(tile)
        used = jnp.minimum(batch.kv_lens[s], position[-1] + 1)
        result = _attend_tile(
            lax.dynamic_slice_in_dim(q, row, tile), position, used, block_tables[s], cache, blocks_per_chunk, options
        )
        mine = (first + jnp.arange(tile) < q_lens[s])[:, None, None]
        kept = lax.dynamic_slice_in_dim(out, row, tile)
        return lax.dynamic_update_slice_in_dim(out, jnp.where(mine, result, kept), row, axis=0)

    return lax.fori_loop(0, tiles_through[-1], attend, out)[:T]


def _attend_tile(q, position, used, block_table, cache, blocks_per_chunk, options: Options):
    """q [Q, H, D] at `position` [Q] of one sequence, over its first `used` cached tokens."""
    Q, H, D = q.shape
    K, N = cache[0].shape[1:3]
    chunk = blocks_per_chunk * N
    queries = q.reshape(Q, K, H // K, D).transpose(1, 2, 0, 3).reshape(K, H // K * Q, D)

    def walk(i, state):
        pages = lax.dynamic_slice_in_dim(block_table, i * blocks_per_chunk, blocks_per_chunk)
        part = Chunk.gather(cache, pages[None, :], jnp.arange(K)[:, None], q.dtype)
        scores = jnp.einsum("kqd,kcd->kqc", queries, part.keys, preferred_element_type=jnp.float32)
        cached = i * chunk + jnp.arange(chunk)
        visible = jnp.tile(_visible(position[:, None], cached[None, :], options.window), (H // K, 1))[None]
        return _accumulate(state, scores, visible, part, partial(jnp.einsum, "kqc,kcd->kqd"), options)

    start = _first_visible(position[0], options.window) // chunk
    stop = (used + chunk - 1) // chunk
    state = lax.fori_loop(start, stop, walk, _empty((K, H // K * Q), D, options, K, H))
    out = _normalise(state).reshape(K, H // K, Q, D).transpose(2, 0, 1, 3)
    return out.reshape(Q, H, D).astype(q.dtype)


def _rows(x, count):
    """The first `count` rows of x, padded with zeros where x has fewer."""
    return jnp.pad(x[:count], ((0, max(0, count - len(x))),) + ((0, 0),) * (x.ndim - 1))


def _whole_chunks(block_tables, block_size):
    """The tables padded to a whole number of chunks, and how many blocks make a chunk."""
    blocks_per_chunk = max(1, KV_CHUNK // block_size)
    missing = -block_tables.shape[-1] % blocks_per_chunk
    return jnp.pad(block_tables, ((0, 0), (0, missing))), blocks_per_chunk


def _visible(query_position, cached_position, window):
    seen = cached_position <= query_position
    return seen if window is None else seen & (cached_position > query_position - window)


def _first_visible(position, window):
    return jnp.zeros_like(position) if window is None else jnp.maximum(position - window + 1, 0)


def _empty(rows: tuple[int, ...], D: int, options: Options, K: int, H: int) -> Softmax:
    """Nothing accumulated; a sink is one more logit in the denominator with no value."""
    shape = (*rows, 1)
    weighted = jnp.zeros((*rows, D), jnp.float32)
    if options.sinks is None:
        return Softmax(jnp.full(shape, MASKED), jnp.zeros(shape), weighted)
    sinks = options.sinks.astype(jnp.float32).reshape(K, H // K)
    if len(rows) == 2:  # prompts: [K, G * Q]
        sinks = jnp.repeat(sinks, rows[1] // (H // K), axis=1)
    return Softmax(jnp.broadcast_to(sinks[..., None], shape), jnp.ones(shape), weighted)


def _accumulate(state: Softmax, scores, visible, part: Chunk, multiply, options: Options) -> Softmax:
    """One step of the online softmax; `multiply` sums values by weights."""
    scores = _scaled(scores, part.key_scales) * options.scale
    if options.soft_cap is not None:
        scores = options.soft_cap * jnp.tanh(scores / options.soft_cap)
    scores = jnp.where(visible, scores, MASKED)
    maximum = jnp.maximum(state.maximum, jnp.max(scores, axis=-1, keepdims=True))
    p = jnp.where(visible, jnp.exp(scores - maximum), 0.0)
    decay = jnp.exp(state.maximum - maximum)
    denominator = state.denominator * decay + jnp.sum(p, axis=-1, keepdims=True)
    weights = _scaled(p, part.value_scales).astype(part.values.dtype)
    weighted = multiply(weights, part.values, preferred_element_type=jnp.float32)
    return Softmax(maximum, denominator, state.weighted * decay + weighted)


def _normalise(state: Softmax):
    return state.weighted / jnp.where(state.denominator > 0, state.denominator, 1.0)
