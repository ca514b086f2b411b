"""The output head and taking a token, in one: the argmax of x W^T / temperature + noise, with no logits in memory.

A CTA has up to 128 rows of x, takes tile after tile of W's rows (tokens) as gpu/linear.py does, and keeps each row's
best score and its token in registers; what the CTAs found is compared at the end. A tile is a run of tokens and the run
128 further on: they share hashes, and wgmma leaves both in one thread. With more rows, two CTAs form a cluster, whose
copies of W are one. How a score is made never depends on how many rows there are.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from kernels_pallas.gpu.rows import PARAMS, ROWS, TILED, num_sms, store_column, sync_warpgroup, tiles_of_8
from kernels_pallas.noise import PAIR, RUN, gumbel, threefry

SHARED_MEMORY = 200 * 1024  # bytes that the ring may take
COLUMNS = 8  # of logits, from each run, that are looked at together: what the registers hold


@dataclass(frozen=True)
class HeadConfig:
    """How the work is cut.

    Attributes:
      warpgroups: of 64 rows of x each, in a CTA.
      cluster: CTAs of other rows that share their copies of W.
      run: tokens of each of a tile's two runs, a divisor of 128 and of all tokens.
      depth: columns in one stage of the ring.
      stages: of the ring.
    """

    warpgroups: int
    cluster: int
    run: int
    depth: int
    stages: int

    @property
    def rows(self) -> int:
        """Of x, that a cluster has."""
        return ROWS * self.warpgroups * self.cluster

    @classmethod
    def of(cls, M: int, V: int, C: int) -> "HeadConfig":
        """For x [M, C] and W [V, C]."""
        warpgroups, cluster = 1 if M <= ROWS else 2, 1 if M <= 2 * ROWS else 2
        run = 64 if cluster == 1 or V % RUN else RUN
        column = (ROWS * warpgroups + 2 * run) * 2
        depth = 128 if C % 128 == 0 and column * 128 * 4 <= SHARED_MEMORY else 64
        return cls(warpgroups, cluster, run, depth, SHARED_MEMORY // (column * depth))


def unsupported(x, kernel) -> str | None:
    """What the kernel cannot do in these shapes, in words, or None."""
    V, C = kernel.shape
    if x.dtype != kernel.dtype or x.dtype not in (jnp.bfloat16, jnp.float16):
        return f"a head of {x.dtype}"
    if C % 64 or V % 64 or V < PAIR:
        return f"a head from {C} features to {V} tokens"
    return None


@partial(jax.jit, static_argnames="config")
def best_tokens(x, kernel, keys=None, temperature=None, *, config: HeadConfig | None = None) -> jax.Array:
    """int32[M]: of each row, the lowest token with the best score, -1 if there is a NaN.

    Args:
      x: [M, C], of 16 bits; C is a multiple of 64.
      kernel: [V, C], of the same dtype; V is a multiple of 64, from 256 on.
      keys, temperature: uint32[M, 2] and float32[M]. Given, scores are logits / temperature + noise (see
        kernels_pallas.noise) where the temperature is not 0, and logits elsewhere; not given, logits.
    """
    M, (V, C) = x.shape[0], kernel.shape
    config = config or HeadConfig.of(M, V, C)
    groups = pl.cdiv(M, config.rows)
    tiles = pl.cdiv(V, PAIR) * (RUN // config.run)
    clusters = min(max(1, num_sms() // (config.cluster * groups)), tiles)
    padded = groups * config.rows
    drawn = () if keys is None else _of_rows(keys.T, temperature, padded)
    clustered = config.cluster > 1
    free = partial(plgpu.ClusterBarrier, collective_axes=("part",)) if clustered else plgpu.Barrier
    scores, tokens = plgpu.kernel(
        partial(_search, V=V, tiles=tiles, clusters=clusters, config=config),
        out_type=[jax.ShapeDtypeStruct((clusters, padded), dtype) for dtype in (jnp.float32, jnp.int32)],
        grid=(clusters * groups,),
        grid_names=("cluster",),
        cluster=(config.cluster,) if clustered else (),
        cluster_names=("part",) if clustered else (),
        num_threads=config.warpgroups + 1,
        thread_name="warpgroup",
        kernel_name="head",
        scratch_types=[
            plgpu.SMEM((config.stages, config.warpgroups, ROWS, config.depth), x.dtype, transforms=TILED),
            plgpu.SMEM((config.stages, 2, config.run, config.depth), x.dtype, transforms=TILED),
            plgpu.Barrier(num_arrivals=config.warpgroups + 2, num_barriers=config.stages),
            free(num_arrivals=config.warpgroups, num_barriers=config.stages),
        ],
        compiler_params=PARAMS,
    )(tiles_of_8(x), kernel, *drawn)
    return best_of_all(scores, tokens, V)[:M]


def best_of_all(scores, tokens, V: int):
    """int32[M]: of each column the lowest of tokens int32[any, M] that has the best of scores float32[any, M]."""

    def better(a, b):
        is_a = (a[0] > b[0]) | ((a[0] == b[0]) & (a[1] < b[1]))
        return tuple(jnp.where(is_a, x, y) for x, y in zip(a, b, strict=True))

    return lax.reduce((scores, tokens), (-jnp.inf, V), better, (0,))[1]


def _of_rows(keys, temperature, padded):
    """uint32[2, padded] and float32[2, padded]: keys, and what a logit and its noise are multiplied by. They are made
    as one array, by one kernel."""
    is_drawn = temperature > 0
    factors = jnp.stack([1 / jnp.where(is_drawn, temperature, 1), is_drawn.astype(jnp.float32)])
    rows = jnp.concatenate([keys, lax.bitcast_convert_type(factors, jnp.uint32)])
    rows = lax.optimization_barrier(jnp.pad(rows, ((0, 0), (0, padded - rows.shape[1]))))
    return rows[:2], lax.bitcast_convert_type(rows[2:], jnp.float32)


class Ring(NamedTuple):
    """Stages on their way to a CTA.

    Attributes:
      x: [stages, warpgroups, ROWS, depth] in shared memory.
      w: [stages, 2, run, depth], of a tile's two runs.
      ready, free: a barrier for each stage; `free` is of the whole cluster.
    """

    x: jax.Ref
    w: jax.Ref
    ready: Any
    free: Any


@dataclass(frozen=True)
class Tiles:
    """The tiles of W that a cluster takes.

    Attributes:
      run: tokens of each of a tile's two runs.
      length: stages of a tile.
      first, stride: the number of the cluster's first tile, and from one to the next.
      count: of its tiles.
    """

    run: int
    length: int
    first: jax.Array
    stride: int
    count: jax.Array

    def runs(self, i):
        """The first tokens of both runs of the cluster's tile i."""
        tile, parts = self.first + i * self.stride, jnp.int32(RUN // self.run)
        token = lax.div(tile, parts) * PAIR + lax.rem(tile, parts) * self.run
        return token, token + RUN


def _search(x, w, *refs, V, tiles, clusters, config):
    """The kernel: the warpgroups of a CTA multiply and look, but the last, which copies for them."""
    *drawn, scores, tokens, x_smem, w_smem, ready, free = refs
    ring = Ring(x_smem, w_smem, ready, free)
    me, cluster = lax.axis_index("warpgroup"), lax.axis_index("cluster")
    part = lax.axis_index("part") if config.cluster > 1 else 0
    group, first = lax.div(cluster, jnp.int32(clusters)), lax.rem(cluster, jnp.int32(clusters))
    row = group * config.rows + part * (ROWS * config.warpgroups)
    count = lax.div(tiles - first + clusters - 1, jnp.int32(clusters))
    mine = Tiles(config.run, w.shape[1] // config.depth, first, clusters, count)

    @pl.when(me < config.warpgroups)
    def multiply():
        if config.warpgroups > 1:
            plgpu.set_max_registers(232, action="increase")
        my_rows = pl.ds(row + me * ROWS, ROWS)
        of_rows = [[_column(ref.at[i, my_rows]) for i in range(2)] for ref in drawn]
        score, token = _best(_look_at_tiles(me, mine, ring, of_rows, V, config.cluster > 1), V)
        for ref, found in ((scores, score), (tokens, token)):
            store_column(ref.at[first, my_rows], found, ROWS)

    @pl.when(me == config.warpgroups)
    def copy():
        if config.warpgroups > 1:
            plgpu.set_max_registers(40, action="decrease")
        _copy(x, w, row, mine, ring, config.cluster > 1)


def _look_at_tiles(me, tiles: Tiles, ring: Ring, of_rows, V, in_cluster):
    """What `_better` finds for warpgroup `me`'s rows in all tiles. of_rows: the rows' keys and factors, if any."""
    stages = jnp.int32(ring.x.shape[0])

    def release(step):
        if in_cluster:  # where one thread arrives for all
            sync_warpgroup()
        plgpu.barrier_arrive(ring.free.at[lax.rem(step, stages)])

    def multiply(step, *accs):
        def stage(k, _):
            slot = lax.rem(step + k, stages)
            plgpu.barrier_wait(ring.ready.at[slot])
            for i, acc in enumerate(accs):
                plgpu.wgmma(acc, ring.x.at[slot, me], ring.w.at[slot, i].transpose((1, 0)))
            plgpu.wgmma_wait(2)
            pl.when(k > 0)(lambda: release(step + k - 1))

        lax.fori_loop(0, tiles.length, stage, None)
        return [acc[...] for acc in accs]

    def look(i, best):
        step = i * tiles.length
        logits = pl.run_scoped(partial(multiply, step), *[plgpu.ACC((ROWS, tiles.run), jnp.float32)] * 2)
        release(step + tiles.length - 1)
        return _better(best, logits, tiles.runs(i), V, *of_rows)

    worst = _spread(_column_of(-jnp.inf)), _spread(_column_of(0).astype(jnp.int32))
    return lax.fori_loop(0, tiles.count, look, (worst, worst))


def _copy(x, w, row, tiles: Tiles, ring: Ring, in_cluster) -> None:
    """Copies the tiles' stages, and those of x [M, C] from `row` on, into the ring, as soon as they are free there."""
    stages, warpgroups, _, depth = ring.x.shape
    stages, fetched = jnp.int32(stages), min(ROWS, x.shape[0])
    together = ("part",) if in_cluster else None

    def fetch(i, _):
        def stage(k, _):
            step = i * tiles.length + k
            slot, columns = lax.rem(step, stages), pl.ds(k * depth, depth)
            pl.when(step >= stages)(lambda: plgpu.barrier_wait(ring.free.at[slot]))
            for j, token in enumerate(tiles.runs(i)):
                rows = w.at[pl.ds(token, tiles.run), columns]
                plgpu.copy_gmem_to_smem(rows, ring.w.at[slot, j], ring.ready.at[slot], collective_axes=together)
            for g in range(warpgroups):
                rows = x.at[pl.ds(row + g * ROWS, fetched), columns]
                plgpu.copy_gmem_to_smem(rows, ring.x.at[slot, g, pl.ds(0, fetched)], ring.ready.at[slot])

        lax.fori_loop(0, tiles.length, stage, None)

    lax.fori_loop(0, tiles.count, fetch, None)
    if in_cluster:  # the other CTA may still write here

        def drain(step, _):
            plgpu.barrier_wait(ring.free.at[lax.rem(step, stages)])

        end = tiles.count * tiles.length
        lax.fori_loop(jnp.maximum(end - stages, 0), end, drain, None)


def _better(best, logits, firsts, V, keys=None, factors=None):
    """The best scores so far and their tokens, float32 and int32[ROWS, COLUMNS] of each run, after those of a tile,
    logits float32[ROWS, run] of each run. Later tokens are larger ones: equal scores change nothing."""
    best = list(best)
    run = logits[0].shape[1]
    column = plgpu.broadcasted_iota(jnp.int32, (ROWS, COLUMNS), 1, layout=plgpu.Layout.WGMMA)
    for at in range(0, run, COLUMNS):
        scores = [x[:, at : at + COLUMNS] for x in logits]
        if keys is not None:
            counter = lax.div(firsts[0], jnp.int32(PAIR)) * RUN + lax.rem(firsts[0], jnp.int32(PAIR)) + at
            high, low, scale, amount = map(_spread, (*keys, *factors))
            words = threefry(high, low, (column + counter).astype(jnp.uint32))
            scores = [x * scale + gumbel(word) * amount for x, word in zip(scores, words, strict=True)]
        for i, (score, token) in enumerate(best):
            found = jnp.where(firsts[i] < V, scores[i], -jnp.inf)
            best[i] = jnp.maximum(found, score), jnp.where(score >= found, token, firsts[i] + at)
    return tuple(best)


def _best(best, V):
    """float32 and int32[ROWS]: each row's best score and the lowest token that has it; infinity and -1 where a score is
    a NaN, which maxima are then too."""
    column = plgpu.broadcasted_iota(jnp.int32, (ROWS, COLUMNS), 1, layout=plgpu.Layout.WGMMA)
    score = jnp.max(jnp.maximum(best[0][0], best[1][0]), axis=1)
    tokens = [jnp.where(found == _spread(score), token + column, V) for found, token in best]
    token = jnp.min(jnp.minimum(*tokens), axis=1)
    is_nan = score != score
    return jnp.where(is_nan, jnp.inf, score), jnp.where(is_nan, -1, token)


def _column(ref):
    """ref [ROWS] as what can be spread over columns."""
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)


def _column_of(value):
    return plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), plgpu.Layout.WGMMA.reduce(1))


def _spread(column):
    return lax.broadcast_in_dim(column, (ROWS, COLUMNS), [0])
