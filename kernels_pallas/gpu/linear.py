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

from kernels_pallas.gpu.linear_work import Item, Items, LinearConfig
from kernels_pallas.gpu.rows import PARAMS, ROWS, TILED, load, num_sms, store_column, store_rows, tiles_of_8


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
    """As measured on an H100. With very few rows XLA's sums over the rows of W are faster. With many its products are
    as fast, but not with an activation, which it has in a kernel of its own; and with somewhat many faster for a large
    W, sooner if the last tile of x is not full: the copy engine is slow behind x's end."""
    M, rows = x.shape[0], kernel.shape[0]
    if M > 256:
        return activation is None or all(rows // 2 % features for features in range(64, 129, 8))
    large = 1 << (25 if M % ROWS else 28)
    return M < 8 or rows > 65536 or (M > 128 and kernel.size > large)


class Rms(NamedTuple):
    """What the rows of a normed x, at most 256, are still to be divided by.

    Attributes:
      squares: float32[M, any multiple of 8], whose sums are those of the squares of each row.
      epsilon: of the norm.
    """

    squares: jax.Array | None
    epsilon: float


WHOLE = Rms(None, 0.0)  # nothing is left to be divided


def can_add(x, kernel) -> bool:
    """Whether `add_linear` serves, and is better than a kernel that adds and norms: not if columns are split, nor with
    more than 128 rows (a layer of Llama-3.1-8B takes 2 us less with 64 rows, 4 more with 256). float16 times the
    weights of a norm could overflow."""
    if x.dtype != jnp.bfloat16 or len(x) > 2 * ROWS:
        return False
    config, first = (LinearConfig.of(M, *kernel.shape) for M in (len(x), 1))
    parts = kernel.shape[0] // first.features
    return config.splits == 1 and config.features % first.features == 0 and parts % 8 == 0


def linear_parts(x, kernel, *, out_dtype=None, rms: Rms = WHOLE, config: LinearConfig | None = None):
    """x [M, C] W^T for W [F, C], accumulated in float32; with `rms`, divided by that.

    Returns:
      [1, M, F] in out_dtype, or float32[splits, M, F] to be added up, where LinearConfig.of splits W's columns.

    C must be a multiple of 64 and F of 8; x and W have the same 16-bit dtype.
    """
    config = config or LinearConfig.of(x.shape[0], *kernel.shape)
    out_dtype = jnp.dtype(jnp.float32 if config.splits > 1 else (out_dtype or x.dtype))
    return _call(x, kernel[None], *rms, out_dtype=out_dtype, config=config)[0]


def gated_linear(x, kernel, activation: Callable, *, rms: Rms = WHOLE, config: LinearConfig | None = None):
    """activation(x A^T) * (x B^T) for kernel [2F, C], of which A is the first half of the rows and B the second; with
    `rms`, of products divided by that.

    Returns:
      [M, F] in x's dtype.
    """
    F, C = kernel.shape[0] // 2, kernel.shape[1]
    config = config or LinearConfig.of(x.shape[0], F, C, gated=True)
    kernel = kernel.reshape(2, F, C)
    return _call(x, kernel, *rms, out_dtype=x.dtype, activation=activation, config=config)[0][0]


def add_linear(total, x, kernel, weight, offset: float):
    """total [M, F] + x [M, C] W^T for W [F, C], and what the next product takes for the RMS norm of that, which has
    `offset` + weight [F].

    Returns:
      The sum, the sum times the weights, [M, F] both, and float32[M, any], what the sum's squares add up to.
    """
    config, first = (LinearConfig.of(M, *kernel.shape) for M in (len(x), 1))
    options = {"offset": offset, "counted": first.features, "config": config}
    return _call(x, kernel[None], *WHOLE, (total, weight), out_dtype=total.dtype, **options)


@partial(jax.jit, static_argnames=("epsilon", "out_dtype", "activation", "offset", "counted", "config"))
def _call(
    x, kernel, squares, epsilon, onto=(), *, out_dtype, activation=None, offset=0.0, counted=0, config: LinearConfig
):
    """x [M, C], kernel [halves, F, C] -> [splits, M, F], or `add_linear`'s, if there is something to add to; there, the
    squares of `counted` features at a time are added up."""
    M, C = x.shape
    halves, F, _ = kernel.shape
    full = plgpu.Barrier(num_arrivals=config.warpgroups + halves, num_barriers=config.stages)
    free = plgpu.Barrier(num_arrivals=config.warpgroups, num_barriers=config.stages)
    row_tiles = pl.cdiv(M, ROWS * config.warpgroups)
    items = row_tiles * (F // config.features) * config.splits
    shapes = (
        [((M, F), out_dtype)] * 2 + [((M, F // counted), jnp.float32)] if onto else [((config.splits, M, F), out_dtype)]
    )
    make_ends = partial(Ends, epsilon=epsilon, activation=activation, offset=offset, counted=counted)
    return plgpu.kernel(
        partial(_linear, row_tiles=row_tiles, items=items, make_ends=make_ends, config=config),
        out_type=[jax.ShapeDtypeStruct(*shape) for shape in shapes],
        grid=(min(items, num_sms() // row_tiles * row_tiles if squares is not None else num_sms()),),
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
    )(tiles_of_8(x), kernel, () if squares is None else (squares,), onto)


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
    """What becomes of products.

    Attributes:
      squares: float32[M, any], see Rms, or empty.
      onto: [M, F], to be added to, and the weights [F] of the norm that follows; or empty.
      outs: [splits, M, F], or what add_linear returns.
      epsilon: see Rms.
      activation: of the first half of the products, which the second is multiplied by, or None.
      offset, counted: see _call.
    """

    squares: tuple[jax.Ref, ...]
    onto: tuple[jax.Ref, ...]
    outs: tuple[jax.Ref, ...]
    epsilon: float
    activation: Callable | None
    offset: float
    counted: int

    def inverse(self, row, C: int):
        """What the products of the rows from `row` on are to be multiplied by, float32[ROWS], or None."""
        if not self.squares:
            return None
        place, shape = self.squares[0], (ROWS, self.squares[0].shape[1])
        squares = load(place, shape, plgpu.Layout.WGMMA, self.outs[0].shape[-2], row).sum(axis=1)
        return lax.rsqrt(squares * (1 / C) + self.epsilon)

    def ask(self, item: Item, row, columns: int) -> list:
        """What the item's rows from `row` on are to be added to, and the norm's weights, asked for before the
        products."""
        if not self.onto:
            return []
        features = pl.ds(item.feature, columns)
        weight = load(self.onto[1].at[features], (columns,), plgpu.Layout.WGMMA.reduce(0)).astype(jnp.float32)
        total = load(self.onto[0].at[:, features], (ROWS, columns), plgpu.Layout.WGMMA, self.outs[0].shape[-2], row)
        return [total, weight + self.offset]

    def store(self, item: Item, row, products, inverse, *onto) -> None:
        """products: float32[ROWS, columns]; the rest is what `inverse` and `ask` have found."""
        if inverse is not None:
            products *= lax.broadcast_in_dim(inverse, products.shape, [0])
        features = products.shape[1] if self.activation is None else products.shape[1] // 2
        y = products if self.activation is None else self.activation(products[:, :features]) * products[:, features:]
        y = y.astype(self.outs[0].dtype)
        if onto:
            self._store_sum(item, row, y, *onto)
        else:
            self._store(self.outs[0], item, row, y, item.split)

    def _store(self, out, item: Item, row, y, *split) -> None:
        store_rows(out.at[*split, :, pl.ds(item.feature, y.shape[1])], y, out.shape[-2] - row, to=row)

    def _store_sum(self, item: Item, row, y, total, weight) -> None:
        out, scaled, squares = self.outs
        y = (y.astype(jnp.float32) + total.astype(jnp.float32)).astype(out.dtype)
        self._store(out, item, row, y)
        wide, first = y.astype(jnp.float32), lax.div(item.feature, jnp.int32(self.counted))
        self._store(scaled, item, row, (wide * lax.broadcast_in_dim(weight, wide.shape, [1])).astype(out.dtype))
        for i in range(wide.shape[1] // self.counted):
            some = wide[:, i * self.counted : (i + 1) * self.counted]
            store_column(squares.at[pl.ds(row, ROWS), first + i], (some * some).sum(axis=1), out.shape[0] - row)


def _linear(x, w, squares, onto, *refs, row_tiles, items, make_ends, config):
    """The kernel: the warpgroups of a CTA multiply, but the last, which copies for them."""
    *outs, x_smem, w_smem, ready, free = refs
    ring, ends = Ring(x_smem, w_smem, ready, free), make_ends(squares, onto, tuple(outs))
    me = lax.axis_index("warpgroup")
    cta, ctas = lax.axis_index("cta"), jnp.int32(lax.axis_size("cta"))
    count = lax.div(items - cta + ctas - 1, ctas)
    mine = Items(config, row_tiles, w.shape[1], w.shape[2], cta, ctas, count)

    @pl.when(me < config.warpgroups)
    def multiply():
        if config.warpgroups == 2:
            plgpu.set_max_registers(232, action="increase")
        inverse = ends.inverse(mine.read(0).row + me * ROWS, w.shape[2])  # all of a CTA's items have the same rows
        mine.for_each(partial(_multiply, me, ring, ends, inverse))

    @pl.when(me == config.warpgroups)
    def copy():
        if config.warpgroups == 2:
            plgpu.set_max_registers(40, action="decrease")
        mine.for_each(partial(_copy, x, w, ring))


def _multiply(me, ring: Ring, ends: Ends, inverse, item: Item, done) -> None:
    """Stores what becomes of warpgroup `me`'s rows of the item's product; its stages come `done` stages after the CTA's
    first."""
    stages, columns, _ = ring.w.shape
    stages, row = jnp.int32(stages), item.row + me * ROWS
    asked = ends.ask(item, row, columns)

    def sums(acc):
        def stage(k, _):
            slot = lax.rem(done + k, stages)
            plgpu.barrier_wait(ring.ready.at[slot])
            plgpu.wgmma(acc, ring.x.at[slot, me], ring.w.at[slot].transpose((1, 0)))
            plgpu.wgmma_wait(1)
            pl.when(k > 0)(lambda: plgpu.barrier_arrive(ring.free.at[lax.rem(done + k - 1, stages)]))

        lax.fori_loop(0, item.length, stage, None)
        return acc[...]

    products = pl.run_scoped(sums, plgpu.ACC((ROWS, columns), jnp.float32))
    plgpu.barrier_arrive(ring.free.at[lax.rem(done + item.length - 1, stages)])
    ends.store(item, row, products, inverse, *asked)


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
