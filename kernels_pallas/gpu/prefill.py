"""Prefill attention: many query tokens a sequence, ragged, over paged keys and values.

FlashAttention-3 (arXiv 2407.08608) over a block table. The grid is persistent: a CTA takes tile after tile of queries
off a list (prefill_work), the longest walks over the cache first, so that all CTAs end together. Two compute warpgroups
of 64 rows each take turns on the tensor cores, one multiplying while the other does its softmax, and a memory warpgroup
copies queries, and pages into a ring of tiles, running ahead from one tile of queries into the next. The warpgroups
take two query heads of one key/value head over the same tokens where there are two, else two runs of tokens of one
head. Rows are stored from registers, up to the sequence's end, so that what belongs to the next sequence is never
touched.

Tiles of eight bits are copied into the second half of their place in the ring, where one more warpgroup widens them to
16 bits, which is exact. The keys' scales multiply the scores and the values' the weights, before these are rounded.

A token's result is the same bits however its prompt is cut into chunks and whatever else is in the batch: tiles of
cached tokens begin at multiples of their size, they are taken in order, and one that a row sees nothing of changes
nothing.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from kernels_pallas.gpu.eight_bits import lift, load_scales, scales_shape, tile_transforms, widen_tile
from kernels_pallas.gpu.prefill_work import Item, Items, list_work
from kernels_pallas.gpu.rows import LOG2E, PARAMS, ROWS, TILED, block_at, num_sms, store_rows, tiles_of_8
from kernels_pallas.quantize import SCALE_DTYPE, is_quantized

COMPUTE = 2  # warpgroups that multiply
WARPS = 4  # of a warpgroup
KEYS, VALUES = 0, 1  # places in a pair
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


@dataclass(frozen=True)
class Call:
    """What is known of a call when it is compiled.

    Attributes:
      G: query heads of a key/value head.
      sinks: whether there are any.
      scale, window, soft_cap: see kernels_pallas.attention.
    """

    G: int
    config: PrefillConfig
    scale: float
    window: int | None
    soft_cap: float | None
    sinks: bool

    @property
    def heads(self) -> int:
        """Query heads of an item of work."""
        return COMPUTE if self.G % COMPUTE == 0 else 1


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
    config = config or PrefillConfig.of(D)
    call = Call(H // cache[0].shape[1], config, scale, window, soft_cap, sinks is not None)
    tokens = ROWS * COMPUTE // call.heads
    work, count = list_work(T, kv_lens, cu_q_lens, num_seqs, tokens, config.tile, window)
    return plgpu.kernel(
        partial(_attend, call=call),
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid=(num_sms(),),
        grid_names=("cta",),
        num_threads=COMPUTE + (2 if is_quantized(cache[0].dtype) else 1),
        thread_name="warpgroup",
        kernel_name="prefill_attention",
        scratch_types=[Scratch.of(config, q.dtype, cache[0])],
        compiler_params=PARAMS,
    )(
        work, count, tiles_of_8(q), (*cache[:2], *(x.reshape(-1) for x in cache[2:])), block_tables,
        num_seqs if sinks is None else sinks,
    )  # fmt: skip


class Scratch(NamedTuple):
    """A CTA's shared memory and barriers, or their types. Pairs are for keys and for values.

    Attributes:
      queries: [queries, COMPUTE, ROWS, D].
      rings: a pair of [stages, tile, D], where wgmma reads them. Over eight bits each shares its memory with
        [stages, 2, tile, D] in eight bits and is a pair of both.
      q_ready, q_free: of each tile of queries, whether it has been copied, and read.
      ready, free: a pair of each, of each tile of a ring: whether wgmma can read it, and has done so.
      turn: of COMPUTE warpgroups on the tensor cores.
      scales: a pair of float32[stages, *scales_shape], and none over 16 bits, as with the next.
      copied: a pair, of each tile of a ring: whether its eight bits and their scales are there.
    """

    queries: Any
    rings: Any
    q_ready: Any
    q_free: Any
    ready: Any
    free: Any
    turn: Any
    scales: Any = ()
    copied: Any = ()

    @classmethod
    def of(cls, config: PrefillConfig, dtype, keys) -> "Scratch":
        """The types for queries of `dtype` over keys [B, K, N, D]."""
        N, D = keys.shape[2:]
        pages = max(1, config.tile // N)
        queries = plgpu.SMEM((config.queries, COMPUTE, ROWS, D), dtype, transforms=TILED)
        of_queries = plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=config.queries)
        of_ring = partial(plgpu.Barrier, num_barriers=config.stages)
        ring = plgpu.SMEM((config.stages, config.tile, D), dtype, transforms=TILED)
        ready, free = of_ring(num_arrivals=pages), of_ring(num_arrivals=COMPUTE)
        turn = plgpu.Barrier(num_arrivals=COMPUTE)
        eight_bits: list = []
        if is_quantized(keys.dtype):
            halves = plgpu.SMEM((config.stages, 2, config.tile, D), keys.dtype, transforms=tile_transforms(D))
            ring = plgpu.RefUnion(ring, halves)
            ready, copied = of_ring(num_arrivals=1), of_ring(num_arrivals=2 * pages)
            scales = plgpu.SMEM((config.stages, *scales_shape(N, config.tile)), SCALE_DTYPE)
            eight_bits = [[scales] * 2, [copied] * 2]
        return cls(queries, [ring] * 2, of_queries, of_queries, [ready] * 2, [free] * 2, turn, *eight_bits)

    def tile(self, which: int, slot):
        """[tile, D]: a tile of the keys or values, as wgmma reads it."""
        return (self.rings[which][0] if self.scales else self.rings[which]).at[slot]

    def inbox(self, which: int, slot):
        """[tile, D] in the cache's dtype: where a tile of the keys or values is copied to."""
        return self.rings[which][1].at[slot, 1] if self.scales else self.rings[which].at[slot]

    def arrived(self, which: int):
        """The barriers of a ring that the copy engine arrives at."""
        return (self.copied or self.ready)[which]


@dataclass(frozen=True)
class Cta:
    """What the warpgroups of a CTA share.

    Attributes:
      items: those that this CTA works on.
      q, out: [T, H, D] in device memory, as the next ones are; q with rows behind it up to a multiple of 8.
      cache: keys and values [B, K, N, D] and over eight bits their scales, float32[B * K * N].
      tables: int32[S, P].
      sinks: float32[H], or anything where there are none.
      scratch: shared memory and barriers.
    """

    call: Call
    items: Items
    q: Any
    cache: Any
    tables: Any
    sinks: Any
    out: Any
    scratch: Scratch

    @property
    def registers(self) -> tuple[int, ...]:
        """Of a thread that multiplies, copies or widens."""
        return (208, 32, 64) if self.scratch.scales else (232, 40)

    def query_slot(self, r):
        """Where the queries of item r are in shared memory."""
        return lax.rem(r, jnp.int32(self.call.config.queries))

    def slot(self, nth):
        """Where the nth tile that the CTA walks over is in the rings."""
        return lax.rem(nth, jnp.int32(self.call.config.stages))


@dataclass(frozen=True)
class Walk:
    """One warpgroup's way over the tiles of cached tokens that its rows of an item of work may see.

    Attributes:
      queries: the rows, [ROWS, D] in shared memory.
      first: the position of the first of them.
      done: tiles that the CTA walked over before.
    """

    cta: Cta
    item: Item
    queries: Any
    first: jax.Array
    done: jax.Array

    def slot(self, t):
        """Where tile number t of the sequence's cached tokens is in the rings."""
        return self.cta.slot(self.done + t - self.item.begin)

    def scaled(self, which: int, t, x):
        """x [ROWS, tile] times the scales of the keys or values of tile number t."""
        N = self.cta.cache[which].shape[2]
        return x * load_scales(self.cta.scratch.scales[which].at[self.slot(t)], N, x.shape, axis=1)


def _attend(work, count, q, cache, tables, sinks, out, scratch: Scratch, *, call: Call):
    """The kernel: each warpgroup of a CTA takes its role. For what it is given see Items and Cta."""
    me = lax.axis_index("warpgroup")
    items = Items.of(work, count, q.shape[1], call.heads)
    cta = Cta(call, items, q, cache, tables, sinks, out, scratch)
    pl.when(me < COMPUTE)(partial(_multiply, cta, me))
    pl.when(me == COMPUTE)(partial(_copy, cta))
    if scratch.scales:
        pl.when(me == COMPUTE + 1)(partial(_widen, cta))


def _multiply(cta: Cta, me):
    """The role of the first COMPUTE warpgroups, of which this is number `me`: attention, ROWS rows each of an item."""
    plgpu.set_max_registers(cta.registers[0], action="increase")
    pl.when(me == 1)(partial(_pass_turn, cta.scratch.turn))
    plgpu.barrier_arrive(cta.scratch.turn)
    cta.items.for_each(partial(_attend_to_item, cta, me))


def _pass_turn(turn):
    """Lets the other warpgroup use the tensor cores and waits until it passes the turn on."""
    plgpu.barrier_arrive(turn)
    plgpu.barrier_wait(turn)


def _attend_to_item(cta: Cta, me, r, item: Item, done):
    """Attends with the rows of warpgroup `me` of item number r and stores the result."""
    head, offset = cta.items.rows_of(item, me)
    first = item.position + offset
    q_slot = cta.query_slot(r)
    scratch = cta.scratch
    sink = cta.sinks[head] * LOG2E if cta.call.sinks else 0.0
    walk = Walk(cta, item, scratch.queries.at[q_slot, me], first, done)
    plgpu.barrier_wait(scratch.q_ready.at[q_slot])
    pl.when(item.begin < item.end)(lambda: plgpu.barrier_wait(scratch.ready[KEYS].at[walk.slot(item.begin)]))
    plgpu.barrier_wait(scratch.turn)
    acc, m, total = _walk_over_tiles(walk)
    plgpu.barrier_arrive(scratch.q_free.at[q_slot])
    plgpu.barrier_arrive(scratch.turn)
    if cta.call.sinks:
        total += jnp.exp2(sink - m)
    inverse = jnp.where(total > 0, 1 / total, 0.0)
    for i, part in enumerate(acc):
        part *= lax.broadcast_in_dim(inverse, part.shape, [0])
        place = cta.out.at[pl.ds(item.row + offset, ROWS), head, _columns(i, part)]
        store_rows(place, part.astype(cta.out.dtype), item.high - offset, item.low - offset)


def _columns(i, part):
    """Of the ith of the parts that a weighted sum is in."""
    return pl.ds(i * part.shape[1], part.shape[1])


def _walk_over_tiles(walk: Walk):
    """All steps of a walk: tiles are masked where the window begins, then seen in full, then masked where the queries
    are. Returns what _start does, after them."""
    begin, end, first = walk.item.begin, walk.item.end, walk.first
    window, tile = walk.cta.call.window, jnp.int32(walk.cta.call.config.tile)
    D = walk.queries.shape[1]
    carry = _start(D, min(D, 128) if walk.cta.scratch.scales else D)
    whole = jnp.clip(lax.div(first + 1, tile), begin, end)  # tiles from here on hold tokens still to come
    inside = begin
    if window is not None:
        inside = jnp.clip(lax.div(jnp.maximum(first + ROWS - window, 0) + tile - 1, tile), begin, whole)
        carry = lax.fori_loop(begin, inside, partial(_step, walk, masked=True), carry)
    carry = lax.fori_loop(inside, whole, partial(_step, walk, masked=False), carry)
    return lax.fori_loop(whole, end, partial(_step, walk, masked=True), carry)


def _step(walk: Walk, t, carry, masked: bool):
    """Attends to tile number t of the cached tokens. carry: as _start returns it. The softmax is done while the other
    warpgroup multiplies."""
    acc, m, total = carry
    scratch, slot, D = walk.cta.scratch, walk.slot(t), walk.queries.shape[1]
    scores = _scores(walk, t)
    p, m_new, decay = _softmax(walk, t, scores, m, masked)
    acc = [part * lax.broadcast_in_dim(decay, part.shape, [0]) for part in acc]
    total *= decay
    weights = p
    if scratch.scales:  # they come with the values
        plgpu.barrier_wait(scratch.ready[VALUES].at[slot])
        weights = walk.scaled(VALUES, t, p)
    narrow = weights.astype(walk.queries.dtype)
    if D <= 128:
        total += p.sum(axis=1)
        acc, total, m_new, narrow = lax.optimization_barrier((acc, total, m_new, narrow))
    plgpu.barrier_arrive(scratch.turn)
    if not scratch.scales:
        plgpu.barrier_wait(scratch.ready[VALUES].at[slot])
    plgpu.barrier_wait(scratch.turn)
    if D > 128:
        total += p.sum(axis=1)
    acc = _weigh(walk, t, narrow, acc)
    plgpu.barrier_arrive(scratch.free[VALUES].at[slot])
    return acc, m_new, total


def _scores(walk: Walk, t):
    """float32[ROWS, tile]: the queries times the keys of tile number t, whose place is free then. The other warpgroup
    gets its turn meanwhile."""
    scratch, slot = walk.cta.scratch, walk.slot(t)

    def multiply(scores):
        plgpu.wgmma(scores, walk.queries, scratch.tile(KEYS, slot).transpose((1, 0)))
        _pass_turn(scratch.turn)
        return scores[...]

    scores = pl.run_scoped(multiply, plgpu.ACC((ROWS, walk.cta.call.config.tile), jnp.float32))
    if scratch.scales:
        scores = walk.scaled(KEYS, t, scores)
    plgpu.barrier_arrive(scratch.free[KEYS].at[slot])
    return scores


def _softmax(walk: Walk, t, scores, m, masked: bool):
    """From the scores [ROWS, tile] of tile number t and the maximum [ROWS] before it: its weights [ROWS, tile], not yet
    divided by their sum, the new maximum, and what all sums before are to be multiplied by, [ROWS]. In base 2."""
    call = walk.cta.call
    unit = call.scale * LOG2E
    if call.soft_cap is not None:
        scores = 1 - 2 / (jnp.exp2(scores * (2 * unit / call.soft_cap)) + 1)
        unit = call.soft_cap * LOG2E
    if masked:
        seen = _visible(scores.shape, walk.first, t * call.config.tile, call.window)
        scores = jnp.where(seen, scores, -jnp.inf)
    raised = lift(walk.cta.cache[VALUES].dtype) if walk.cta.scratch.scales else 0.0
    m_new = jnp.maximum(m, scores.max(axis=1) * unit - raised)
    decay = jnp.exp2(m - m_new)
    p = jnp.exp2(scores * unit - lax.broadcast_in_dim(m_new, scores.shape, [0]))
    return p, m_new, decay


def _weigh(walk: Walk, t, weights, acc):
    """Adds weights [ROWS, tile] times the values of tile number t to the parts of a weighted sum. The next tile's keys
    are waited for meanwhile."""
    scratch, slot = walk.cta.scratch, walk.slot(t)

    def weigh(acc):
        for i, part in enumerate(acc):
            plgpu.wgmma(part, weights, scratch.tile(VALUES, slot).at[:, _columns(i, part)])
        pl.when(t + 1 < walk.item.end)(lambda: plgpu.barrier_wait(scratch.ready[KEYS].at[walk.slot(t + 1)]))

    return pl.run_state(weigh)([plgpu.ACC.init(part) for part in acc])


def _copy(cta: Cta):
    """The role of the next warpgroup: its warps copy queries, and pages into the rings, where there is room."""
    plgpu.set_max_registers(cta.registers[1], action="decrease")
    plgpu.warp_map(lambda warp: cta.items.for_each(partial(_copy_item, cta, warp)))


def _copy_item(cta: Cta, warp, r, item: Item, done):
    """Each warp copies every WARPS-th page of a tile; the first ones also a warpgroup's queries."""
    kv_head = lax.div(item.head, jnp.int32(cta.call.G))
    pl.when(warp < COMPUTE)(partial(_copy_queries, cta, warp, r, item))
    step = partial(_copy_tile, cta, warp, item, kv_head, done)
    pages = cta.call.config.tile // min(cta.cache[KEYS].shape[2], cta.call.config.tile)
    pl.when(warp < pages)(lambda: lax.fori_loop(item.begin, item.end, step, None))


def _copy_queries(cta: Cta, warp, r, item: Item):
    """The rows of item number r that warpgroup number `warp` attends with."""
    scratch, q_slot = cta.scratch, cta.query_slot(r)
    pl.when(r >= cta.call.config.queries)(lambda: plgpu.barrier_wait(scratch.q_free.at[q_slot]))
    head, offset = cta.items.rows_of(item, warp)
    source = cta.q.at[pl.ds(item.row + offset, ROWS), head]
    plgpu.copy_gmem_to_smem(source, scratch.queries.at[q_slot, warp], scratch.q_ready.at[q_slot])


def _copy_tile(cta: Cta, warp, item: Item, kv_head, done, t, _):
    """This warp's pages of tile number t of the cached tokens, of keys and values, with their scales."""
    scratch, config = cta.scratch, cta.call.config
    _, K, N, _ = cta.cache[KEYS].shape
    size = min(N, config.tile)
    nth = done + t - item.begin
    slot = cta.slot(nth)
    token = t * config.tile
    mine = [warp + p for p in range(0, config.tile // size, WARPS)]
    blocks = [block_at(cta.tables, item.seq, token, N, p) for p in mine]
    row = lax.rem(token, jnp.int32(N)) if config.tile < N else 0
    for which in (KEYS, VALUES):
        pl.when(nth >= config.stages)(partial(plgpu.barrier_wait, scratch.free[which].at[slot]))
        arrived = scratch.arrived(which).at[slot]
        for p, block in zip(mine, blocks, strict=True):
            slab = cta.cache[which].at[block, kv_head, pl.ds(row, size)]
            plgpu.copy_gmem_to_smem(slab, scratch.inbox(which, slot).at[pl.ds(p * size, size)], arrived)
            if scratch.scales:
                place = scratch.scales[which].at[slot, p]
                run = cta.cache[2 + which].at[pl.ds((block * K + kv_head) * N + row, place.shape[0])]
                plgpu.copy_gmem_to_smem(run, place, arrived)


def _widen(cta: Cta):
    """The role of the last warpgroup, over eight bits: makes every tile of the rings one of 16 bits."""
    plgpu.set_max_registers(cta.registers[2], action="decrease")
    scratch = cta.scratch

    def visit(_, item, done):
        def step(t, _):
            slot = cta.slot(done + t - item.begin)
            for which in (KEYS, VALUES):
                plgpu.barrier_wait(scratch.copied[which].at[slot])
                widen_tile(scratch.inbox(which, slot), scratch.tile(which, slot))
                plgpu.barrier_arrive(scratch.ready[which].at[slot])

        lax.fori_loop(item.begin, item.end, step, None)

    cta.items.for_each(visit)


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
