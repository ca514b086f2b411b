"""Writes a step's keys and values into the cache, in place.

A TPU moves whole tiles: the unit here is a strip, the rows of one tile of one page, over all heads. A strip is read,
the step's rows are put in, and it is written back; many strips are under way at once.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.tpu.layout import keep_in_hbm, pack_rows, sublanes

SLOTS = 16  # strips in VMEM; half of them being read, half being written


class Strips(NamedTuple):
    """Which strips change, all int32, and the rows that go in. The first `total` of n are real."""

    total: jax.Array  # [1]
    block: jax.Array  # [n]
    strip: jax.Array  # [n], of the block
    first: jax.Array  # [n], the step's rows are first..end-1 of the strip
    end: jax.Array  # [n]
    fresh: jax.Array  # [n, K, rows of a strip or 1 for all, L]


def write_cache(k: jax.Array, v: jax.Array, cache: jax.Array, batch) -> jax.Array:
    """k, v [T, K, D] into cache [B, K, N, L]; padding is left out."""
    rows = pack_rows(k, v, cache.dtype)
    strips = (_decode_strips if batch.decode_only else _strips)(rows, cache.shape[2], batch)
    return _write(strips, cache)


def _decode_strips(rows: jax.Array, block_size: int, batch) -> Strips:
    height = sublanes(rows.dtype)
    position = jnp.maximum(batch.kv_lens - 1, 0)
    block = jnp.take_along_axis(batch.block_tables, position[:, None] // block_size, axis=1)[:, 0]
    row = position % height
    strip = position % block_size // height
    return Strips(batch.num_seqs[1:], block, strip, row, row + 1, rows[:, :, None])


def _strips(rows: jax.Array, block_size: int, batch) -> Strips:
    """Strips in the order of sequences; a sequence of q tokens touches at most q / height + 2."""
    height = sublanes(rows.dtype)
    T, S = rows.shape[0], batch.kv_lens.shape[0]
    new = batch.cu_q_lens[1:] - batch.cu_q_lens[:-1]
    start = batch.kv_lens - new
    is_real = (jnp.arange(S) < batch.num_seqs[1]) & (new > 0)
    strips_of = jnp.where(is_real, (batch.kv_lens - 1) // height - start // height + 1, 0)
    through = jnp.cumsum(strips_of)
    index = jnp.arange(min(T, T // height + 2 * S))
    seq = jnp.minimum(jnp.searchsorted(through, index, side="right"), S - 1)
    row = (start[seq] // height + index - (through - strips_of)[seq]) * height  # position of the strip's first row
    page = jnp.clip(row // block_size, 0, batch.block_tables.shape[1] - 1)
    source = batch.cu_q_lens[seq, None] + row[:, None] - start[seq, None] + jnp.arange(height)
    fresh = rows[jnp.clip(source, 0, T - 1)]  # [n, height, K, L]
    return Strips(
        total=through[-1:],
        block=batch.block_tables[seq, page],
        strip=row % block_size // height,
        first=jnp.maximum(start[seq] - row, 0),
        end=jnp.minimum(batch.kv_lens[seq] - row, height),
        fresh=fresh.swapaxes(1, 2),
    )


@jax.jit
def _write(strips: Strips, cache: jax.Array) -> jax.Array:
    _, K, _, L = cache.shape
    height = sublanes(cache.dtype)
    n, _, fresh_height, _ = strips.fresh.shape
    in_hbm = pl.BlockSpec(memory_space=pl.ANY)
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=5,
        grid=(1,),
        in_specs=[in_hbm, in_hbm],
        out_specs=in_hbm,
        scratch_shapes=[
            pltpu.VMEM((SLOTS, K, height, L), cache.dtype),
            pltpu.VMEM((SLOTS, K, fresh_height, L), cache.dtype),
            pltpu.SemaphoreType.DMA((3, SLOTS)),
        ],
    )
    moved = n * K * (2 * height + fresh_height) * L * cache.dtype.itemsize
    return pl.pallas_call(
        partial(_kernel, height=height),
        grid_spec=grid_spec,
        out_shape=jax.ShapeDtypeStruct(cache.shape, cache.dtype),
        input_output_aliases={6: 0},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), disable_bounds_checks=True),
        cost_estimate=pl.CostEstimate(flops=0, bytes_accessed=moved, transcendentals=0),
        name="write_cache",
    )(*strips, keep_in_hbm(cache))


def _kernel(
    count_ref, block_ref, strip_ref, first_ref, end_ref, fresh_ref, _, cache_ref, strips, fresh, sems, *, height
):
    count = count_ref[0]

    def place(i):
        row = pl.multiple_of(strip_ref[i] * height, height)
        return cache_ref.at[block_ref[i], :, pl.ds(row, height)]

    def reads(i):
        slot = i % SLOTS
        return (
            pltpu.make_async_copy(place(i), strips.at[slot], sems.at[0, slot]),
            pltpu.make_async_copy(fresh_ref.at[i], fresh.at[slot], sems.at[1, slot]),
        )

    def write(i):
        slot = i % SLOTS
        return pltpu.make_async_copy(strips.at[slot], place(i), sems.at[2, slot])

    def start_reads(i):
        for copy in reads(i):
            copy.start()

    lookahead = SLOTS // 2
    pl.loop(0, jnp.minimum(lookahead, count))(start_reads)

    @pl.loop(0, count)
    def _(i):
        ahead = i + lookahead

        @pl.when((ahead < count) & (ahead >= SLOTS))
        def _():
            write(ahead - SLOTS).wait()

        @pl.when(ahead < count)
        def _():
            start_reads(ahead)

        for copy in reads(i):
            copy.wait()
        slot = i % SLOTS
        row = jax.lax.broadcasted_iota(jnp.int32, strips.shape[1:], 1)
        is_fresh = (row >= first_ref[i]) & (row < end_ref[i])
        strips[slot] = jnp.where(is_fresh, fresh[slot], strips[slot])
        write(i).start()

    @pl.loop(jnp.maximum(count - SLOTS, 0), count)
    def _(i):
        write(i).wait()
