"""Decode attention: one query token for each sequence over its paged keys and values.

Decode is bound by memory, so everything here serves one end: keep copies of pages in flight on every SM. A sequence
is cut into splits (flash decoding), sized by its own length alone, so that its result never depends on the rest of
the batch. The grid is persistent: each worker takes (sequence, key/value head, split) items off a list; its memory
warpgroup copies pages into a ring of tiles, running ahead from one item into the next, and its compute warpgroup
multiplies. The G query heads that share a key/value head are the first rows of wgmma's 64; the other rows are computed
for nothing and never stored.

A second kernel merges the splits. In large batches there is none: a worker has a run of items, by their tiles as long
as any other's of its wave of CTAs, or whole sequences and heads where there are about as many as workers. If it has a
sequence's first split, it merges those that follow as it goes, and writes the result if it has all of them; of several
workers that have some, the last to be done merges what they found. Which splits are merged where does not change a bit:
they are added in one order, and their maxima are rounded to whole numbers, so that what aligns them is a power of two,
an exact factor.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from kernels_pallas.attention import new_arrivals
from kernels_pallas.gpu.arrivals import add_to
from kernels_pallas.gpu.decode_inputs import Projected, Queries, empty, whole
from kernels_pallas.gpu.decode_work import TILE, Cuts, DecodeConfig, Item, list_work, share_work
from kernels_pallas.gpu.merge import Sinks, Unfinished, clear, merge, merge_splits, reciprocal, stored_rows
from kernels_pallas.gpu.rows import (
    LOG2E,
    PARAMS,
    ROWS,
    TILED,
    block_at,
    load_column,
    num_sms,
    store_column,
    store_rows,
)


@partial(jax.jit, static_argnames=("scale", "window", "soft_cap", "config"))
def decode_attention(
    q, keys, values, kv_lens, block_tables, sinks=None, arrivals=None, *, scale, window=None, soft_cap=None, config=None
):
    """Attends with one query token a sequence, the last of its kv_lens tokens, which are all cached.

    Args:
      q: [S, H, D], of the cache's dtype (bfloat16 or float16); D is 64, 128 or 256.
      keys, values: [B, K, N, D] with N a power of two of at least 8; H / K is at most 16.
      kv_lens: int32[S]; 0 gives zeros.
      block_tables: int32[S, P].
      sinks: float32[H] or None.
      arrivals: int32[at least S, K] of zeros, which it leaves so; None: it makes its own.
      scale, window, soft_cap: see kernels_pallas.attention.

    Returns:
      [S, H, D] in q's dtype.
    """
    _, H, D = q.shape
    G = H // keys.shape[1]

    def make_inputs(q, cache, block_tables, tile):
        return Queries(q, tile, G)

    logits = partial(logits_of, scale=scale, window=window, soft_cap=soft_cap)
    batch = kv_lens, block_tables, sinks, arrivals
    out = _call(make_inputs, q, (keys, values), *batch, G, logits, config or DecodeConfig.of(D))
    return out.reshape(-1, H, D)


@partial(jax.jit, static_argnames=("num_heads", "epsilon", "norm_offset", "scale", "window", "soft_cap", "config"))
def decode_projected(
    parts, tables, norms, cache, kv_lens, block_tables, sinks=None, arrivals=None,
    *, num_heads, epsilon, norm_offset, scale, window=None, soft_cap=None, config=None,
):  # fmt: skip
    """`rotate_and_write` and `decode_attention` in one, for sequences whose newest token is in the row of its sequence:
    where kv_lens is 0, nothing is written.

    Args:
      parts, tables, norms, cache, num_heads, epsilon, norm_offset: see rotate_and_write. The cache is of 16 bits.
      the others: see decode_attention.

    Returns:
      [S, H, D] of the cache's dtype, and the cache, updated in place.
    """
    H, D = num_heads, parts.shape[-1]
    G = H // cache[0].shape[1]
    cache = tuple(map(jax.new_ref, cache))

    def make_inputs(inputs, cache, block_tables, tile):
        parts, rotary, weights = inputs
        projected = Projected(parts, rotary, weights, cache, block_tables, tile, G, epsilon, norm_offset)
        projected.clear()
        return projected

    logits = partial(logits_of, scale=scale, window=window, soft_cap=soft_cap)
    batch = kv_lens, block_tables, sinks, arrivals
    out = _call(make_inputs, (parts, tables, norms or ()), cache, *batch, G, logits, config or DecodeConfig.of(D))
    return out.reshape(-1, H, D), tuple(map(jax.freeze, cache))


def _call(make_inputs, inputs, cache, kv_lens, block_tables, sinks, arrivals, G, logits, config: DecodeConfig):
    """[S, K, G, D]. make_inputs(inputs, cache, block_tables, tile) has what an item begins with, see decode_inputs."""
    K, N, D = cache[0].shape[1:]
    S, dtype = len(kv_lens), cache[0].dtype
    cuts = Cuts.of(kv_lens, block_tables.shape[1] * N, logits.keywords["window"], config)
    work, count = list_work(cuts, kv_lens)
    # With fewer, few workers have several splits of a sequence, and seeing who is last costs more than it saves.
    in_runs = config.runs_from * config.workers * num_sms() < S * K
    shares = share_work(cuts, K, config, num_sms()) if in_runs else count
    ctas = (len(config.waves) if in_runs else 1) * num_sms()
    stored = stored_rows(G, D)
    sinks = None if sinks is None else Sinks.of(sinks)
    parts = [(S, K, cuts.most, stored * D), *[(S, K, cuts.most, stored)] * 2]
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in parts]
    result = jax.ShapeDtypeStruct((S, K, stored * D), dtype)
    if in_runs and arrivals is None:
        arrivals = new_arrivals(S, K, backend="mosaic_gpu")
    *found, out = plgpu.kernel(
        partial(_attend, make_inputs=make_inputs, G=G, config=config, logits=logits),
        out_type=(*shapes, (result,) if in_runs else ()),
        grid=(ctas,),
        grid_names=("cta",),
        num_threads=2 * config.workers,
        thread_name="warpgroup",
        kernel_name="decode_attention",
        scratch_types=_scratch(config, D, N, dtype),
        compiler_params=PARAMS,
    )(work, shares, inputs, cache, block_tables, sinks or (), (cuts.splits, arrivals) if in_runs else ())
    out = out[0] if in_runs else merge_splits(found, cuts.splits, sinks, G, dtype)
    return out.reshape(S, K, stored, D)[:, :, :G]


def _scratch(config: DecodeConfig, D: int, N: int, dtype) -> list:
    """A CTA's queries, keys and values, what its workers are told, and barriers, for full slots and free ones."""
    workers, slots = config.workers, config.workers * config.stages
    queries = plgpu.SMEM((workers, ROWS, D), dtype, transforms=TILED)
    ring = plgpu.SMEM((workers, config.stages, TILE, D), dtype, transforms=TILED)
    full = plgpu.Barrier(num_arrivals=max(1, TILE // N), num_barriers=slots)
    free = plgpu.Barrier(num_barriers=slots)
    return [queries, ring, ring, plgpu.SMEM((workers, 1), jnp.int32), full, full, free, free]


@dataclass(frozen=True)
class Items:
    """A worker's share of the work.

    Attributes:
      work: int32[W, FIELDS], of list_work.
      heads: K.
      in_runs: whether it is a run of items by sequence, head and split; else every so many by sequence, split and head.
      begin, stride: the number of the first item, and from one to the next.
      count: of its items.
    """

    work: jax.Ref
    heads: int
    in_runs: bool
    begin: jax.Array
    stride: jax.Array
    count: jax.Array

    @classmethod
    def of(cls, work, shares, heads: int, worker, workers: int, in_runs: bool) -> "Items":
        """Those of one of so many workers; shares: share_work's if in runs, else int32[1], the rows of the list."""
        if in_runs:
            begin, end, stride = shares[worker], shares[worker + 1], jnp.int32(1)
        else:
            begin, end, stride = worker, shares[0] * heads, jnp.int32(workers)
        return cls(work, heads, in_runs, begin, stride, lax.div(end - begin + stride - 1, stride))

    def read(self, n) -> Item:
        """The worker's item n."""
        read = Item.in_run if self.in_runs else Item.at
        return read(self.work, self.begin + n * self.stride, self.heads)


class Ring(NamedTuple):
    """Tiles of keys, or of values, on their way to a worker.

    Attributes:
      cache: [B, K, N, D] in device memory.
      tiles: [stages, TILE, D] in shared memory.
      ready, free: barriers of those of all workers, this one's from number `base` on.
    """

    cache: jax.Ref
    tiles: jax.Ref
    ready: Any
    free: Any
    base: jax.Array


@dataclass(frozen=True)
class Results:
    """Where what a worker finds goes.

    Attributes:
      parts: float32[S, K, M, R * D] and twice [S, K, M, R], as merge_splits takes them.
      G: rows to store.
    """

    parts: tuple[jax.Ref, ...]
    G: int

    def store(self, item: Item, slot, found) -> None:
        """As part `slot` of the item's sequence and head."""
        place = item.seq, item.head, slot
        store_rows(self.parts[0].at[place], found[0], self.G)
        for ref, value in zip(self.parts[1:], found[1:], strict=True):
            store_column(ref.at[place], value, self.G)


@dataclass(frozen=True)
class MergedResults(Results):
    """Results that workers with runs of items merge.

    Attributes:
      out: [S, K, R * D].
      sinks: empty or float32[H] twice.
      arrivals: int32[any, K], for each sequence and head the splits that have come, and 2^16 times those in part 0.
      told: int32[1] in shared memory, see add_to.
    """

    out: jax.Ref
    sinks: tuple[jax.Ref, ...]
    arrivals: jax.Ref
    told: jax.Ref

    def finish(self, item: Item, found) -> None:
        """Stores the attention of the item's sequence and head, of which all splits were found."""
        attention = _divided(found, self.sinks, item.head * self.G, self.G)
        store_rows(self.out.at[item.seq, item.head], attention.astype(self.out.dtype), self.G)

    def arrive(self, item: Item, count, in_first) -> None:
        """So many of its splits are stored, and so many of these merged in part 0; whoever has the last merges all."""
        mine = self.arrivals.at[item.seq, pl.ds(item.head, 1)]
        come = add_to(mine, self.told, count + (in_first << 16))

        @pl.when((come & 0xFFFF) == item.splits)
        def last():
            mine[0] = jnp.int32(0)
            merge(self.parts, Unfinished(item.seq, item.head, item.splits, come >> 16), self.sinks, self.out, self.G)


def _attend(work, shares, inputs, cache, tables, sinks, runs, *refs, make_inputs, G, config, logits):
    """The kernel: warpgroup w of a CTA multiplies for its worker w, and warpgroup `workers` + w copies for it.

    runs: the sequences' splits, int32[S], and arrivals; empty, as `out` is then, if workers have no runs."""
    *parts, out, q_smem, k_smem, v_smem, told, k_ready, v_ready, k_free, v_free = refs
    warpgroup, (keys, values) = lax.axis_index("warpgroup"), cache
    me = lax.rem(warpgroup, jnp.int32(config.workers))
    worker = me * lax.axis_size("cta") + lax.axis_index("cta")
    workers = jnp.int32(config.workers * lax.axis_size("cta"))
    items = Items.of(work, shares, keys.shape[1], worker, workers, in_runs=bool(runs))
    base = me * jnp.int32(config.stages)
    rings = (
        Ring(keys, k_smem.at[me], k_ready, k_free, base),
        Ring(values, v_smem.at[me], v_ready, v_free, base),
    )

    @pl.when(warpgroup < config.workers)
    def multiply():
        if config.workers > 1:
            plgpu.set_max_registers(208, action="increase")
        results = Results(tuple(parts), G)
        if runs:
            results = MergedResults(tuple(parts), G, out[0], sinks, runs[1], told.at[me])
        _multiply(items, make_inputs(inputs, cache, tables, q_smem.at[me]), rings, results, logits)

    @pl.when(warpgroup >= config.workers)
    def copy():
        if config.workers > 1:
            plgpu.set_max_registers(40, action="decrease")
        _copy(items, rings, tables)
        if runs:
            clear(out[0], runs[0], worker, workers)


def _multiply(items: Items, inputs: Queries | Projected, rings: tuple[Ring, Ring], results: Results, logits) -> None:
    """Attends with the queries of each item, and stores what it finds, merged with what it found before in a run."""
    D = inputs.tile.shape[1]

    def visit(n, carry):
        done, so_far = carry
        item = items.read(n)
        pl.when((n == 0) | (item.split == 0) | (not items.in_runs))(partial(inputs.fetch, item))
        tiles = item.tiles
        step = partial(_attend_to_tile, item._replace(stop=inputs.stop(item)), done, inputs.tile, rings, logits)
        found = lax.fori_loop(0, tiles, step, inputs.begin(item, logits))
        if isinstance(results, MergedResults):
            so_far = _end_in_run(items, n, item, so_far, found, results)
        else:
            results.store(item, item.split, found)
        return done + tiles, so_far

    lax.fori_loop(0, items.count, visit, (jnp.int32(0), list(empty(D)) if items.in_runs else []))


def _attend_to_tile(item: Item, done, queries, rings: tuple[Ring, Ring], logits, t, found):
    """One step of the online softmax, with the queries [ROWS, D]: what is found once the item's tile t is seen, which
    is the worker's tile `done` + t."""
    keys, values = rings
    acc, m, total = found
    slot = lax.rem(done + t, jnp.int32(keys.tiles.shape[0]))
    plgpu.barrier_wait(keys.ready.at[keys.base + slot])

    def multiply(scores):
        plgpu.wgmma(scores, queries, keys.tiles.at[slot].transpose((1, 0)))
        return scores[...]

    scores = pl.run_scoped(multiply, plgpu.ACC((ROWS, TILE), jnp.float32))
    plgpu.barrier_arrive(keys.free.at[keys.base + slot])
    scores = logits(scores, item.first + t * TILE, item.stop, item.length)
    m_new = jnp.maximum(m, whole(scores.max(axis=1)))
    decay = jnp.exp2(m - m_new)
    p = jnp.exp2(scores - lax.broadcast_in_dim(m_new, scores.shape, [0]))
    total = total * decay + p.sum(axis=1)
    acc = acc * lax.broadcast_in_dim(decay, acc.shape, [0])
    plgpu.barrier_wait(values.ready.at[values.base + slot])
    weigh = lambda acc: plgpu.wgmma(acc, p.astype(values.tiles.dtype), values.tiles.at[slot])  # noqa: E731
    acc = pl.run_state(weigh)(plgpu.ACC.init(acc))
    plgpu.barrier_arrive(values.free.at[values.base + slot])
    return acc, m_new, total


def _end_in_run(items: Items, n, item: Item, so_far, found, results: MergedResults):
    """Merges what was found at item n with what was `so_far`, of the splits before it if the worker has them all.

    The merged splits from the first on are stored when no more follow: as the result, if those are all that the
    sequence has, or else as part 0. A split whose first another worker has is a part of its own.
    """
    from_first = n >= item.split
    both = _merge(so_far, found)
    merged = [jnp.where(from_first & (item.split > 0), a, b) for a, b in zip(both, found, strict=True)]
    is_last, ends = item.split + 1 == item.splits, n + 1 == items.count
    complete = from_first & is_last
    stored = ~from_first | (ends & ~complete)
    pl.when(complete)(partial(results.finish, item, merged))

    @pl.when(stored)
    def store():
        results.store(item, jnp.where(from_first, 0, item.split), merged)
        in_first = jnp.where(from_first, item.split + 1, 0)
        pl.when(is_last | ends)(lambda: results.arrive(item, jnp.where(from_first, in_first, n + 1), in_first))

    return merged


def _copy(items: Items, rings: tuple[Ring, Ring], tables) -> None:
    """Copies the tiles of each item into the rings, as soon as their slots are free."""

    def visit(n, done):
        item = items.read(n)
        tiles = item.tiles
        lax.fori_loop(0, tiles, partial(_copy_tile, item, done, rings, tables), None)
        return done + tiles

    lax.fori_loop(0, items.count, visit, jnp.int32(0))


def _copy_tile(item: Item, done, rings: tuple[Ring, Ring], tables, t, _) -> None:
    """Copies the item's tile t, which is the worker's tile `done` + t, from as many pages as it is in."""
    N, stages = rings[0].cache.shape[2], jnp.int32(rings[0].tiles.shape[0])
    slot = lax.rem(done + t, stages)
    token = item.first + t * TILE
    pages = range(max(1, TILE // N))
    slabs = [(block_at(tables, item.seq, token, N, p), item.head, *_rows_of_page(token, N)) for p in pages]
    for ring in rings:
        pl.when(done + t >= stages)(partial(plgpu.barrier_wait, ring.free.at[ring.base + slot]))
        for p, slab in enumerate(slabs):
            rows = pl.ds(p * min(N, TILE), min(N, TILE))
            plgpu.copy_gmem_to_smem(ring.cache.at[slab], ring.tiles.at[slot, rows], ring.ready.at[ring.base + slot])


def _rows_of_page(token, N):
    """A tile may be part of a page."""
    return () if N <= TILE else (pl.ds(lax.rem(token, jnp.int32(N)), TILE),)


def logits_of(scores, token, stop, length, *, scale, window, soft_cap, axis=1):
    """Logits in base 2 of a tile of cached tokens from `token` on, along `axis`, -inf where hidden."""
    if soft_cap is None:
        scores = scores * (scale * LOG2E)
    else:
        tanh = 1 - 2 / (jnp.exp2(scores * (2 * LOG2E * scale / soft_cap)) + 1)
        scores = tanh * (soft_cap * LOG2E)
    position = token + plgpu.broadcasted_iota(jnp.int32, scores.shape, axis, layout=plgpu.Layout.WGMMA)
    visible = position < stop
    if window is not None:
        visible &= position >= length - window
    return jnp.where(visible, scores, -jnp.inf)


def _merge(a, b):
    """Two splits' sums of values, maxima and denominators, as one's."""
    m = jnp.maximum(a[1], b[1])
    weights = [jnp.exp2(x[1] - m) for x in (a, b)]
    scaled = [x[0] * lax.broadcast_in_dim(w, x[0].shape, [0]) for x, w in zip((a, b), weights, strict=True)]
    return scaled[0] + scaled[1], m, a[2] * weights[0] + b[2] * weights[1]


def _divided(found, sinks, first, G):
    """The attention of heads `first` to first + G - 1 from their sums."""
    acc, m, total = found
    if sinks:
        sink_m, sink_total = (load_column(x.at[pl.ds(first, G)], G) for x in sinks)
        m_new = jnp.maximum(m, sink_m)
        decay = jnp.exp2(m - m_new)
        acc, total = acc * lax.broadcast_in_dim(decay, acc.shape, [0]), total * decay
        total = total + jnp.exp2(sink_m - m_new) * sink_total
    return acc * lax.broadcast_in_dim(reciprocal(total), acc.shape, [0])
