"""Decode attention over eight-bit keys and values: `gpu/decode.py`'s splits and merge, with another way to multiply.

wgmma takes its left operand from registers, so that is where tiles are widened to 16 bits: the scores of a tile are
keys times queries, [TILE, R], and the result values times weights, [D, R], where R is the G query heads of a key/value
head, rounded up to 8 or 16. The key's scale multiplies a row of the scores, the value's a row of the weights.

There are `workers` compute warpgroups, and one memory warpgroup with a warp to copy for each of them.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from kernels_pallas.gpu.decode import logits_of
from kernels_pallas.gpu.decode_work import Cuts, DecodeConfig, Item, list_work
from kernels_pallas.gpu.eight_bits import (
    TILE,
    keys_operand,
    lift,
    load_queries,
    load_scales,
    reduce_rows,
    reduction_scratch,
    scales_shape,
    store_queries,
    store_result,
    store_row,
    tile_transforms,
    values_operand,
)
from kernels_pallas.gpu.merge import Sinks, merge_splits, stored_rows
from kernels_pallas.gpu.rows import PARAMS, TILED, WARPGROUP, block_at, num_sms
from kernels_pallas.quantize import SCALE_DTYPE


def config_of(head_dim: int) -> DecodeConfig:
    """Splits are twice as long as those of 16 bits, as a tile takes half as long to come."""
    workers, stages = {64: (2, 10), 128: (2, 5), 256: (1, 5)}[head_dim]
    return DecodeConfig(min_split=512, max_splits=32, workers=workers, stages=stages)


@partial(jax.jit, static_argnames=("scale", "window", "soft_cap", "config"))
def decode_eight_bits(q, cache, kv_lens, block_tables, sinks=None, *, scale, window=None, soft_cap=None, config=None):
    """Attends with one query token a sequence, the last of its kv_lens tokens.

    Args:
      q: [S, H, D], bfloat16 or float16; D is 64, 128 or 256.
      cache: keys and values [B, K, N, D], int8 or float8_e4m3fn, and their scales, float32[B, K, N]; N is a power of
        two of at least 8, H / K at most 16.
      kv_lens: int32[S]; 0 gives zeros.
      block_tables: int32[S, P].
      sinks: float32[H] or None.
      scale, window, soft_cap: see kernels_pallas.attention.

    Returns:
      [S, H, D] in q's dtype.
    """
    S, H, D = q.shape
    K, N = cache[0].shape[1:3]
    G = H // K
    config = config or config_of(D)
    cuts = Cuts.of(kv_lens, block_tables.shape[1] * N, window, config)
    work, count = list_work(cuts, kv_lens, short_last=True)
    stored = stored_rows(G, D)
    logits = partial(logits_of, axis=0, scale=scale, window=window, soft_cap=soft_cap)
    found = plgpu.kernel(
        partial(_attend, G=G, config=config, logits=logits),
        out_type=(
            jax.ShapeDtypeStruct((S, K, cuts.most, stored * D), jnp.float32),
            *[jax.ShapeDtypeStruct((S, K, cuts.most, stored), jnp.float32)] * 2,
        ),
        grid=(num_sms(),),
        grid_names=("cta",),
        num_threads=config.workers + 1,
        thread_name="warpgroup",
        kernel_name="decode_eight_bits",
        scratch_types=_scratch(config, 8 if G <= 8 else 16, D, N, q.dtype, cache[0].dtype),
        compiler_params=PARAMS,
    )(work, count, q, (*cache[:2], *(x.reshape(-1) for x in cache[2:])), block_tables)
    out = merge_splits(found, cuts.splits, None if sinks is None else Sinks.of(sinks), G, q.dtype)
    return out.reshape(S, K, stored, D)[:, :, :G].reshape(S, H, D)


def _scratch(config: DecodeConfig, R: int, D: int, N: int, dtype, cache_dtype) -> list:
    """What workers have of their own, see Own; then of the rings of keys and of values each: tiles, their scales, and
    the barriers of full slots and of free ones."""
    workers, slots = config.workers, config.workers * config.stages
    tiles = plgpu.SMEM((workers, config.stages, TILE, D), cache_dtype, transforms=tile_transforms(D))
    scales = plgpu.SMEM((workers, config.stages, *scales_shape(N)), SCALE_DTYPE)
    full = plgpu.Barrier(num_arrivals=2 * max(1, TILE // N), num_barriers=slots)
    free = plgpu.Barrier(num_barriers=slots)
    return [
        plgpu.SMEM((workers, R, D), dtype, transforms=TILED),
        plgpu.SMEM((workers, R, TILE), dtype, transforms=TILED),
        plgpu.SMEM((workers, reduction_scratch(R)), jnp.float32),
        *([x, x] for x in (tiles, scales, full, free)),
    ]


@dataclass(frozen=True)
class Items:
    """The items of all workers, each of which has every so many, by row of the list and head.

    Attributes:
      work: int32[W, 8], of list_work.
      count: int32[1], its rows.
      heads: K.
      workers: of a CTA.
    """

    work: jax.Ref
    count: jax.Ref
    heads: int
    workers: int

    def read(self, worker, r) -> Item:
        """Item r of a worker of this CTA; behind the end, the last of all."""
        i = worker * lax.axis_size("cta") + lax.axis_index("cta") + r * (self.workers * lax.axis_size("cta"))
        i = jnp.clip(i, 0, jnp.maximum(self.count[0] * self.heads - 1, 0))
        return Item.at(self.work, i, self.heads)

    def for_each(self, worker, visit) -> None:
        """Calls visit(item, the next one, tiles before) for a worker's items. The next one is read meanwhile."""
        workers = self.workers * lax.axis_size("cta")
        before = worker * lax.axis_size("cta") + lax.axis_index("cta")
        mine = lax.div(self.count[0] * self.heads - before + workers - 1, jnp.int32(workers))

        def step(r, carry):
            item, done = carry
            after = self.read(worker, r + 1)
            visit(item, after, done)
            return after, done + item.tiles

        lax.fori_loop(0, mine, step, (self.read(worker, 0), jnp.int32(0)))


class Ring(NamedTuple):
    """Tiles of keys, or of values, on their way to the workers of a CTA.

    Attributes:
      cache, cache_scales: [B, K, N, D] and float32[B * K * N] in device memory.
      tiles, scales: [workers, stages, TILE, D] and float32[workers, stages, *scales_shape(N)] in shared memory.
      ready, free: a barrier for each of those, [workers * stages].
    """

    cache: jax.Ref
    cache_scales: jax.Ref
    tiles: jax.Ref
    scales: jax.Ref
    ready: Any
    free: Any


class Own(NamedTuple):
    """What a worker has in shared memory besides.

    Attributes:
      queries: [R, D], the item's.
      weights: [R, TILE], of a tile's values.
      partials: for reduce_rows.
    """

    queries: Any
    weights: Any
    partials: jax.Ref


def _attend(work, count, q, cache, tables, *refs, G, config, logits):
    """The kernel: warpgroup w of a CTA multiplies for its worker w, and warp w of the last warpgroup copies for it."""
    *results, q_smem, p_smem, partials, tiles, scales, ready, free = refs
    items = Items(work, count, cache[0].shape[1], config.workers)
    rings = tuple(map(Ring, cache[:2], cache[2:], tiles, scales, ready, free))
    me = lax.axis_index("warpgroup")

    @pl.when(me < config.workers)
    def multiply():
        if config.workers > 1:
            plgpu.set_max_registers(_registers(config.workers), action="increase")
        own = Own(q_smem.at[me], p_smem.at[me], partials.at[me])
        _multiply(me, items, q, own, rings, results, G, logits)

    @pl.when(me == config.workers)
    def copy():
        if config.workers > 1:
            plgpu.set_max_registers(40, action="decrease")

        @plgpu.warp_map
        def copy_in_warps(warp):
            visit = partial(_copy, warp, rings, tables)
            pl.when(warp < config.workers)(partial(items.for_each, warp, visit))


def _multiply(me, items: Items, q, own: Own, rings: tuple[Ring, ...], results, G: int, logits) -> None:
    """Attends with the queries of each item of worker `me`, from q [S, H, D], and stores what it finds in `results`,
    parts, maxima and denominators, as merge_splits takes them."""
    R, D = own.queries.shape
    parts, maxima, totals = results

    def queries(item):
        return load_queries(q.at[item.seq, pl.ds(item.head * G, G)], G, R)

    def visit(item, after, done):
        plgpu.commit_smem()  # the queries
        step = partial(_attend_to_tile, me, item, done, own, rings, logits)
        acc, m, total = lax.fori_loop(0, item.tiles, step, _empty(D, R))
        next_queries = queries(after)
        place = item.seq, item.head, item.split
        store_result(parts.at[place], acc, G)
        store_row(maxima.at[place], m, G)
        store_row(totals.at[place], reduce_rows(total, "add", own.partials), G)
        store_queries(own.queries, next_queries)

    store_queries(own.queries, queries(items.read(me, 0)))
    items.for_each(me, visit)


def _attend_to_tile(me, item: Item, done, own: Own, rings: tuple[Ring, ...], logits, t, found):
    """One step of the online softmax: what is found, as in _empty, once the item's tile t is seen, which is the tile
    `done` + t of worker `me`."""
    keys, values = rings
    acc, m, total = found
    N, stages = keys.cache.shape[2], jnp.int32(keys.tiles.shape[1])
    slot = lax.rem(done + t, stages)
    at = me * stages + slot
    plgpu.barrier_wait(keys.ready.at[at])
    operand = keys_operand(keys.tiles.at[me, slot], own.queries.dtype)

    def multiply(scores):
        plgpu.wgmma(scores, operand, own.queries.transpose((1, 0)))
        return scores[...]

    scores = pl.run_scoped(multiply, plgpu.ACC((TILE, own.queries.shape[0]), jnp.float32))
    scores *= load_scales(keys.scales.at[me, slot], N, scores.shape, axis=0)
    plgpu.barrier_arrive(keys.free.at[at])
    scores = logits(scores, item.first + t * TILE, item.stop, item.length)
    m_new = jnp.maximum(m, reduce_rows(scores, "max", own.partials) - lift(keys.cache.dtype))
    decay = jnp.exp2(m - m_new)
    p = jnp.exp2(scores - lax.broadcast_in_dim(m_new, scores.shape, [1]))
    total = total * lax.broadcast_in_dim(decay, total.shape, [1]) + p
    acc = acc * lax.broadcast_in_dim(decay, acc.shape, [1])
    plgpu.barrier_wait(values.ready.at[at])
    acc = _add_values(acc, p, me, slot, own, values)
    plgpu.barrier_arrive(values.free.at[at])
    return acc, m_new, total


def _add_values(acc, p, me, slot, own: Own, values: Ring):
    """acc [D, R] and the sum of the values in worker `me`'s slot, by their weights p [TILE, R] and their scales."""
    operand = values_operand(values.tiles.at[me, slot], own.weights.dtype)
    weights = p * load_scales(values.scales.at[me, slot], values.cache.shape[2], p.shape, axis=0)
    own.weights.transpose((1, 0))[...] = weights.astype(own.weights.dtype)
    plgpu.commit_smem()
    weigh = lambda acc: plgpu.wgmma(acc, operand, own.weights.transpose((1, 0)))  # noqa: E731
    return pl.run_state(weigh)(plgpu.ACC.init(acc))


def _copy(warp, rings: tuple[Ring, ...], tables, item: Item, _, done) -> None:
    """Copies an item's tiles into worker `warp`'s slots of the rings, as soon as they are free."""
    _, K, N, _ = rings[0].cache.shape
    stages = jnp.int32(rings[0].tiles.shape[1])
    rows = min(N, TILE)

    def tile(t, _):
        slot = lax.rem(done + t, stages)
        at = warp * stages + slot
        token = item.first + t * TILE
        blocks = [block_at(tables, item.seq, token, N, p) for p in range(TILE // rows)]
        row = lax.rem(token, jnp.int32(N)) if N > TILE else 0
        for ring in rings:
            pl.when(done + t >= stages)(partial(plgpu.barrier_wait, ring.free.at[at]))
            for p, block in enumerate(blocks):
                slab = ring.cache.at[block, item.head, pl.ds(row, rows)]
                plgpu.copy_gmem_to_smem(slab, ring.tiles.at[warp, slot, pl.ds(p * rows, rows)], ring.ready.at[at])
                place = ring.scales.at[warp, slot, p]
                run = pl.ds((block * K + item.head) * N + row, place.shape[0])
                plgpu.copy_gmem_to_smem(ring.cache_scales.at[run], place, ring.ready.at[at])

    lax.fori_loop(0, item.tiles, tile, None)


def _registers(workers: int) -> int:
    """For each thread that multiplies, of those that the threads start with; those that copy keep 40."""
    warpgroups = workers + 1
    started_with = 65536 // (WARPGROUP * warpgroups) // 8 * 8
    return min(232, (warpgroups * started_with - 40) // workers // 8 * 8)


def _empty(D, R):
    """Nothing seen: the weighted sum [D, R], the maximum [R] in base 2 and the denominator, a thread's part of it."""
    acc, total = (plgpu.layout_cast(jnp.zeros((n, R), jnp.float32), plgpu.Layout.WGMMA) for n in (D, TILE))
    return acc, plgpu.layout_cast(jnp.full((R,), -jnp.inf, jnp.float32), plgpu.Layout.WGMMA.reduce(0)), total
