"""The attention kernel: flash attention (arXiv 2205.14135) of ragged queries over a paged cache.

Queries are cut into tiles, one a grid step; what of one sequence lies in one tile is a *piece*. A piece walks over its
sequence's cached tokens in chunks. Two cursors go through pieces and chunks in the same order: the fetching one starts
the copies of a chunk's pages, STAGES - 1 chunks ahead of the computing one and across pieces, tiles and sequences, so
that HBM is never idle between them (as in arXiv 2604.15464).
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.tpu.layout import LANES, STAGES, Blocks, keep_in_hbm, vmem_limit

MASKED = -1e30  # finite, so that a fully masked row yields no NaN

# The cursors, in scalar memory.
TILE, SEQ, CHUNK, FETCHED, COMPUTED, COMPUTED_SEQ = range(6)


class Batch(NamedTuple):
    """Scalar memory: the sequences first..end-1 are attended to; token t of cu_q_lens is row t of the queries."""

    seqs: jax.Array  # int32[2]: first, end
    kv_lens: jax.Array  # int32[S]
    block_tables: jax.Array  # int32[S * P]
    cu_q_lens: jax.Array  # int32[S + 1]


class Options(NamedTuple):
    scale: float
    window: int | None
    soft_cap: float | None
    value_start: int  # lane of a cache row where what is summed starts


@partial(jax.jit, static_argnames=("options", "blocks"))
def attend(
    batch: Batch,
    q: jax.Array,
    cache: tuple[jax.Array, ...],
    sinks: jax.Array | None,
    *,
    options: Options,
    blocks: Blocks,
) -> jax.Array:
    """Attention of the sequences in `batch.seqs`; other rows are zeros.

    Args:
      q: for decodes [T, K, G, W], token s being sequence s's only one; else [K, G, T, W].
      cache: pages [B, K, N, L], with the step's keys and values in them; scales float32[B, K, 2, N] of eight-bit ones.
      sinks: float32[K, G] or None.

    Returns:
      What q is shaped like: sums over the rows' lanes from options.value_start on.
    """
    K, G = q.shape[1:3] if blocks.decode else q.shape[:2]
    T, W = q.shape[0 if blocks.decode else 2], q.shape[3]
    _, _, N, L = cache[0].shape
    tile_shape, tile_index = (blocks.tile, K, G, W), lambda i, *_: (i, 0, 0, 0)
    rows: tuple[int, ...] = (G,)
    if not blocks.decode:
        tile_shape, tile_index = (K, G, blocks.tile, W), lambda i, *_: (0, 0, i, 0)
        rows = (G, blocks.tile)
    tiles = pl.BlockSpec(tile_shape, tile_index)
    operands: list[jax.Array] = [q, *map(keep_in_hbm, cache)]
    in_specs = [tiles, *[pl.BlockSpec(memory_space=pl.ANY)] * len(cache)]
    if sinks is not None:  # a lane-wide column for each head group, beside the rows it starts
        column = sinks.astype(jnp.float32).reshape(K, G, *(1,) * len(rows))
        column = jnp.broadcast_to(column, (*column.shape[:-1], LANES))
        operands.append(column)
        in_specs.append(pl.BlockSpec(column.shape, lambda i, *_: (0,) * column.ndim))
    pages = blocks.chunk // N
    return pl.pallas_call(
        partial(_kernel, options=options, blocks=blocks, num_caches=len(cache), has_sinks=sinks is not None),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(batch),
            grid=(pl.cdiv(T, blocks.tile),),
            in_specs=in_specs,
            out_specs=tiles,
            scratch_shapes=[
                *(pltpu.VMEM((STAGES, pages, *x.shape[1:]), x.dtype) for x in cache),
                pltpu.VMEM((K, *rows, LANES), jnp.float32),
                pltpu.VMEM((K, *rows, LANES), jnp.float32),
                pltpu.VMEM((K, *rows, W), jnp.float32),
                pltpu.SMEM((6,), jnp.int32),
                pltpu.SemaphoreType.DMA((STAGES,)),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",),
            vmem_limit_bytes=vmem_limit(),
            disable_bounds_checks=True,  # half the instructions that start a copy; the interpreter's tests check bounds
        ),
        cost_estimate=cost(batch, q, cache, options.window, blocks),
        name="attend_decodes" if blocks.decode else "attend_prompts",
    )(*batch, *operands)


def cost(
    batch: Batch, q: jax.Array, cache: tuple[jax.Array, ...], window: int | None, blocks: Blocks
) -> pl.CostEstimate:
    """What a step over full block tables costs; how long the sequences really are is known at run time alone."""
    B, _, N, _ = cache[0].shape
    S = batch.kv_lens.shape[0]
    H, W = q.size // q.shape[-1] // (T := q.shape[0 if blocks.decode else 2]), q.shape[-1]
    context = min(batch.block_tables.shape[0] // S, B) * N
    seen = context if window is None else min(window, context)
    cached = min(S * seen, B * N)
    pairs = H * (min(T, S) if blocks.decode else T) * seen
    return pl.CostEstimate(
        flops=4 * pairs * W,
        transcendentals=pairs,
        bytes_accessed=2 * q.size * q.dtype.itemsize + cached * sum(x.nbytes // (B * N) for x in cache),
    )


def _kernel(seqs_ref, kv_lens_ref, tables_ref, cu_ref, q_ref, *refs, options, blocks, num_caches, has_sinks):
    cache_refs, refs = refs[:num_caches], refs[num_caches:]
    sinks_ref, refs = (refs[0], refs[1:]) if has_sinks else (None, refs)
    out_ref, (kv_ref, *scales_ref), refs = refs[0], refs[1 : 1 + num_caches], refs[1 + num_caches :]
    buffers = (kv_ref, *scales_ref)
    max_ref, sum_ref, acc_ref, cursor, sems = refs
    window, Q, C, decode = options.window, blocks.tile, blocks.chunk, blocks.decode
    _, pages, K, N, L = kv_ref.shape
    blocks_per_seq = tables_ref.shape[0] // kv_lens_ref.shape[0]
    first_seq, end_seq = seqs_ref[0], seqs_ref[1]
    this_tile = pl.program_id(0)

    def piece(tile, seq):
        """The rows first..end-1 of the piece, and what is added to a row to get its position."""
        first = jnp.maximum(cu_ref[seq], tile * Q)
        end = jnp.minimum(cu_ref[seq + 1], (tile + 1) * Q)
        return first, end, kv_lens_ref[seq] - cu_ref[seq + 1]

    def visible_span(tile, seq):
        """Cached tokens start..end-1 are seen by some row of the piece."""
        first, end, shift = piece(tile, seq)
        start = 0 if window is None else jnp.maximum(first + shift - window + 1, 0)
        return start, end + shift

    def pages_of(tile, seq, chunk):
        start, end = visible_span(tile, seq)
        return jnp.maximum(start // N, chunk * pages), jnp.minimum((end + N - 1) // N, (chunk + 1) * pages)

    def start_copies(tile, seq, chunk, stage):
        @pl.loop(*pages_of(tile, seq, chunk))
        def _(page):
            block = tables_ref[seq * blocks_per_seq + page]
            for cache_ref, buffer in zip(cache_refs, buffers, strict=True):
                place = buffer.at[stage, page - chunk * pages]
                pltpu.make_async_copy(cache_ref.at[block], place, sems.at[stage]).start()

    def wait_for_copies(tile, seq, chunk, stage):
        """A semaphore counts bytes: one wait is enough for a chunk whose pages were all copied."""
        first_page, end_page = pages_of(tile, seq, chunk)
        is_whole = end_page - first_page == pages

        @pl.when(is_whole)
        def _():
            for buffer in buffers:
                pltpu.make_async_copy(buffer.at[stage], buffer.at[stage], sems.at[stage]).wait()

        @pl.loop(0, jnp.where(is_whole, 0, end_page - first_page))
        def _(_):
            for buffer in buffers:
                pltpu.make_async_copy(buffer.at[stage, 0], buffer.at[stage, 0], sems.at[stage]).wait()

    def fetch_next():
        """Starts the copies of the chunk under the fetching cursor, and moves it on."""
        tile, seq, chunk = cursor[TILE], cursor[SEQ], cursor[CHUNK]

        @pl.when(seq < end_seq)
        def _():
            start_copies(tile, seq, chunk, cursor[FETCHED] % STAGES)
            cursor[FETCHED] += 1
            _, end = visible_span(tile, seq)
            tile_end = (tile + 1) * Q
            is_last = (chunk + 1) * C >= end
            next_tile = jnp.where(is_last & (cu_ref[seq + 1] >= tile_end), tile + 1, tile)
            next_seq = jnp.where(is_last & (cu_ref[seq + 1] <= tile_end), seq + 1, seq)
            first_chunk = visible_span(next_tile, jnp.minimum(next_seq, end_seq - 1))[0] // C
            cursor[TILE], cursor[SEQ] = next_tile, next_seq
            cursor[CHUNK] = jnp.where(is_last, first_chunk, chunk + 1)

    first_tile = cu_ref[first_seq] // Q
    has_rows = (first_seq < end_seq) & (this_tile >= first_tile) & (this_tile * Q < cu_ref[end_seq])

    @pl.when(has_rows & (this_tile == first_tile))
    def _():
        cursor[TILE], cursor[SEQ] = first_tile, first_seq
        cursor[CHUNK] = visible_span(first_tile, first_seq)[0] // C
        cursor[FETCHED] = cursor[COMPUTED] = 0
        cursor[COMPUTED_SEQ] = first_seq
        for _ in range(STAGES - 1):
            fetch_next()

    def reset():
        for h in range(K):
            acc_ref[h] = jnp.zeros(acc_ref.shape[1:], jnp.float32)
            if sinks_ref is None:
                max_ref[h] = jnp.full(max_ref.shape[1:], MASKED, jnp.float32)
                sum_ref[h] = jnp.zeros(sum_ref.shape[1:], jnp.float32)
            else:
                max_ref[h] = jnp.broadcast_to(sinks_ref[h], max_ref.shape[1:])
                sum_ref[h] = jnp.ones(sum_ref.shape[1:], jnp.float32)

    def result(h):
        total = sum_ref[h]
        total = jnp.where(total > 0, total, 1.0)
        return (acc_ref[h] / _across(total, acc_ref.shape[-1])).astype(out_ref.dtype)

    def compute(seq, chunk, stage):
        start, end = visible_span(this_tile, seq)
        first, last_end, shift = piece(this_tile, seq)
        row_count = max_ref.shape[1] * (1 if decode else Q)
        cached = chunk * C + lax.broadcasted_iota(jnp.int32, (row_count, C), 1)
        if decode:
            position = first + shift
            visible = cached <= position
        else:
            row = this_tile * Q + lax.broadcasted_iota(jnp.int32, (row_count, C), 0) % Q
            position = row + shift
            visible = (cached <= position) & (row >= first) & (row < last_end)
        if window is not None:
            visible &= cached > position - window
        width = acc_ref.shape[-1]
        token = chunk * C + lax.broadcasted_iota(jnp.int32, (C, width), 0)
        fetched = (token >= start // N * N) & (token < end)
        W = q_ref.shape[-1]

        def rows_of(h, lanes):
            """[C, lanes], in the type that is multiplied."""
            rows = kv_ref[stage, :, h, :, lanes].reshape(C, -1)
            return rows.astype(q_ref.dtype) if scales_ref else rows

        def scales_of(h, i):
            """float32[1, C] of keys (0) or values (1); None: all are 1."""
            if not scales_ref:
                return None
            return jnp.concatenate([scales_ref[0][stage, page, h, pl.ds(i, 1)] for page in range(pages)], axis=1)

        def scores_of(h):
            q = q_ref[seq - this_tile * Q, h] if decode else q_ref[h].reshape(row_count, W)
            k = rows_of(h, pl.ds(0, W))
            return _scores(q.astype(k.dtype), k, scales_of(h, 0), options)

        def accumulate(h, scores):
            v = rows_of(h, pl.ds(options.value_start, width))
            v = jnp.where(fetched, v, jnp.zeros_like(v))  # the rest of the buffer is whatever was there before
            _accumulate(scores, v, scales_of(h, 1), visible, max_ref.at[h], sum_ref.at[h], acc_ref.at[h])

        together = blocks.heads_at_once(K)
        for first_head in range(0, K, together):
            heads = range(first_head, first_head + together)
            for h, scores in zip(heads, [scores_of(h) for h in heads], strict=True):
                accumulate(h, scores)

    def attend_piece(seq):
        if decode:
            reset()
        start, end = visible_span(this_tile, seq)

        @pl.loop(start // C, (end + C - 1) // C)
        def _(chunk):
            stage = cursor[COMPUTED] % STAGES
            wait_for_copies(this_tile, seq, chunk, stage)
            fetch_next()  # into the stage that the chunk before this one has left
            compute(seq, chunk, stage)
            cursor[COMPUTED] += 1

        if decode:
            for h in range(K):
                out_ref[seq - this_tile * Q, h] = result(h)

    out_ref[...] = jnp.zeros(out_ref.shape, out_ref.dtype)

    @pl.when(has_rows)
    def _():
        if not decode:
            reset()
        tile_end = (this_tile + 1) * Q

        def go_on(seq):
            attend_piece(seq)
            return seq + 1

        begin = cursor[COMPUTED_SEQ]
        after = lax.while_loop(
            lambda seq: (seq < end_seq) & (cu_ref[jnp.minimum(seq, end_seq)] < tile_end), go_on, begin
        )
        cursor[COMPUTED_SEQ] = jnp.where(cu_ref[after] > tile_end, after - 1, after)
        if not decode:
            for h in range(K):
                out_ref[h] = result(h)


def _scores(q, k, scales, options: Options) -> jax.Array:
    """q [R, W], k [C, W], scales [1, C] or None -> float32[R, C]."""
    scores = _dot(q, k, contract=(1, 1)) * (options.scale if scales is None else scales * options.scale)
    if options.soft_cap is not None:
        scores = options.soft_cap * jnp.tanh(scores / options.soft_cap)
    return scores


def _accumulate(scores, v, scales, visible, max_ref, sum_ref, acc_ref) -> None:
    """One head's online softmax (arXiv 1805.02867) over one chunk. scores [R, C], v [C, W], scales [1, C] or None."""
    scores = jnp.where(visible, scores, MASKED)
    rows, C = scores.shape
    old = max_ref[...].reshape(rows, LANES)
    new = jnp.maximum(old, jnp.max(scores, axis=1, keepdims=True))
    p = jnp.where(visible, jnp.exp(scores - _across(new, C)), 0.0)
    decay = jnp.exp(old - new)
    total = sum_ref[...].reshape(rows, LANES) * decay + jnp.sum(p, axis=1, keepdims=True)
    if scales is not None:
        p = jnp.where(visible, p * scales, 0.0)  # scales that were not fetched may be anything
    weighted = _dot(p.astype(v.dtype), v, contract=(1, 0))
    acc = acc_ref[...].reshape(weighted.shape) * _across(decay, weighted.shape[1]) + weighted
    max_ref[...] = new.reshape(max_ref.shape)
    sum_ref[...] = total.reshape(sum_ref.shape)
    acc_ref[...] = acc.reshape(acc_ref.shape)


def _dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Accumulated in float32; float32 operands are rounded nowhere."""
    precision = lax.Precision.HIGHEST if b.dtype == jnp.float32 else None
    dimensions = ((contract[:1], contract[1:]), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _across(column: jax.Array, width: int) -> jax.Array:
    """[..., LANES], equal in all lanes, to [..., width]: the registers are used again, nothing moves."""
    return jnp.concatenate([column] * (width // LANES), axis=-1)
