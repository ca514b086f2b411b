"""Grouped matrix product: rows sorted by group, each group with a matrix of its own (the experts of a sparse layer).

A step with few tokens reads the matrix of each group that has rows once, at memory's pace, and has a handful of rows
for it; a prompt has tiles of rows enough to be bound by the tensor cores. A list of row tiles, made beforehand, says
which rows and which group; each CTA takes (row tile, features) after (row tile, features) from it, its memory
warpgroup running ahead through a ring. The copy engine begins at multiples of 8 rows, so that a tile may have rows of
other groups around its own: they are multiplied too, and not stored.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from kernels_pallas.gpu.rows import PARAMS, ROWS, TILED, num_sms, store_rows, tiles_of_8

SHARED_MEMORY = 200 * 1024  # bytes that the ring may take
FEW = 16  # rows that are copied where a tile has no more: most tiles of a decode step
NARROW = 64  # rows of a matrix in an item of a decode step, at most: items are many, so that SMs end together
ITEM_COST = 24  # rows of a matrix that a CTA could read in the time that an item costs it besides


@dataclass(frozen=True)
class GroupedConfig:
    """How the work is cut.

    Attributes:
      warpgroups: of 64 rows of x each, in a CTA.
      features: rows of a matrix (of each of its two halves, if gated) multiplied at a time.
      depth: columns in one stage of the ring.
      stages: of the ring.
    """

    warpgroups: int
    features: int
    depth: int
    stages: int

    @classmethod
    def of(cls, M: int, X: int, F: int, C: int, gated: bool = False) -> "GroupedConfig":
        """For x [M, C] and X matrices [F, C] (two such each, if gated)."""
        halves, sms = 1 + gated, num_sms()
        many = M >= X * ROWS
        warpgroups, widest = (2, 256 // halves) if many else (1, NARROW // halves)

        def cost(features):
            """Rows of matrices that the busiest SM reads."""
            rounds = pl.cdiv(min(M, X) * (F // features), sms)
            return rounds * (halves * features + ITEM_COST)

        sizes = [n for n in range(8, widest + 1, 8) if F % n == 0]
        features = max(sizes) if many else min(sizes, key=cost)
        column = (ROWS * warpgroups + halves * features) * 2
        depth = 128 if C % 128 == 0 and column * 128 * 4 <= SHARED_MEMORY else 64
        return cls(warpgroups, features, depth, min(SHARED_MEMORY // (column * depth), 8))


def serves(x, weights) -> bool:
    """Whether `grouped_matmul` can take these."""
    _, F, C = weights.shape
    return x.dtype == weights.dtype and x.dtype.itemsize == 2 and C % 64 == 0 and F % 16 == 0


def list_tiles(group_sizes, M: int, rows: int):
    """The tiles of `rows` rows, group by group, each beginning at a multiple of 8.

    Returns int32[W, 4]: the tile's first row, which of its rows are the group's (first, last + 1), and the group; and
    int32[X], how many tiles there are up to each group's end.
    """
    X = group_sizes.shape[0]
    group = jnp.arange(X)
    until = group[:, None] >= group[None, :]
    stop = jnp.sum(jnp.where(until, group_sizes[None, :], 0), axis=1)
    start = stop - group_sizes
    aligned = start // 8 * 8
    tiles = jnp.where(group_sizes > 0, pl.cdiv(stop - aligned, rows), 0)
    through = jnp.sum(jnp.where(until, tiles[None, :], 0), axis=1)
    i = jnp.arange(pl.cdiv(M + 7 * min(X, M), rows) + min(X, M))
    g = jnp.minimum(jnp.sum(through[None, :] <= i[:, None], axis=1), X - 1)
    row = aligned[g] + (i - through[g] + tiles[g]) * rows
    work = jnp.stack([row, start[g] - row, stop[g] - row, g], axis=-1)
    return work.astype(jnp.int32), through.astype(jnp.int32)


@partial(jax.jit, static_argnames=("activation", "config"))
def grouped_matmul(x, weights, group_sizes, activation: Callable | None = None, *, config: GroupedConfig | None = None):
    """Row r of the result is x[r] @ weights[group of r].T, accumulated in float32.

    Args:
      x: [M, C], the rows of group 0 first, then those of group 1 and so on.
      weights: [X, F, C], of x's dtype, which has 16 bits. C is a multiple of 64, F of 16.
      group_sizes: int32[X].
      activation: given, the result is activation(gate) * up instead, where the product is [gate, up].

    Returns:
      [M, F], or [M, F / 2] with an activation, in x's dtype; rows behind the last group are unspecified. A row's
      value depends on the row and its matrix alone.
    """
    M, C = x.shape
    X, F, _ = weights.shape
    halves = 1 if activation is None else 2
    F //= halves
    config = config or GroupedConfig.of(M, X, F, C, halves == 2)
    work, through = list_tiles(group_sizes, M, ROWS * config.warpgroups)
    full = plgpu.Barrier(num_arrivals=config.warpgroups + halves, num_barriers=config.stages)
    free = plgpu.Barrier(num_arrivals=config.warpgroups, num_barriers=config.stages)
    return plgpu.kernel(
        partial(_grouped, activation=activation, config=config),
        out_type=jax.ShapeDtypeStruct((M, F), x.dtype),
        grid=(min(len(work) * (F // config.features), num_sms()),),
        grid_names=("cta",),
        num_threads=config.warpgroups + 1,
        thread_name="warpgroup",
        kernel_name="grouped_matmul",
        scratch_types=[
            plgpu.SMEM((config.stages, config.warpgroups, ROWS, config.depth), x.dtype, transforms=TILED),
            plgpu.SMEM((config.stages, halves, config.features, config.depth), x.dtype, transforms=TILED),
            *(full, free),
        ],
        compiler_params=PARAMS,
    )(work, through, tiles_of_8(x), weights.reshape(X, halves, F, C))


class Item(NamedTuple):
    """A tile of x's rows times some rows of its group's matrix.

    Attributes:
      row: the tile's first in x.
      low, high: which of its rows are the group's, the first and the last + 1.
      group: whose matrix.
      feature: the first row of it.
    """

    row: jax.Array
    low: jax.Array
    high: jax.Array
    group: jax.Array
    feature: jax.Array


@dataclass(frozen=True)
class Items:
    """A CTA's share of the work.

    Attributes:
      work: int32[tiles, 4], of list_tiles.
      features, feature_tiles: rows of a matrix in an item, and items for each tile.
      length: stages of an item.
      first, stride: the number of the CTA's first item, and from one to the next.
      count: of its items.
    """

    work: jax.Ref
    features: int
    feature_tiles: int
    length: int
    first: jax.Array
    stride: jax.Array
    count: jax.Array

    def read(self, i) -> Item:
        """The CTA's item i."""
        i = self.first + i * self.stride
        tile = lax.div(i, jnp.int32(self.feature_tiles))
        row, low, high, group = (self.work[tile, f] for f in range(4))
        return Item(row, low, high, group, lax.rem(i, jnp.int32(self.feature_tiles)) * jnp.int32(self.features))

    def for_each(self, visit) -> None:
        """Calls visit(item, stages before)."""

        def step(i, done):
            visit(self.read(i), done)
            return done + self.length

        lax.fori_loop(0, self.count, step, jnp.int32(0))


class Ring(NamedTuple):
    """Stages on their way to a CTA.

    Attributes:
      x: [stages, warpgroups, ROWS, depth] in shared memory.
      w: [stages, halves, features, depth].
      ready, free: a barrier for each stage.
    """

    x: jax.Ref
    w: jax.Ref
    ready: Any
    free: Any


def _grouped(work, through, x, w, out, *ring, activation, config):
    """The kernel: the warpgroups of a CTA multiply, but the last, which copies for them."""
    X, _, F, C = w.shape
    me = lax.axis_index("warpgroup")
    cta, ctas = lax.axis_index("cta"), jnp.int32(lax.axis_size("cta"))
    feature_tiles, length = F // config.features, C // config.depth
    count = lax.div(through[X - 1] * feature_tiles - cta + ctas - 1, ctas)
    mine = Items(work, config.features, feature_tiles, length, cta, ctas, count)

    @pl.when(me < config.warpgroups)
    def multiply():
        if config.warpgroups > 1:
            plgpu.set_max_registers(232, action="increase")
        mine.for_each(partial(_multiply, me, Ring(*ring), out, activation, length))

    @pl.when(me == config.warpgroups)
    def copy():
        if config.warpgroups > 1:
            plgpu.set_max_registers(40, action="decrease")
        mine.for_each(partial(_copy, x, w, Ring(*ring), length))


def _multiply(me, ring: Ring, out, activation, length: int, item: Item, done) -> None:
    """Stores warpgroup `me`'s rows of the item's product in out [M, F]; its stages come `done` stages after the CTA's
    first."""
    stages, warpgroups = jnp.int32(ring.x.shape[0]), ring.x.shape[1]
    _, halves, features, _ = ring.w.shape
    low, high, row = item.low - me * ROWS, item.high - me * ROWS, item.row + me * ROWS
    multiplied = jnp.where(high > 0, length, 0)  # a group's last tile may have no rows for this warpgroup

    def sums(*accs):
        def stage(k, _):
            slot = lax.rem(done + k, stages)
            plgpu.barrier_wait(ring.ready.at[slot])
            for half, acc in enumerate(accs):
                plgpu.wgmma(acc, ring.x.at[slot, me], ring.w.at[slot, half].transpose((1, 0)))
            plgpu.wgmma_wait(halves)
            pl.when(k > 0)(lambda: plgpu.barrier_arrive(ring.free.at[lax.rem(done + k - 1, stages)]))

        lax.fori_loop(0, multiplied, stage, None)
        return [acc[...] for acc in accs]

    def skip(k, _):
        slot = lax.rem(done + k, stages)
        plgpu.barrier_wait(ring.ready.at[slot])
        plgpu.barrier_arrive(ring.free.at[slot])

    found = pl.run_scoped(sums, *[plgpu.ACC((ROWS, features), jnp.float32)] * halves)
    pl.when(high > 0)(lambda: plgpu.barrier_arrive(ring.free.at[lax.rem(done + length - 1, stages)]))
    if warpgroups > 1:
        lax.fori_loop(multiplied, length, skip, None)
    y = found[0] if activation is None else activation(found[0]) * found[1]
    store_rows(out.at[:, pl.ds(item.feature, features)], y.astype(out.dtype), high, low, to=row)


def _copy(x, w, ring: Ring, length: int, item: Item, done) -> None:
    """Copies the item's stages of x [M, C] and w [X, halves, F, C] into the ring, as soon as they are free there."""
    (stages, warpgroups, _, depth), (halves, features) = ring.x.shape, ring.w.shape[1:3]
    stages = jnp.int32(stages)

    def stage(k, _):
        slot, columns = lax.rem(done + k, stages), pl.ds(k * depth, depth)
        pl.when(done + k >= stages)(lambda: plgpu.barrier_wait(ring.free.at[slot]))
        for half in range(halves):
            rows = w.at[item.group, half, pl.ds(item.feature, features), columns]
            plgpu.copy_gmem_to_smem(rows, ring.w.at[slot, half], ring.ready.at[slot])
        for g in range(warpgroups):

            def copy_rows(size, g=g):
                size = min(size, x.shape[0])
                rows = x.at[pl.ds(item.row + g * ROWS, size), columns]
                plgpu.copy_gmem_to_smem(rows, ring.x.at[slot, g, pl.ds(0, size)], ring.ready.at[slot])

            few = item.high - g * ROWS <= FEW
            pl.when(few)(partial(copy_rows, FEW))
            pl.when(~few)(partial(copy_rows, ROWS))

    lax.fori_loop(0, length, stage, None)
