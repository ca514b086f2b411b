"""Decode attention: one query token for each sequence over its paged keys and values.

Decode is bound by memory, so everything here serves one end: keep copies of pages in flight on every SM. A sequence
is cut into splits (flash decoding), sized by its own length alone, so that its result never depends on the rest of
the batch. The grid is persistent: each worker takes (sequence, key/value head, split) items off a list; its memory
warpgroup copies pages into a ring of tiles, running ahead from one item into the next, and its compute warpgroup
multiplies. The G query heads that share a key/value head are the first rows of wgmma's 64; the other rows are computed
for nothing and never stored.

In large batches a worker has a run of items, by their tiles as long as any other's of its wave of CTAs. If it has a
sequence's first split, it merges those that follow as it goes, and writes the result if it has all of them; a second
kernel merges the rest. Which splits are merged where does not change a bit: they are added in one order, and their
maxima are rounded to whole numbers, so that what aligns them is a power of two, an exact factor.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax

from kernels_pallas.gpu.merge import Sinks, Unfinished, merge_splits, reciprocal, stored_rows
from kernels_pallas.gpu.rows import (
    LOG2E,
    PARAMS,
    ROWS,
    TILED,
    block_at,
    load_column,
    load_rows,
    num_sms,
    store_column,
    store_rows,
    tiles_of_8,
)

TILE = 64  # cached tokens multiplied at a time
FIELDS = 8  # columns of the list of work, see list_work


@dataclass(frozen=True)
class DecodeConfig:
    """How the work is cut and laid out on the machine.

    Attributes:
      min_split: a sequence is cut into splits of at least this many tokens ...
      max_splits: ... and into at most this many of them.
      workers: pairs of a compute and a memory warpgroup in one CTA, one CTA to an SM.
      stages: tiles of keys, and of values, in flight for each worker.
      waves: where workers have runs of items, how these are in length, those of as many CTAs as there are SMs each. The
        fastest SM is done in 70% of the slowest's time, and the hardware gives it the next CTA.
    """

    min_split: int
    max_splits: int
    workers: int
    stages: int
    waves: tuple[int, ...] = (22, 2, 1)

    @classmethod
    def of(cls, head_dim: int) -> "DecodeConfig":
        """Fills the 227 KB of an H100's shared memory: a worker needs ROWS queries and its stages."""
        workers, stages = {64: (2, 6), 128: (2, 3), 256: (1, 3)}[head_dim]
        return cls(min_split=256, max_splits=32, workers=workers, stages=stages)


class Cuts(NamedTuple):
    """How sequences are cut, int32[S] each: first visible token, tokens from there, tokens of a split (but the last),
    and splits; and `most`, the most splits that a sequence can have."""

    start: jax.Array
    tokens: jax.Array
    size: jax.Array
    splits: jax.Array
    most: int

    @classmethod
    def of(cls, kv_lens, block_table_tokens: int, window: int | None, config: DecodeConfig) -> "Cuts":
        start = jnp.maximum(kv_lens - (window or block_table_tokens), 0) // TILE * TILE
        tokens = kv_lens - start
        size = jnp.maximum(pl.cdiv(pl.cdiv(tokens, config.max_splits), TILE) * TILE, config.min_split)
        visible = block_table_tokens if window is None else min(block_table_tokens, window + TILE)
        most = min(config.max_splits, pl.cdiv(visible, config.min_split))
        return cls(start, tokens, size, pl.cdiv(tokens, size).astype(jnp.int32), most)


def list_work(cuts: Cuts, kv_lens):
    """The items of work, before the split over key/value heads.

    Returns int32[W, FIELDS], the sequence, the first token, the last + 1, kv_len, split, then the row of the sequence's
    first split, how many it has, and the tokens of each but the last; and int32[1], how many rows are real. They depend
    on nothing but lengths, so that one list serves all layers that have the same window.
    """
    S = kv_lens.shape[0]
    before = _before(cuts.splits)
    j = jnp.arange(cuts.most)[None, :]
    first = cuts.start[:, None] + j * cuts.size[:, None]
    stop = jnp.minimum(first + cuts.size[:, None], kv_lens[:, None])
    of_seq = [column[:, None] for column in (before, cuts.splits, cuts.size)]
    columns = [jnp.arange(S)[:, None], first, stop, kv_lens[:, None], j, *of_seq]
    rows = jnp.stack([jnp.broadcast_to(c, (S, cuts.most)) for c in columns], axis=-1).astype(jnp.int32)
    place = jnp.where(j < cuts.splits[:, None], before[:, None] + j, S * cuts.most)
    work = jnp.zeros((S * cuts.most, FIELDS), jnp.int32)
    work = work.at[place].set(rows, mode="drop", unique_indices=True)
    return work, jnp.sum(cuts.splits).astype(jnp.int32)[None]


def _before(counts):
    """int32[S]: the sum of those before each."""
    S = counts.shape[0]
    return jnp.sum(jnp.where(jnp.arange(S)[:, None] > jnp.arange(S)[None, :], counts[None, :], 0), axis=1)


def share_work(cuts: Cuts, K: int, weights):
    """int32[workers + 1]: worker w has the items from number w of these up to number w + 1. Items are ordered by
    sequence, head and split; an item is of the worker in whose share of all tiles, by the workers' weights, its middle
    lies."""
    S = cuts.splits.shape[0]
    tiles, size = pl.cdiv(cuts.tokens, TILE), cuts.size // TILE
    before, splits_before = _before(tiles) * K, _before(cuts.splits) * K
    total, weight = jnp.sum(tiles) * K, np.cumsum([0, *weights])
    share = total // weight[-1] * weight + total % weight[-1] * weight // weight[-1]
    seq = jnp.sum((before + tiles * K)[None, :] <= share[:, None], axis=1)
    tiles, size, splits, before, splits_before = (
        x.at[seq].get(mode="fill", fill_value=fill)
        for x, fill in ((tiles, 1), (size, 1), (cuts.splits, 0), (before, 0), (splits_before, 0))
    )
    head, place = (share - before) // tiles, (share - before) % tiles
    whole = jnp.clip(pl.cdiv(2 * place - size, 2 * size), 0, splits - 1)  # splits whose middle comes before `place`
    last = 2 * (splits - 1) * size + tiles - (splits - 1) * size
    behind = jnp.where((whole == splits - 1) & (last < 2 * place), splits, whole)
    found = splits_before + head * splits + behind
    return jnp.where(seq < S, found, jnp.sum(cuts.splits) * K).astype(jnp.int32)


@partial(jax.jit, static_argnames=("scale", "window", "soft_cap", "config"))
def decode_attention(
    q, keys, values, kv_lens, block_tables, sinks=None, *, scale, window=None, soft_cap=None, config=None
):
    """Attends with one query token a sequence, the last of its kv_lens tokens.

    Args:
      q: [S, H, D], of the cache's dtype (bfloat16 or float16); D is 64, 128 or 256.
      keys, values: [B, K, N, D] with N a power of two of at least 8; H / K is at most 16.
      kv_lens: int32[S]; 0 gives zeros.
      block_tables: int32[S, P].
      sinks: float32[H] or None.
      scale, window, soft_cap: see kernels_pallas.attention.

    Returns:
      [S, H, D] in q's dtype.
    """
    S, H, D = q.shape
    K, N = keys.shape[1:3]
    G = H // K
    config = config or DecodeConfig.of(D)
    cuts = Cuts.of(kv_lens, block_tables.shape[1] * N, window, config)
    work, count = list_work(cuts, kv_lens)
    # With fewer, few workers have several splits of a sequence, and merging costs more than it saves.
    in_runs = 3 * config.workers * num_sms() < 2 * S * K
    waves = config.waves if in_runs else (1,)
    ctas = len(waves) * num_sms()
    lengths = np.tile(np.repeat(waves, num_sms()), config.workers)
    shares = share_work(cuts, K, lengths) if in_runs else count
    stored = stored_rows(G, D)
    sinks = None if sinks is None else Sinks.of(sinks)
    ring = plgpu.SMEM((config.workers, config.stages, TILE, D), q.dtype, transforms=TILED)
    slots = config.workers * config.stages
    full = plgpu.Barrier(num_arrivals=max(1, TILE // N), num_barriers=slots)
    free = plgpu.Barrier(num_barriers=slots)
    logits = partial(logits_of, scale=scale, window=window, soft_cap=soft_cap)
    merged = (
        jax.ShapeDtypeStruct((S, K, stored * D), q.dtype),
        jax.ShapeDtypeStruct((len(lengths), len(Unfinished._fields)), jnp.int32),
    )
    found, *complete = plgpu.kernel(
        partial(_attend, G=G, config=config, logits=logits),
        out_type=(
            (
                jax.ShapeDtypeStruct((S, K, cuts.most, stored * D), jnp.float32),
                *[jax.ShapeDtypeStruct((S, K, cuts.most, stored), jnp.float32)] * 2,
            ),
            *(merged if in_runs else ()),
        ),
        grid=(ctas,),
        grid_names=("cta",),
        num_threads=2 * config.workers,
        thread_name="warpgroup",
        kernel_name="decode_attention",
        scratch_types=[
            plgpu.SMEM((config.workers, ROWS, D), q.dtype, transforms=TILED),
            *(ring, ring),
            plgpu.Barrier(num_barriers=config.workers),
            *(full, full, free, free),
        ],
        compiler_params=PARAMS,
    )(work, shares, q if 16 % G else tiles_of_8(q.reshape(S * H, D)), keys, values, block_tables, sinks or ())
    out = merge_splits(found, cuts.splits, sinks, G, q.dtype, complete)
    return out.reshape(S, K, stored, D)[:, :, :G].reshape(S, H, D)


def _attend(work, shares, q, keys, values, tables, sinks, parts, *refs, G, config, logits):
    *merged, q_smem, k_smem, v_smem, q_ready, k_ready, v_ready, k_free, v_free = refs
    _, K, N, D = keys.shape
    warpgroup = lax.axis_index("warpgroup")
    me = lax.rem(warpgroup, jnp.int32(config.workers))
    worker = me * lax.axis_size("cta") + lax.axis_index("cta")
    if merged:  # a run of items by sequence, head and split
        begin, end, stride = shares[worker], shares[worker + 1], jnp.int32(1)
    else:  # every so many of them by sequence, split and head
        begin, end, stride = worker, shares[0] * K, jnp.int32(config.workers * lax.axis_size("cta"))
    items = lax.div(end - begin + stride - 1, stride)
    stages = jnp.int32(config.stages)
    base = me * stages

    def read(n):
        """Of this worker's item n: sequence, head, split, splits, first token, last + 1, and kv_len."""
        i = begin + n * stride
        row = lax.div(i, jnp.int32(K))
        seq, first, stop, length, split, before, splits, size = (work[row, f] for f in range(FIELDS))
        if not merged:
            return seq, lax.rem(i, jnp.int32(K)), split, splits, first, stop, length
        i -= before * K
        h, nth = lax.div(i, splits), lax.rem(i, splits)
        first += (nth - split) * size
        return seq, h, nth, splits, first, jnp.minimum(first + size, length), length

    @pl.when(warpgroup < config.workers)
    def compute():
        if config.workers > 1:
            plgpu.set_max_registers(208, action="increase")

        if merged:
            merged[1][worker, 0] = jnp.int32(-1)

        def item(n, carry):
            step, before = carry
            seq, h, split, splits, first, stop, length = read(n)

            @pl.when((n == 0) | (split == 0) | (not merged))
            def fetch_queries():
                if len(q.shape) == 2:  # the queries' rows lie within one tile of 8 and the copy engine can have them
                    fetched = max(G, 8)  # those past G are other heads' or zeros
                    row = seq * (K * G) + h * G
                    rows = q.at[pl.ds(row, fetched)]
                    plgpu.copy_gmem_to_smem(rows, q_smem.at[me, pl.ds(0, fetched)], q_ready.at[me])
                    plgpu.barrier_wait(q_ready.at[me])
                else:
                    q_smem[me] = load_rows(q.at[seq, pl.ds(h * G, G)], G)
                    plgpu.commit_smem()

            tiles = lax.div(stop - first + TILE - 1, jnp.int32(TILE))

            def tile(t, carry):
                acc, m, total = carry
                slot = lax.rem(step + t, stages)
                plgpu.barrier_wait(k_ready.at[base + slot])

                def multiply(scores):
                    plgpu.wgmma(scores, q_smem.at[me], k_smem.at[me, slot].transpose((1, 0)))
                    return scores[...]

                scores = pl.run_scoped(multiply, plgpu.ACC((ROWS, TILE), jnp.float32))
                plgpu.barrier_arrive(k_free.at[base + slot])
                scores = logits(scores, first + t * TILE, stop, length)
                m_new = jnp.maximum(m, whole(scores.max(axis=1)))
                decay = jnp.exp2(m - m_new)
                p = jnp.exp2(scores - lax.broadcast_in_dim(m_new, scores.shape, [0]))
                total = total * decay + p.sum(axis=1)
                acc = acc * lax.broadcast_in_dim(decay, acc.shape, [0])
                plgpu.barrier_wait(v_ready.at[base + slot])
                weigh = lambda ref: plgpu.wgmma(ref, p.astype(v_smem.dtype), v_smem.at[me, slot])  # noqa: E731
                acc = pl.run_state(weigh)(plgpu.ACC.init(acc))
                plgpu.barrier_arrive(v_free.at[base + slot])
                return acc, m_new, total

            found = lax.fori_loop(0, tiles, tile, _empty(D))
            now, stored, slot = found, True, split
            if merged:
                out, unfinished = merged
                from_first = n >= split  # the splits before this one are ours too
                both = _merge(before, found)
                now = [jnp.where(from_first & (split > 0), a, b) for a, b in zip(both, found, strict=True)]
                complete = from_first & (split + 1 == splits)
                stored = ~from_first | ((n + 1 == items) & ~complete)
                slot = jnp.where(from_first, 0, split)

                @pl.when(complete)
                def finish():
                    store_rows(out.at[seq, h], _divided(now, sinks, h * G, G).astype(out.dtype), G)

                @pl.when(from_first & stored)
                def tell():
                    for i, value in enumerate(Unfinished(seq, h, splits, split + 1)):
                        unfinished[worker, i] = value

            @pl.when(stored)
            def store():
                store_rows(parts[0].at[seq, h, slot], now[0], G)
                for ref, value in zip(parts[1:], now[1:], strict=True):
                    store_column(ref.at[seq, h, slot], value, G)

            return step + tiles, now if merged else before

        lax.fori_loop(0, items, item, (jnp.int32(0), list(_empty(D)) if merged else []))

    @pl.when(warpgroup >= config.workers)
    def copy():
        if config.workers > 1:
            plgpu.set_max_registers(40, action="decrease")

        def item(n, step):
            seq, h, _, _, first, stop, _ = read(n)
            tiles = lax.div(stop - first + TILE - 1, jnp.int32(TILE))

            def tile(t, _):
                slot = lax.rem(step + t, stages)
                token = first + t * TILE
                slabs = [
                    (block_at(tables, seq, token, N, p), h, *_rows_of_page(token, N)) for p in range(max(1, TILE // N))
                ]
                for smem, gmem, ready, free in ((k_smem, keys, k_ready, k_free), (v_smem, values, v_ready, v_free)):
                    pl.when(step + t >= stages)(partial(plgpu.barrier_wait, free.at[base + slot]))
                    for p, slab in enumerate(slabs):
                        rows = pl.ds(p * min(N, TILE), min(N, TILE))
                        plgpu.copy_gmem_to_smem(gmem.at[slab], smem.at[me, slot, rows], ready.at[base + slot])

            lax.fori_loop(0, tiles, tile, None)
            return step + tiles

        lax.fori_loop(0, items, item, jnp.int32(0))


def _rows_of_page(token, N):
    """A tile may be part of a page."""
    return () if N <= TILE else (pl.ds(lax.rem(token, jnp.int32(N)), TILE),)


def logits_of(scores, token, stop, length, *, scale, window, soft_cap, axis=1):
    """Logits in base 2 of a tile of cached tokens from `token` on, along `axis`, -inf where hidden."""
    if soft_cap is None:
        scores = scores * (scale * LOG2E)
    else:
        tanh = 1 - 2 / (jnp.exp2(scores * (2 * LOG2E * scale / soft_cap)) + 1)
        scores = tanh * (soft_cap * LOG2E)
    position = token + plgpu.broadcasted_iota(jnp.int32, scores.shape, axis, layout=plgpu.Layout.WGMMA)
    visible = position < stop
    if window is not None:
        visible &= position >= length - window
    return jnp.where(visible, scores, -jnp.inf)


def whole(x):
    """To the nearest whole number, where it is below 2^22."""
    return (x + 1.5 * 2.0**23) - 1.5 * 2.0**23


def _merge(a, b):
    """Two splits' sums of values, maxima and denominators, as one's."""
    m = jnp.maximum(a[1], b[1])
    weights = [jnp.exp2(x[1] - m) for x in (a, b)]
    scaled = [x[0] * lax.broadcast_in_dim(w, x[0].shape, [0]) for x, w in zip((a, b), weights, strict=True)]
    return scaled[0] + scaled[1], m, a[2] * weights[0] + b[2] * weights[1]


def _divided(found, sinks, first, G):
    """The attention of heads `first` to first + G - 1 from their sums."""
    acc, m, total = found
    if sinks:
        sink_m, sink_total = (load_column(x.at[pl.ds(first, G)], G) for x in sinks)
        m_new = jnp.maximum(m, sink_m)
        decay = jnp.exp2(m - m_new)
        acc, total = acc * lax.broadcast_in_dim(decay, acc.shape, [0]), total * decay
        total = total + jnp.exp2(sink_m - m_new) * sink_total
    return acc * lax.broadcast_in_dim(reciprocal(total), acc.shape, [0])


def _empty(D):
    column = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), plgpu.Layout.WGMMA.reduce(1))
    acc = plgpu.layout_cast(jnp.zeros((ROWS, D), jnp.float32), plgpu.Layout.WGMMA)
    return acc, column - jnp.inf, column
