"""Decode attention over eight-bit keys and values: `gpu/decode.py`'s splits and merge, with another way to multiply.

wgmma takes its left operand from registers, so that is where tiles are widened to 16 bits: the scores of a tile are
keys times queries, [TILE, R], and the result values times weights, [D, R], where R is the G query heads of a key/value
head, rounded up to 8 or 16. The key's scale multiplies a row of the scores, the value's a row of the weights.

There are `workers` compute warpgroups, and one memory warpgroup with a warp to copy for each of them.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from kernels_pallas.gpu.decode import Cuts, DecodeConfig, list_work, logits_of
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
    dtype = cache[0].dtype
    K, N = cache[0].shape[1:3]
    G = H // K
    R = 8 if G <= 8 else 16
    config = config or config_of(D)
    cuts = Cuts.of(kv_lens, block_tables.shape[1] * N, window, config)
    work, count = list_work(cuts, kv_lens)
    stored = stored_rows(G, D)
    workers, slots = config.workers, config.workers * config.stages
    tiles = plgpu.SMEM((workers, config.stages, TILE, D), dtype, transforms=tile_transforms(D))
    scales = plgpu.SMEM((workers, config.stages, *scales_shape(N)), SCALE_DTYPE)
    full = plgpu.Barrier(num_arrivals=2 * max(1, TILE // N), num_barriers=slots)
    free = plgpu.Barrier(num_barriers=slots)
    logits = partial(logits_of, axis=0, scale=scale, window=window, soft_cap=soft_cap)
    found = plgpu.kernel(
        partial(_attend, G=G, config=config, logits=logits),
        out_type=(
            jax.ShapeDtypeStruct((S, K, cuts.most, stored * D), jnp.float32),
            *[jax.ShapeDtypeStruct((S, K, cuts.most, stored), jnp.float32)] * 2,
        ),
        grid=(num_sms(),),
        grid_names=("cta",),
        num_threads=workers + 1,
        thread_name="warpgroup",
        kernel_name="decode_eight_bits",
        scratch_types=[
            plgpu.SMEM((workers, R, D), q.dtype, transforms=TILED),
            plgpu.SMEM((workers, R, TILE), q.dtype, transforms=TILED),
            plgpu.SMEM((workers, reduction_scratch(R)), jnp.float32),
            [tiles, tiles],
            [scales, scales],
            [full, full],
            [free, free],
        ],
        compiler_params=PARAMS,
    )(work, count, q, (*cache[:2], *(x.reshape(-1) for x in cache[2:])), block_tables)
    out = merge_splits(found, cuts.splits, None if sinks is None else Sinks.of(sinks), G, q.dtype)
    return out.reshape(S, K, stored, D)[:, :, :G].reshape(S, H, D)


class Item(NamedTuple):
    """One split of a sequence for one key/value head; all but the head is a row of the list.

    Attributes:
      first, stop: the first of its cached tokens, and the last + 1.
      length: of the sequence.
      split: its number among the sequence's.
    """

    head: jax.Array
    seq: jax.Array
    first: jax.Array
    stop: jax.Array
    length: jax.Array
    split: jax.Array

    @property
    def tiles(self):
        return lax.div(self.stop - self.first + TILE - 1, jnp.int32(TILE))


def _attend(work, count, q, cache, tables, parts, maxima, totals, *scratch, G, config, logits):
    q_smem, p_smem, partials, (k_smem, v_smem), scales, (k_ready, v_ready), (k_free, v_free) = scratch
    _, K, N, D = cache[0].shape
    R = q_smem.shape[1]
    stages = jnp.int32(config.stages)

    def read(worker, r):
        i = worker * lax.axis_size("cta") + lax.axis_index("cta") + r * (config.workers * lax.axis_size("cta"))
        i = jnp.clip(i, 0, jnp.maximum(count[0] * K - 1, 0))
        row = lax.div(i, jnp.int32(K))
        return Item(lax.rem(i, jnp.int32(K)), *(work[row, f] for f in range(len(Item._fields) - 1)))

    def for_each_item(worker, visit):
        """Calls visit(item, the next one, tiles before) for a worker's items. The next one is read meanwhile."""
        workers = config.workers * lax.axis_size("cta")
        before = worker * lax.axis_size("cta") + lax.axis_index("cta")
        mine = lax.div(count[0] * K - before + workers - 1, jnp.int32(workers))

        def step(r, carry):
            item, done = carry
            after = read(worker, r + 1)
            visit(item, after, done)
            return after, done + item.tiles

        lax.fori_loop(0, mine, step, (read(worker, 0), jnp.int32(0)))

    me = lax.axis_index("warpgroup")

    @pl.when(me < config.workers)
    def compute():
        if config.workers > 1:
            plgpu.set_max_registers(_registers(config.workers), action="increase")

        def queries(item):
            return load_queries(q.at[item.seq, pl.ds(item.head * G, G)], G, R)

        def visit(item, after, done):
            plgpu.commit_smem()  # the queries

            def tile(t, carry):
                acc, m, total = carry
                slot = lax.rem(done + t, stages)
                at = me * stages + slot
                plgpu.barrier_wait(k_ready.at[at])
                keys = keys_operand(k_smem.at[me, slot], q.dtype)

                def multiply(scores):
                    plgpu.wgmma(scores, keys, q_smem.at[me].transpose((1, 0)))
                    return scores[...]

                scores = pl.run_scoped(multiply, plgpu.ACC((TILE, R), jnp.float32))
                scores *= load_scales(scales[0].at[me, slot], N, scores.shape, axis=0)
                plgpu.barrier_arrive(k_free.at[at])
                scores = logits(scores, item.first + t * TILE, item.stop, item.length)
                m_new = jnp.maximum(m, reduce_rows(scores, "max", partials.at[me]) - lift(cache[0].dtype))
                decay = jnp.exp2(m - m_new)
                p = jnp.exp2(scores - lax.broadcast_in_dim(m_new, scores.shape, [1]))
                total = total * lax.broadcast_in_dim(decay, total.shape, [1]) + p
                acc = acc * lax.broadcast_in_dim(decay, acc.shape, [1])
                plgpu.barrier_wait(v_ready.at[at])
                values = values_operand(v_smem.at[me, slot], q.dtype)
                weights = p * load_scales(scales[1].at[me, slot], N, p.shape, axis=0)
                p_smem.at[me].transpose((1, 0))[...] = weights.astype(q.dtype)
                plgpu.commit_smem()
                weigh = lambda acc: plgpu.wgmma(acc, values, p_smem.at[me].transpose((1, 0)))  # noqa: E731
                acc = pl.run_state(weigh)(plgpu.ACC.init(acc))
                plgpu.barrier_arrive(v_free.at[at])
                return acc, m_new, total

            acc, m, total = lax.fori_loop(0, item.tiles, tile, _empty(D, R))
            next_queries = queries(after)
            place = item.seq, item.head, item.split
            store_result(parts.at[place], acc, G)
            store_row(maxima.at[place], m, G)
            store_row(totals.at[place], reduce_rows(total, "add", partials.at[me]), G)
            store_queries(q_smem.at[me], next_queries)

        store_queries(q_smem.at[me], queries(read(me, 0)))
        for_each_item(me, visit)

    @pl.when(me == config.workers)
    def copy():
        if config.workers > 1:
            plgpu.set_max_registers(40, action="decrease")
        rows = min(N, TILE)

        def visit(warp, item, _, done):
            """A warp copies for a worker."""

            def tile(t, _):
                slot = lax.rem(done + t, stages)
                at = warp * stages + slot
                token = item.first + t * TILE
                blocks = [block_at(tables, item.seq, token, N, p) for p in range(TILE // rows)]
                row = lax.rem(token, jnp.int32(N)) if N > TILE else 0
                rings = (k_smem, k_ready, k_free), (v_smem, v_ready, v_free)
                for which, (ring, ready, free) in enumerate(rings):
                    pl.when(done + t >= stages)(partial(plgpu.barrier_wait, free.at[at]))
                    for p, block in enumerate(blocks):
                        slab = cache[which].at[block, item.head, pl.ds(row, rows)]
                        plgpu.copy_gmem_to_smem(slab, ring.at[warp, slot, pl.ds(p * rows, rows)], ready.at[at])
                        place = scales[which].at[warp, slot, p]
                        run = pl.ds((block * K + item.head) * N + row, place.shape[0])
                        plgpu.copy_gmem_to_smem(cache[2 + which].at[run], place, ready.at[at])

            lax.fori_loop(0, item.tiles, tile, None)

        @plgpu.warp_map
        def copy_in_warps(warp):
            pl.when(warp < config.workers)(lambda: for_each_item(warp, partial(visit, warp)))


def _registers(workers: int) -> int:
    """For each thread that multiplies, of those that the threads start with; those that copy keep 40."""
    warpgroups = workers + 1
    started_with = 65536 // (WARPGROUP * warpgroups) // 8 * 8
    return min(232, (warpgroups * started_with - 40) // workers // 8 * 8)


def _empty(D, R):
    """Nothing seen: the weighted sum [D, R], the maximum [R] in base 2 and the denominator, a thread's part of it."""
    acc, total = (plgpu.layout_cast(jnp.zeros((n, R), jnp.float32), plgpu.Layout.WGMMA) for n in (D, TILE))
    return acc, plgpu.layout_cast(jnp.full((R,), -jnp.inf, jnp.float32), plgpu.Layout.WGMMA.reduce(0)), total
