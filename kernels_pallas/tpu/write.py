"""Writes a step's keys and values into the cache, in place.

A TPU moves whole tiles: the unit here is a strip, one tile's tokens of one page, over all heads. A strip is read, the
step's tokens are put in, and it is written back; many strips are under way at once. Tokens are rows of a tile, or, in
the scales of an eight-bit cache, its lanes.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.quantize import quantize
from kernels_pallas.tpu.layout import LANES, keep_in_hbm, pack_rows, sublanes

SLOTS = 16  # strips in VMEM; half of them being read, half being written


class Strips(NamedTuple):
    """Which strips change, all int32, and what goes in. The first `total` of n are real."""

    total: jax.Array  # [1]
    block: jax.Array  # [n]
    strip: jax.Array  # [n], of the block
    first: jax.Array  # [n], the step's tokens are first..end-1 of the strip
    end: jax.Array  # [n]
    fresh: jax.Array  # [n, tokens of a strip or 1 for all, K, L]


def write_cache(k: jax.Array, v: jax.Array, cache: tuple[jax.Array, ...], batch) -> tuple[jax.Array, ...]:
    """k, v [T, K, D] into the pages and scales of a cache; padding is left out."""
    pages, *scales = cache
    if scales:
        (k, k_scales), (v, v_scales) = (quantize(x, pages.dtype) for x in (k, v))
        both = jnp.stack([k_scales, v_scales], axis=-1)
        scales = [_put(both, scales[0], batch, height=LANES, axis=3)]
    return _put(pack_rows(k, v, pages.dtype), pages, batch, height=sublanes(pages.dtype), axis=2), *scales


def _put(rows: jax.Array, cache: jax.Array, batch, *, height: int, axis: int) -> jax.Array:
    """rows [T, K, L] into `cache`, whose `axis` is a page's tokens, in strips of `height` tokens."""
    strips = (_decode_strips if batch.decode_only else _strips)(rows, height, cache.shape[axis], batch)
    fresh = strips.fresh
    if axis == 3:  # a copy moves whole lanes
        fresh = jnp.broadcast_to(fresh, (len(fresh), height, *fresh.shape[2:]))
    return _write(strips._replace(fresh=jnp.moveaxis(fresh, 1, axis)), cache, height, axis)


def _decode_strips(rows: jax.Array, height: int, block_size: int, batch) -> Strips:
    position = jnp.maximum(batch.kv_lens - 1, 0)
    block = jnp.take_along_axis(batch.block_tables, position[:, None] // block_size, axis=1)[:, 0]
    row = position % height
    strip = position % block_size // height
    return Strips(batch.num_seqs[1:], block, strip, row, row + 1, rows[:, None])


def _strips(rows: jax.Array, height: int, block_size: int, batch) -> Strips:
    """Strips in the order of sequences; a sequence of q tokens touches at most q / height + 2."""
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
        fresh=fresh,
    )


@partial(jax.jit, static_argnames=("height", "axis"))
def _write(strips: Strips, cache: jax.Array, height: int, axis: int) -> jax.Array:
    strip = tuple(height if i == axis else size for i, size in enumerate(cache.shape))[1:]
    n, *fresh = strips.fresh.shape
    in_hbm = pl.BlockSpec(memory_space=pl.ANY)
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=5,
        grid=(1,),
        in_specs=[in_hbm, in_hbm],
        out_specs=in_hbm,
        scratch_shapes=[
            pltpu.VMEM((SLOTS, *strip), cache.dtype),
            pltpu.VMEM((SLOTS, *fresh), cache.dtype),
            pltpu.SemaphoreType.DMA((3, SLOTS)),
        ],
    )
    moved = n * (2 * math.prod(strip) + math.prod(fresh)) * cache.dtype.itemsize
    return pl.pallas_call(
        partial(_kernel, height=height, axis=axis),
        grid_spec=grid_spec,
        out_shape=jax.ShapeDtypeStruct(cache.shape, cache.dtype),
        input_output_aliases={6: 0},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), disable_bounds_checks=True),
        cost_estimate=pl.CostEstimate(flops=0, bytes_accessed=moved, transcendentals=0),
        name="write_cache",
    )(*strips, keep_in_hbm(cache))


def _kernel(
    count_ref, block_ref, strip_ref, first_ref, end_ref, fresh_ref, _, cache_ref, strips, fresh, sems, *, height, axis
):
    count = count_ref[0]

    def place(i):
        tokens = pl.ds(pl.multiple_of(strip_ref[i] * height, height), height)
        return cache_ref.at[(block_ref[i], *[slice(None)] * (axis - 1), tokens)]

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
        token = jax.lax.broadcasted_iota(jnp.int32, strips.shape[1:], axis - 1)
        is_fresh = (token >= first_ref[i]) & (token < end_ref[i])
        strips[slot] = jnp.where(is_fresh, fresh[slot], strips[slot])
        write(i).start()

    @pl.loop(jnp.maximum(count - SLOTS, 0), count)
    def _(i):
        write(i).wait()
