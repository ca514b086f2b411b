"""Decode attention: one query token for each sequence over its paged keys and values.

Decode is bound by memory, so everything here serves one end: keep copies of pages in flight on every SM. A sequence
is cut into splits (flash decoding), sized by its own length alone, so that its result never depends on the rest of
the batch. The grid is persistent: each CTA takes (sequence, split, key/value head) items off a list, its memory
warpgroup copies pages into a ring of tiles, running ahead from one item into the next, and its compute warpgroup
multiplies. The G query heads that share a key/value head are the first rows of wgmma's 64; the other rows are
computed for nothing and never stored. A second kernel merges the splits.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from kernels_pallas.gpu.merge import merge_splits, stored_rows
from kernels_pallas.gpu.rows import LOG2E, PARAMS, ROWS, TILED, load_rows, num_sms, store_column, store_rows, tiles_of_8

TILE = 64  # cached tokens multiplied at a time
FIELDS = 8  # columns of the list of work: sequence, first token, last token + 1, kv_len, split, and padding


@dataclass(frozen=True)
class DecodeConfig:
    """How the work is cut and laid out on the machine.

    Attributes:
      min_split: a sequence is cut into splits of at least this many tokens ...
      max_splits: ... and into at most this many of them.
      workers: pairs of a compute and a memory warpgroup in one CTA, one CTA to an SM.
      stages: tiles of keys, and of values, in flight for each worker.
    """

    min_split: int
    max_splits: int
    workers: int
    stages: int

    @classmethod
    def of(cls, head_dim: int) -> "DecodeConfig":
        """Fills the 227 KB of an H100's shared memory: a worker needs ROWS queries and its stages."""
        workers, stages = {64: (2, 6), 128: (2, 3), 256: (1, 3)}[head_dim]
        return cls(min_split=256, max_splits=32, workers=workers, stages=stages)


def list_work(kv_lens, block_table_tokens: int, window: int | None, config: DecodeConfig):
    """The items of work, before the split over key/value heads.

    Returns int32[W, FIELDS], int32[1], how many of them are real, and int32[S], how many are of each sequence. They
    depend on nothing but lengths, so that one list serves all layers that have the same window.
    """
    S = kv_lens.shape[0]
    visible = block_table_tokens if window is None else min(block_table_tokens, window + TILE)
    max_splits = min(config.max_splits, pl.cdiv(visible, config.min_split))
    start = jnp.maximum(kv_lens - (window or block_table_tokens), 0) // TILE * TILE
    tokens = kv_lens - start
    split = jnp.maximum(pl.cdiv(pl.cdiv(tokens, config.max_splits), TILE) * TILE, config.min_split)
    splits = pl.cdiv(tokens, split)
    before = jnp.sum(jnp.where(jnp.arange(S)[:, None] > jnp.arange(S)[None, :], splits[None, :], 0), axis=1)
    j = jnp.arange(max_splits)[None, :]
    first = start[:, None] + j * split[:, None]
    stop = jnp.minimum(first + split[:, None], kv_lens[:, None])
    columns = [jnp.arange(S)[:, None], first, stop, kv_lens[:, None], j, 0, 0, 0]
    rows = jnp.stack([jnp.broadcast_to(c, (S, max_splits)) for c in columns], axis=-1).astype(jnp.int32)
    place = jnp.where(j < splits[:, None], before[:, None] + j, S * max_splits)
    work = jnp.zeros((S * max_splits, FIELDS), jnp.int32)
    work = work.at[place].set(rows, mode="drop", unique_indices=True)
    return work, jnp.sum(splits).astype(jnp.int32)[None], splits.astype(jnp.int32)


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
    work, count, splits = list_work(kv_lens, block_tables.shape[1] * N, window, config)
    max_splits = work.shape[0] // S
    stored = stored_rows(G, D)
    ring = plgpu.SMEM((config.workers, config.stages, TILE, D), q.dtype, transforms=TILED)
    slots = config.workers * config.stages
    full = plgpu.Barrier(num_arrivals=max(1, TILE // N), num_barriers=slots)
    free = plgpu.Barrier(num_barriers=slots)
    parts, maxima, totals = plgpu.kernel(
        partial(_attend, G=G, config=config, logits=partial(logits_of, scale=scale, window=window, soft_cap=soft_cap)),
        out_type=(
            jax.ShapeDtypeStruct((S, K, max_splits, stored * D), jnp.float32),
            *[jax.ShapeDtypeStruct((S, K, max_splits, stored), jnp.float32)] * 2,
        ),
        grid=(num_sms(),),
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
    )(work, count, q if 16 % G else tiles_of_8(q.reshape(S * H, D)), keys, values, block_tables)
    out = merge_splits(parts, maxima, totals, splits, sinks, G, q.dtype)
    return out.reshape(S, K, stored, D)[:, :, :G].reshape(S, H, D)


def _attend(work, count, q, keys, values, tables, parts, maxima, totals, *scratch, G, config, logits):
    q_smem, k_smem, v_smem, q_ready, k_ready, v_ready, k_free, v_free = scratch
    _, K, N, D = keys.shape
    warpgroup = lax.axis_index("warpgroup")
    me = lax.rem(warpgroup, jnp.int32(config.workers))
    worker = me * lax.axis_size("cta") + lax.axis_index("cta")
    workers = config.workers * lax.axis_size("cta")
    mine = lax.div(count[0] * K - worker + workers - 1, jnp.int32(workers))
    stages = jnp.int32(config.stages)
    base = me * stages

    @pl.when(warpgroup < config.workers)
    def compute():
        if config.workers > 1:
            plgpu.set_max_registers(208, action="increase")

        def item(i, step):
            i = worker + i * workers
            w, h = lax.div(i, jnp.int32(K)), lax.rem(i, jnp.int32(K))
            seq, first, stop, length, split = (work[w, f] for f in range(5))
            if len(q.shape) == 2:  # the queries' rows lie within one tile of 8 and the copy engine can have them
                fetched = max(G, 8)  # those past G are other heads' or zeros
                row = seq * (K * G) + h * G
                plgpu.copy_gmem_to_smem(q.at[pl.ds(row, fetched)], q_smem.at[me, pl.ds(0, fetched)], q_ready.at[me])
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
                m_new = jnp.maximum(m, scores.max(axis=1))
                decay = jnp.exp2(m - m_new)
                p = jnp.exp2(scores - lax.broadcast_in_dim(m_new, scores.shape, [0]))
                total = total * decay + p.sum(axis=1)
                acc = acc * lax.broadcast_in_dim(decay, acc.shape, [0])
                plgpu.barrier_wait(v_ready.at[base + slot])
                weigh = lambda ref: plgpu.wgmma(ref, p.astype(v_smem.dtype), v_smem.at[me, slot])  # noqa: E731
                acc = pl.run_state(weigh)(plgpu.ACC.init(acc))
                plgpu.barrier_arrive(v_free.at[base + slot])
                return acc, m_new, total

            acc, m, total = lax.fori_loop(0, tiles, tile, _empty(D))
            store_rows(parts.at[seq, h, split], acc, G)
            store_column(maxima.at[seq, h, split], m, G)
            store_column(totals.at[seq, h, split], total, G)
            return step + tiles

        lax.fori_loop(0, mine, item, jnp.int32(0))

    @pl.when(warpgroup >= config.workers)
    def copy():
        if config.workers > 1:
            plgpu.set_max_registers(40, action="decrease")

        def item(i, step):
            i = worker + i * workers
            w, h = lax.div(i, jnp.int32(K)), lax.rem(i, jnp.int32(K))
            seq, first, stop = (work[w, f] for f in range(3))
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

        lax.fori_loop(0, mine, item, jnp.int32(0))


def block_at(tables, seq, token, N, p):
    """The block that holds the p-th slab of the tile at `token`; behind the table's end, its last entry."""
    index = lax.div(token, jnp.int32(N)) + p
    return tables[seq, jnp.minimum(index, tables.shape[1] - 1)]


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


def _empty(D):
    column = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), plgpu.Layout.WGMMA.reduce(1))
    acc = plgpu.layout_cast(jnp.zeros((ROWS, D), jnp.float32), plgpu.Layout.WGMMA)
    return acc, column - jnp.inf, column
