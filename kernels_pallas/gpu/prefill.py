"""Prefill attention: many query tokens a sequence, ragged, over paged keys and values.

FlashAttention-3 (arXiv 2407.08608) over a block table. The grid is persistent: a CTA takes tile after tile of queries
off a list, the longest walks over the cache first, so that all CTAs end together. Two compute warpgroups of 64 rows
each take turns on the tensor cores, one multiplying while the other does its softmax, and a memory warpgroup copies
queries, and pages into a ring of tiles, running ahead from one tile of queries into the next. The warpgroups take two
query heads of one key/value head over the same tokens where there are two, else two runs of tokens of one head. Rows
are stored from registers, up to the sequence's end, so that what belongs to the next sequence is never touched.

Tiles of eight bits are copied into the second half of their place in the ring, where one more warpgroup widens them to
16 bits, which is exact. The keys' scales multiply the scores and the values' the weights, before these are rounded.

A token's result is the same bits however its prompt is cut into chunks and whatever else is in the batch: tiles of
cached tokens begin at multiples of their size, they are taken in order, and one that a row sees nothing of changes
nothing.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from kernels_pallas.gpu.eight_bits import lift, load_scales, scales_shape, tile_transforms, widen_tile
from kernels_pallas.gpu.rows import LOG2E, PARAMS, ROWS, TILED, block_at, num_sms, store_rows, tiles_of_8
from kernels_pallas.quantize import SCALE_DTYPE, is_quantized

COMPUTE = 2  # warpgroups that multiply
WARPS = 4  # of a warpgroup
NOTHING = -1e30  # the maximum of a row that has seen nothing: finite, so that -inf less it is not NaN


@dataclass(frozen=True)
class PrefillConfig:
    """How the kernel is laid out on the machine.

    Attributes:
      tile: cached tokens multiplied at a time.
      stages: tiles of keys, and of values, in flight.
      queries: tiles of queries in shared memory; with two, the next is copied while one is worked on.
    """

    tile: int
    stages: int
    queries: int

    @classmethod
    def of(cls, head_dim: int) -> "PrefillConfig":
        """Fits into the 227 KB of an H100's shared memory: COMPUTE * ROWS queries a tile of them, and the ring."""
        return {64: cls(128, 4, 2), 128: cls(128, 2, 2), 256: cls(64, 2, 1)}[head_dim]


class Item(NamedTuple):
    """A tile of queries of one head, or of COMPUTE of them from `head` on. All but the head is a row of the list.

    Attributes:
      row: the tile's first row in the batch.
      low, high: which of its rows are the sequence's, the first and the last + 1.
      position: of the first row in its sequence.
      begin, end: the tiles of cached tokens that it walks over, the first and the last + 1.
    """

    head: jax.Array
    row: jax.Array
    low: jax.Array
    high: jax.Array
    position: jax.Array
    begin: jax.Array
    end: jax.Array
    seq: jax.Array


def list_work(T: int, kv_lens, cu_q_lens, num_seqs, tokens: int, tile: int, window: int | None):
    """The tiles of `tokens` queries, the longest walks over tiles of `tile` cached tokens first.

    A tile begins at a multiple of 8 rows, as the copy engine wants it, so that a sequence's first may begin with rows
    of the one before. Padding rows are one more sequence that sees nothing, so that they become zeros.

    Returns int32[W, 8], an Item without its head and with padding, and int32[1], how many of them are real.
    """
    S = kv_lens.shape[0]
    seq = jnp.arange(S + 1)
    start = jnp.where(seq < num_seqs[1], cu_q_lens, cu_q_lens[num_seqs[1]])
    stop = jnp.where(seq < num_seqs[1], jnp.append(cu_q_lens[1:], T), jnp.where(seq == num_seqs[1], T, start))
    aligned = start // 8 * 8
    tiles = jnp.where((seq >= num_seqs[0]) & (stop > start), pl.cdiv(stop - aligned, tokens), 0)
    through = jnp.sum(jnp.where(seq[:, None] >= seq[None, :], tiles[None, :], 0), axis=1)
    i = jnp.arange(pl.cdiv(T + 7 * (S + 1), tokens) + S + 1)
    s = jnp.minimum(jnp.sum(through[None, :] <= i[:, None], axis=1), S)
    row = aligned[s] + (through[s] - 1 - i) * tokens
    kv_len = jnp.append(kv_lens, 0)[s]
    position = kv_len - (stop[s] - row)
    begin = jnp.zeros_like(s) if window is None else jnp.maximum(position - (window - 1), 0) // tile
    seen = jnp.where(s < num_seqs[1], jnp.minimum(kv_len, position + tokens), 0)
    end = jnp.maximum(pl.cdiv(seen, tile), begin)
    work = jnp.stack([row, start[s] - row, stop[s] - row, position, begin, end, s, jnp.zeros_like(s)], axis=-1)
    walk = jnp.where(i < through[-1], end - begin, -1)
    longer = (walk[None, :] > walk[:, None]) | ((walk[None, :] == walk[:, None]) & (i[None, :] < i[:, None]))
    place = jnp.sum(longer, axis=1)
    work = jnp.zeros_like(work).at[place].set(work, unique_indices=True)
    return work.astype(jnp.int32), through[-1:].astype(jnp.int32)


@partial(jax.jit, static_argnames=("scale", "window", "soft_cap", "config"))
def prefill_attention(
    q, cache, kv_lens, block_tables, cu_q_lens, num_seqs, sinks=None, *, scale, window=None, soft_cap=None, config=None
):
    """Attends with the queries of sequences num_seqs[0] to num_seqs[1] - 1, causally.

    Args:
      q: [T, H, D], bfloat16 or float16; D is 64, 128 or 256.
      cache: keys and values [B, K, N, D] of q's dtype, int8 or float8_e4m3fn, and the scales of the latter, float32
        [B, K, N]; N is a power of two of at least 8; this step's tokens are in them already.
      kv_lens: int32[S]. block_tables: int32[S, P]. cu_q_lens: int32[S + 1]. num_seqs: int32[2].
      sinks: float32[H] or None.
      scale, window, soft_cap: see kernels_pallas.attention.

    Returns:
      [T, H, D] in q's dtype: zeros behind the last sequence, undefined before sequence num_seqs[0].
    """
    T, H, D = q.shape
    dtype = cache[0].dtype
    K, N = cache[0].shape[1:3]
    G = H // K
    config = config or PrefillConfig.of(D)
    heads = COMPUTE if G % COMPUTE == 0 else 1
    work, count = list_work(T, kv_lens, cu_q_lens, num_seqs, ROWS * COMPUTE // heads, config.tile, window)
    pages = max(1, config.tile // N)
    ring = plgpu.SMEM((config.stages, config.tile, D), q.dtype, transforms=TILED)
    full = plgpu.Barrier(num_arrivals=pages, num_barriers=config.stages)
    free = plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=config.stages)
    eight_bits: list = []
    if is_quantized(dtype):
        halves = plgpu.SMEM((config.stages, 2, config.tile, D), dtype, transforms=tile_transforms(D))
        ring = plgpu.RefUnion(ring, halves)
        full, copied = (plgpu.Barrier(num_arrivals=n, num_barriers=config.stages) for n in (1, 2 * pages))
        scales = plgpu.SMEM((config.stages, *scales_shape(N, config.tile)), SCALE_DTYPE)
        eight_bits = [[scales, scales], [copied, copied]]
    return plgpu.kernel(
        partial(
            _attend, G=G, heads=heads, config=config, scale=scale, window=window, soft_cap=soft_cap,
            sinks_given=sinks is not None,
        ),
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid=(num_sms(),),
        grid_names=("cta",),
        num_threads=COMPUTE + (2 if eight_bits else 1),
        thread_name="warpgroup",
        kernel_name="prefill_attention",
        scratch_types=[
            plgpu.SMEM((config.queries, COMPUTE, ROWS, D), q.dtype, transforms=TILED),
            [ring, ring],
            *[plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=config.queries)] * 2,
            [full, full],
            [free, free],
            plgpu.Barrier(num_arrivals=COMPUTE),
            eight_bits,
        ],
        compiler_params=PARAMS,
    )(
        work, count, tiles_of_8(q), (*cache[:2], *(x.reshape(-1) for x in cache[2:])), block_tables,
        num_seqs if sinks is None else sinks,
    )  # fmt: skip


def _attend(
    work, count, q, cache, tables, sinks, out, *scratch, G, heads, config, scale, window, soft_cap, sinks_given
):
    q_smem, rings, q_ready, q_free, ready, free, turn, eight_bits = scratch
    scales, copied = eight_bits or ([], ready)
    rings, inboxes = zip(*rings, strict=True) if scales else (rings, rings)
    (k_smem, v_smem), (k_ready, v_ready), (k_free, v_free) = rings, ready, free
    H, D = q.shape[1:]
    _, K, N, _ = cache[0].shape
    registers = (208, 32, 64) if scales else (232, 40, 0)  # of a thread that multiplies, copies or widens
    me = lax.axis_index("warpgroup")
    tile, stages, queries = (jnp.int32(size) for size in (config.tile, config.stages, config.queries))
    cta, ctas = lax.axis_index("cta"), jnp.int32(lax.axis_size("cta"))
    head_groups = jnp.int32(H // heads)
    items = count[0] * head_groups

    def index(r):
        """Back and forth over the CTAs, as work gets lighter along the list."""
        return r * ctas + jnp.where(lax.rem(r, jnp.int32(2)) == 0, cta, ctas - 1 - cta)

    def read(r):
        i = jnp.clip(index(r), 0, jnp.maximum(items - 1, 0))
        tile, group = lax.div(i, head_groups), lax.rem(i, head_groups)
        return Item(group * heads, *(work[tile, f] for f in range(len(Item._fields) - 1)))

    def for_each_item(visit):
        """Calls visit(r, item, tiles walked over before) for this CTA's items. The next one is read meanwhile."""
        whole = lax.div(items, ctas)
        mine = whole + (index(whole) < items)

        def step(r, carry):
            item, done = carry
            after = read(r + 1)
            visit(r, item, done)
            return after, done + item.end - item.begin

        lax.fori_loop(0, mine, step, (read(0), jnp.int32(0)))

    def rows_of(item, warpgroup):
        """The query head of a warpgroup, and how far behind the tile's first row its own begin."""
        return (item.head + warpgroup, 0) if heads > 1 else (item.head, warpgroup * ROWS)

    @pl.when(me < COMPUTE)
    def compute():
        plgpu.set_max_registers(registers[0], action="increase")
        raised = lift(cache[0].dtype) if scales else 0.0

        def columns(i, part):
            return pl.ds(i * part.shape[1], part.shape[1])

        def take_turn():
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(turn)

        def step(t, carry, masked, my_q, slot_of, first, end):
            acc, m, total = carry
            slot = slot_of(t)

            def multiply(scores):
                plgpu.wgmma(scores, my_q, k_smem.at[slot].transpose((1, 0)))
                take_turn()
                return scores[...]

            scores = pl.run_scoped(multiply, plgpu.ACC((ROWS, config.tile), jnp.float32))
            if scales:
                scores *= load_scales(scales[0].at[slot], N, scores.shape, axis=1)
            plgpu.barrier_arrive(k_free.at[slot])
            unit = scale * LOG2E
            if soft_cap is not None:
                scores = 1 - 2 / (jnp.exp2(scores * (2 * unit / soft_cap)) + 1)
                unit = soft_cap * LOG2E
            if masked:
                scores = jnp.where(_visible(scores.shape, first, t * tile, window), scores, -jnp.inf)
            m_new = jnp.maximum(m, scores.max(axis=1) * unit - raised)
            decay = jnp.exp2(m - m_new)
            p = jnp.exp2(scores * unit - lax.broadcast_in_dim(m_new, scores.shape, [0]))
            acc = [part * lax.broadcast_in_dim(decay, part.shape, [0]) for part in acc]
            total *= decay
            weights = p
            if scales:  # they come with the values
                plgpu.barrier_wait(v_ready.at[slot])
                weights *= load_scales(scales[1].at[slot], N, p.shape, axis=1)
            narrow = weights.astype(q.dtype)
            if D <= 128:
                total += p.sum(axis=1)
                acc, total, m_new, narrow = lax.optimization_barrier((acc, total, m_new, narrow))
            plgpu.barrier_arrive(turn)
            if not scales:
                plgpu.barrier_wait(v_ready.at[slot])
            plgpu.barrier_wait(turn)
            if D > 128:
                total += p.sum(axis=1)

            def weigh(acc):
                for i, part in enumerate(acc):
                    plgpu.wgmma(part, narrow, v_smem.at[slot, :, columns(i, part)])
                pl.when(t + 1 < end)(lambda: plgpu.barrier_wait(k_ready.at[slot_of(t + 1)]))

            acc = pl.run_state(weigh)([plgpu.ACC.init(part) for part in acc])
            plgpu.barrier_arrive(v_free.at[slot])
            return acc, m_new, total

        def attend(r, item, done):
            _, row, low, high, position, begin, end, _ = item
            head, offset = rows_of(item, me)
            first = position + offset
            q_slot = lax.rem(r, queries)
            sink = sinks[head] * LOG2E if sinks_given else 0.0

            def slot_of(t):
                return lax.rem(done + t - begin, stages)

            plgpu.barrier_wait(q_ready.at[q_slot])
            pl.when(begin < end)(lambda: plgpu.barrier_wait(k_ready.at[slot_of(begin)]))
            plgpu.barrier_wait(turn)
            part = partial(step, my_q=q_smem.at[q_slot, me], slot_of=slot_of, first=first, end=end)
            carry = _start(D, min(D, 128) if scales else D)
            whole = jnp.clip(lax.div(first + 1, tile), begin, end)  # tiles from here on hold tokens still to come
            inside = begin
            if window is not None:
                inside = jnp.clip(lax.div(jnp.maximum(first + ROWS - window, 0) + tile - 1, tile), begin, whole)
                carry = lax.fori_loop(begin, inside, partial(part, masked=True), carry)
            carry = lax.fori_loop(inside, whole, partial(part, masked=False), carry)
            acc, m, total = lax.fori_loop(whole, end, partial(part, masked=True), carry)
            plgpu.barrier_arrive(q_free.at[q_slot])
            plgpu.barrier_arrive(turn)
            if sinks_given:
                total += jnp.exp2(sink - m)
            inverse = jnp.where(total > 0, 1 / total, 0.0)
            for i, part in enumerate(acc):
                part *= lax.broadcast_in_dim(inverse, part.shape, [0])
                place = out.at[pl.ds(row + offset, ROWS), head, columns(i, part)]
                store_rows(place, part.astype(out.dtype), high - offset, low - offset)

        pl.when(me == 1)(take_turn)
        plgpu.barrier_arrive(turn)
        for_each_item(attend)

    @pl.when(me == COMPUTE)
    def copy():
        plgpu.set_max_registers(registers[1], action="decrease")
        size = min(N, config.tile)
        pages = config.tile // size

        def fetch(warp, r, item, done):
            """Each warp copies every WARPS-th page of a tile; the first ones also a warpgroup's queries."""
            kv_head = lax.div(item.head, jnp.int32(G))
            q_slot = lax.rem(r, queries)

            @pl.when(warp < COMPUTE)
            def copy_queries():
                pl.when(r >= queries)(lambda: plgpu.barrier_wait(q_free.at[q_slot]))
                head, offset = rows_of(item, warp)
                source = q.at[pl.ds(item.row + offset, ROWS), head]
                plgpu.copy_gmem_to_smem(source, q_smem.at[q_slot, warp], q_ready.at[q_slot])

            def step(t, _):
                nth = done + t - item.begin
                slot = lax.rem(nth, stages)
                mine = [warp + p for p in range(0, pages, WARPS)]
                blocks = [block_at(tables, item.seq, t * tile, N, p) for p in mine]
                row = lax.rem(t * tile, jnp.int32(N)) if config.tile < N else 0
                for which in range(2):
                    pl.when(nth >= stages)(partial(plgpu.barrier_wait, free[which].at[slot]))
                    target = inboxes[which].at[(slot, 1) if scales else slot]
                    for p, block in zip(mine, blocks, strict=True):
                        slab = cache[which].at[block, kv_head, pl.ds(row, size)]
                        plgpu.copy_gmem_to_smem(slab, target.at[pl.ds(p * size, size)], copied[which].at[slot])
                        if scales:
                            place = scales[which].at[slot, p]
                            run = cache[2 + which].at[pl.ds((block * K + kv_head) * N + row, place.shape[0])]
                            plgpu.copy_gmem_to_smem(run, place, copied[which].at[slot])

            pl.when(warp < pages)(lambda: lax.fori_loop(item.begin, item.end, step, None))

        plgpu.warp_map(lambda warp: for_each_item(partial(fetch, warp)))

    if not scales:
        return

    @pl.when(me == COMPUTE + 1)
    def widen():
        plgpu.set_max_registers(registers[2], action="decrease")

        def visit(_, item, done):
            def step(t, _):
                slot = lax.rem(done + t - item.begin, stages)
                for which in range(2):
                    plgpu.barrier_wait(copied[which].at[slot])
                    widen_tile(inboxes[which].at[slot, 1], rings[which].at[slot])
                    plgpu.barrier_arrive(ready[which].at[slot])

            lax.fori_loop(item.begin, item.end, step, None)

        for_each_item(visit)


def _visible(shape, query, cached, window):
    """Which of the queries from position `query` on see which of the cached tokens from `cached` on."""
    behind = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA) + (query - cached)
    behind -= plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
    seen = behind >= 0
    return seen if window is None else seen & (behind < window)


def _start(D, width):
    """Nothing seen: the weighted sum [ROWS, D] in parts of `width` columns, the maximum [ROWS] in base 2 and the
    denominator [ROWS]. A thread of four warpgroups starts with too few registers for a wgmma of 256 columns."""
    column = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), plgpu.Layout.WGMMA.reduce(1))
    part = plgpu.layout_cast(jnp.zeros((ROWS, width), jnp.float32), plgpu.Layout.WGMMA)
    return [part] * (D // width), column + NOTHING, column
