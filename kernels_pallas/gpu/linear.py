"""Linear layers: y = x W^T, above all for few rows, where reading W is what takes the time.

A CTA multiplies some rows (64 to a compute warpgroup) by some of W's rows, which its memory warpgroup streams through a
ring of tiles. Where W has too few rows for every SM, its columns are split too, and the caller adds the parts. How W is
split follows from its shape alone, and each product is accumulated along its columns in one order, so that a row's
result never depends on how many there are.
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

from kernels_pallas.gpu.rows import PARAMS, ROWS, TILED, load, num_sms, store_rows, tiles_of_8

SHARED_MEMORY = 200 * 1024  # bytes that the ring may take
NARROW = 32  # rows of W that a CTA should have at least
WIDE = 160  # rows of W that may be multiplied at a time by few rows of x, for which W should come in many small stages
PANEL = 16  # tiles of x's rows that are multiplied by all of W before the next
COLUMNS = 64  # that tiles in shared memory have
STORE_COST = 6 * 1024  # bytes of shared memory read or written in the time that it takes to store a column of 64 rows


@dataclass(frozen=True)
class LinearConfig:
    """How the work is cut.

    Attributes:
      warpgroups: of 64 rows of x each, in a CTA.
      features: rows of W (of each of its two halves, if gated) multiplied at a time.
      splits: of W's columns.
      depth: columns in one stage of the ring.
      stages: of the ring.
    """

    warpgroups: int
    features: int
    splits: int
    depth: int
    stages: int

    @classmethod
    def of(cls, M: int, F: int, C: int, gated: bool = False) -> "LinearConfig":
        """For x [M, C] and W [F, C] (two such, if gated)."""
        halves, sms = 1 + gated, num_sms()
        splits = 1 if gated else max(1, min(C // 256, sms * NARROW // F))
        widest = (WIDE if M <= ROWS else 256) // halves

        def cost(tile):
            """Bytes of shared memory that the busiest SM writes and reads: it binds where memory does not."""
            warpgroups, features = tile
            rows, columns = ROWS * warpgroups, halves * features
            rounds = pl.cdiv(pl.cdiv(M, rows) * (F // features) * splits, sms)
            moved = (rows + columns) + warpgroups * (ROWS + columns)
            return rounds * (moved * 2 * C // splits + columns * STORE_COST)

        few = M <= 2 * ROWS  # memory binds: stages should have much of W, so better read it once for each 64 rows
        tiles = ((w, f) for w in ((1,) if few else (1, 2)) for f in range(8, widest + 1, 8) if F % f == 0)
        warpgroups, features = min(tiles, key=cost)
        column = (ROWS * warpgroups + halves * features) * 2
        # Longer pieces of W's rows are read faster, if beside the stages that are worked on some are on their way.
        depth = 128 if few and C % 128 == 0 and column * 128 * 4 <= SHARED_MEMORY else 64
        return cls(warpgroups, features, splits, depth, min(SHARED_MEMORY // (column * depth), 12))


def unsupported(x, kernel, activation: str | None = None) -> str | None:
    """What the kernel cannot do in these shapes, in words, or None."""
    (rows, C), halves = kernel.shape, 1 if activation is None else 2
    if x.dtype != kernel.dtype or x.dtype not in (jnp.bfloat16, jnp.float16):
        return f"linear layers of {x.dtype}"
    if C % 64 or rows % (8 * halves):
        return f"a linear layer from {C} to {rows // halves} features"
    if activation == "gelu":  # needs erf, which Mosaic has not
        return "gelu of the error function"
    return None


def slower_than_xla(x, kernel, activation: str | None = None) -> bool:
    """As measured on an H100. With very few rows XLA's sums over the rows of a small W are faster. With many its
    products are as fast, but not with an activation, which it has in a kernel of its own; and with somewhat many faster
    for a large W, sooner if the last tile of x is not full: the copy engine is slow behind x's end."""
    M, (rows, C) = x.shape[0], kernel.shape
    if M > 256:
        return activation is None or LinearConfig.of(M, rows // 2, C, gated=True).features < 64
    large = 1 << (25 if M % (2 * ROWS) else 28)
    return (M < 8 and kernel.size < 1 << 24) or rows > 65536 or (M > 128 and kernel.size > large)


class Norm(NamedTuple):
    """An RMS norm of x on its way into a product: of x times `offset` + weight [C], row by row over its rms."""

    weight: jax.Array
    epsilon: float
    offset: float


def adds_and_norms(x, kernel) -> bool:
    """Whether a product should add to the residual stream and norm what it reads of it: not if its columns are split,
    and with many rows kernels of their own are not what takes the time. Weights times float16 could overflow."""
    return x.dtype == jnp.bfloat16 and len(x) <= 256 and LinearConfig.of(len(x), *kernel.shape).splits == 1


def linear_parts(x, kernel, *, out_dtype=None, norm: Norm | None = None, onto=None, config: LinearConfig | None = None):
    """x [M, C] W^T for W [F, C], accumulated in float32.

    Args:
      norm: is to be applied to x.
      onto: [M, F] of out_dtype, which the product, rounded to that, is added to. There must be one split.

    Returns:
      [1, M, F] in out_dtype, or float32[splits, M, F] to be added up, where LinearConfig.of splits W's columns.

    C must be a multiple of 64 and F of 8; x and W have the same 16-bit dtype.
    """
    config = config or LinearConfig.of(x.shape[0], *kernel.shape)
    out_dtype = jnp.dtype(jnp.float32 if config.splits > 1 else (out_dtype or x.dtype))
    weight, *how = norm or (None, 0.0, 0.0)
    return _call(x, kernel[None], weight, onto, out_dtype=out_dtype, activation=None, norm=tuple(how), config=config)


def gated_linear(
    x, kernel, activation: Callable, *, norm: Norm | None = None, config: LinearConfig | None = None
) -> jax.Array:
    """activation(x A^T) * (x B^T) for kernel [2F, C], of which A is the first half of the rows and B the second; with
    x's norm, if there is one.

    Returns:
      [M, F] in x's dtype.
    """
    F, C = kernel.shape[0] // 2, kernel.shape[1]
    config = config or LinearConfig.of(x.shape[0], F, C, gated=True)
    (weight, *how), kernel = norm or (None, 0.0, 0.0), kernel.reshape(2, F, C)
    return _call(x, kernel, weight, None, out_dtype=x.dtype, activation=activation, norm=tuple(how), config=config)[0]


@partial(jax.jit, static_argnames=("out_dtype", "activation", "norm", "config"))
def _call(x, kernel, weight, onto, *, out_dtype, activation, norm, config: LinearConfig):
    """x [M, C], kernel [halves, F, C] -> [splits, M, F]. weight: of a norm, if there is one; norm: epsilon, offset."""
    M, C = x.shape
    halves, F, _ = kernel.shape
    full = plgpu.Barrier(num_arrivals=config.warpgroups + halves, num_barriers=config.stages)
    free = plgpu.Barrier(num_arrivals=config.warpgroups, num_barriers=config.stages)
    row_tiles = pl.cdiv(M, ROWS * config.warpgroups)
    items = row_tiles * (F // config.features) * config.splits
    return plgpu.kernel(
        partial(_linear, row_tiles=row_tiles, items=items, activation=activation, norm=norm, config=config),
        out_type=jax.ShapeDtypeStruct((config.splits, M, F), out_dtype),
        grid=(min(items, num_sms()),),
        grid_names=("cta",),
        num_threads=config.warpgroups + 1,
        thread_name="warpgroup",
        kernel_name="linear",
        scratch_types=[
            plgpu.SMEM((config.stages, config.warpgroups, ROWS, config.depth), x.dtype, transforms=TILED),
            plgpu.SMEM((config.stages, halves * config.features, config.depth), x.dtype, transforms=TILED),
            *(full, free),
        ],
        compiler_params=PARAMS,
    )(tiles_of_8(x), kernel, () if weight is None else (weight,), () if onto is None else (onto,))


class Item(NamedTuple):
    """Some rows of x times some of W's, over one of the splits of C.

    Attributes:
      row, feature: the first of each.
      split: which.
      begin, end: its stages along C.
    """

    row: jax.Array
    split: jax.Array
    feature: jax.Array
    begin: jax.Array
    end: jax.Array

    @property
    def length(self):
        return self.end - self.begin


@dataclass(frozen=True)
class Items:
    """A CTA's share of the work.

    Attributes:
      config: how the work is cut.
      row_tiles: of x, of ROWS rows for each warpgroup.
      F, C: W's rows and columns.
      first, stride: the number of the CTA's first item, and from one to the next. Neighbours have the same rows of W,
        and PANEL tiles of x stay in the L2 until all of W has passed.
      count: of its items.
    """

    config: LinearConfig
    row_tiles: int
    F: int
    C: int
    first: jax.Array
    stride: jax.Array
    count: jax.Array

    def read(self, i) -> Item:
        """The CTA's item i."""
        config, splits = self.config, jnp.int32(self.config.splits)
        unit = 64 if self.C % 128 else 128  # of which splits have a whole number, whatever the depth of stages
        i, panel = self.first + i * self.stride, jnp.int32(PANEL * (self.F // config.features) * config.splits)
        first_row = lax.div(i, panel) * PANEL
        rows, i = jnp.minimum(self.row_tiles - first_row, PANEL), lax.rem(i, panel)
        row = (first_row + lax.rem(i, rows)) * (ROWS * config.warpgroups)
        i = lax.div(i, rows)
        split = lax.rem(i, splits)
        feature = lax.div(i, splits) * jnp.int32(config.features)
        begin, end = (lax.div((split + j) * (self.C // unit), splits) * (unit // config.depth) for j in range(2))
        return Item(row, split, feature, begin, end)

    def for_each(self, visit) -> None:
        """Calls visit(item, stages before)."""

        def step(i, done):
            item = self.read(i)
            visit(item, done)
            return done + item.length

        lax.fori_loop(0, self.count, step, jnp.int32(0))


class Ring(NamedTuple):
    """Stages on their way to a CTA.

    Attributes:
      x: [stages, warpgroups, ROWS, depth] in shared memory.
      w: [stages, halves * features, depth].
      ready, free: a barrier for each stage.
    """

    x: jax.Ref
    w: Any
    ready: Any
    free: Any


@dataclass(frozen=True)
class Ends:
    """What is done to x before a product, and after it.

    Attributes:
      weight: [C], of a norm; empty: there is none.
      epsilon, offset: of the norm.
      activation: of the first half of the products, which the second is multiplied by, or None.
      onto: [M, F], to be added to; or empty.
      out: [splits, M, F].
    """

    weight: tuple[jax.Ref, ...]
    epsilon: float
    offset: float
    activation: Callable | None
    onto: tuple[jax.Ref, ...]
    out: jax.Ref

    def scales(self, column):
        """What x's columns from `column` on, as many as a tile has, are multiplied by for the norm."""
        if not self.weight:
            return None
        scale = load(self.weight[0].at[pl.ds(column, COLUMNS)], (COLUMNS,), plgpu.Layout.WGMMA.reduce(0))
        return lax.broadcast_in_dim(scale.astype(jnp.float32) + self.offset, (ROWS, COLUMNS), [1])

    def before(self, item: "Item", row, features: int):
        """What the item's result for the rows from `row` on is added to, asked for early."""
        if not self.onto:
            return None
        columns = self.onto[0].at[:, pl.ds(item.feature, features)]
        return load(columns, (ROWS, features), plgpu.Layout.WGMMA, self.out.shape[1], row)

    def store(self, item: "Item", row, found, squares, before) -> None:
        """found: float32[ROWS, columns]; squares: each row's sum of them, for the norm."""
        if self.weight:
            inverse = lax.rsqrt(squares * (1 / self.weight[0].shape[0]) + self.epsilon)
            found = found * lax.broadcast_in_dim(inverse, found.shape, [0])
        features = found.shape[1] if self.activation is None else found.shape[1] // 2
        y = found if self.activation is None else self.activation(found[:, :features]) * found[:, features:]
        y = y.astype(self.out.dtype)
        if before is not None:
            y = (y.astype(jnp.float32) + before.astype(jnp.float32)).astype(y.dtype)
        place = self.out.at[item.split, :, pl.ds(item.feature, features)]
        store_rows(place, y, self.out.shape[1] - row, to=row)


def _linear(x, w, weight, onto, out, *ring, row_tiles, items, activation, norm, config):
    """The kernel: the warpgroups of a CTA multiply, but the last, which copies for them."""
    me = lax.axis_index("warpgroup")
    cta, ctas = lax.axis_index("cta"), jnp.int32(lax.axis_size("cta"))
    (_, F, C), count = w.shape, lax.div(items - cta + ctas - 1, ctas)
    mine, (epsilon, offset) = Items(config, row_tiles, F, C, cta, ctas, count), norm

    @pl.when(me < config.warpgroups)
    def multiply():
        if config.warpgroups == 2:
            plgpu.set_max_registers(232, action="increase")
        mine.for_each(partial(_multiply, me, Ring(*ring), Ends(weight, epsilon, offset, activation, onto, out)))

    @pl.when(me == config.warpgroups)
    def copy():
        if config.warpgroups == 2:
            plgpu.set_max_registers(40, action="decrease")
        mine.for_each(partial(_copy, x, w, Ring(*ring)))


def _multiply(me, ring: Ring, ends: Ends, item: Item, done) -> None:
    """Stores warpgroup `me`'s rows of the item's product; its stages come `done` stages after the CTA's first."""
    stages, columns, _ = ring.w.shape
    row, last = item.row + me * ROWS, item.length - 1
    before = ends.before(item, row, columns if ends.activation is None else columns // 2)

    def release(step):
        plgpu.barrier_arrive(ring.free.at[lax.rem(done + step, jnp.int32(stages))])

    def sums(acc):
        def stage(k, squares):
            slot = lax.rem(done + k, jnp.int32(stages))
            if ends.weight:
                return _multiply_normed(acc, ring, slot, me, ends, item.begin + k, squares)
            plgpu.barrier_wait(ring.ready.at[slot])
            plgpu.wgmma(acc, ring.x.at[slot, me], ring.w.at[slot].transpose((1, 0)))
            plgpu.wgmma_wait(1)
            pl.when(k > 0)(lambda: release(k - 1))
            return None

        zeros = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), plgpu.Layout.WGMMA.reduce(1))
        squares = lax.fori_loop(0, item.length, stage, zeros if ends.weight else None)
        return acc[...], squares

    found, squares = pl.run_scoped(sums, plgpu.ACC((ROWS, columns), jnp.float32))
    if not ends.weight:
        release(last)
    ends.store(item, row, found, squares, before)


def _multiply_normed(acc, ring: Ring, slot, me, ends: Ends, stage, squares):
    """Adds the products of a stage of normed x to acc, which are still to be divided by each row's rms; returns the
    rows' sums of squares, with those of the stage. Squares are added by COLUMNS at a time, whatever the stages are."""
    depth = ring.x.shape[-1]
    scales = [ends.scales(stage * depth + begin) for begin in range(0, depth, COLUMNS)]
    plgpu.barrier_wait(ring.ready.at[slot])
    for i, scale in enumerate(scales):
        part = pl.ds(i * COLUMNS, COLUMNS)
        x = plgpu.load(ring.x.at[slot, me, :, part], layout=plgpu.Layout.WGMMA).astype(jnp.float32)
        squares += (x * x).sum(axis=1)
        plgpu.wgmma(acc, (x * scale).astype(ring.x.dtype), ring.w.at[slot, :, part].transpose((1, 0)))
    plgpu.wgmma_wait(0)
    plgpu.barrier_arrive(ring.free.at[slot])
    return squares


def _copy(x, w, ring: Ring, item: Item, done) -> None:
    """Copies the item's stages of x [M, C] and w [halves, F, C] into the ring, as soon as they are free there."""
    (stages, warpgroups, _, depth), halves = ring.x.shape, w.shape[0]
    stages, features, fetched = jnp.int32(stages), ring.w.shape[1] // halves, min(ROWS, x.shape[0])

    def stage(k, _):
        slot = lax.rem(done + k, stages)
        columns = pl.ds((item.begin + k) * depth, depth)
        pl.when(done + k >= stages)(lambda: plgpu.barrier_wait(ring.free.at[slot]))
        for half in range(halves):
            rows = w.at[half, pl.ds(item.feature, features), columns]
            plgpu.copy_gmem_to_smem(rows, ring.w.at[slot, pl.ds(half * features, features)], ring.ready.at[slot])
        for g in range(warpgroups):
            rows = x.at[pl.ds(item.row + g * ROWS, fetched), columns]
            plgpu.copy_gmem_to_smem(rows, ring.x.at[slot, g, pl.ds(0, fetched)], ring.ready.at[slot])

    lax.fori_loop(0, item.length, stage, None)
