"""The attention kernel: flash attention (arXiv 2205.14135) of ragged queries over a paged cache.

Queries are cut into tiles, one a grid step. What of a sequence lies in a tile is a piece, which attends to its cached
tokens chunk by chunk, in the order in which `fetch` brings them.
"""

from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.tpu.fetch import CURSORS, Batch, Pieces, Ring
from kernels_pallas.tpu.layout import LANES, STAGES, Blocks, keep_in_hbm, vmem_limit

MASKED = -1e30  # finite, so that a fully masked row yields no NaN


class Options(NamedTuple):
    scale: float
    window: int | None
    soft_cap: float | None
    value_start: int  # lane of a cache row where what is summed starts


@partial(jax.jit, static_argnames=("options", "blocks"))
def attend(
    batch: Batch,
    q: jax.Array,
    cache: tuple[jax.Array, ...],
    sinks: jax.Array | None,
    *,
    options: Options,
    blocks: Blocks,
) -> jax.Array:
    """Attention of the sequences in `batch.seqs`; other rows are zeros.

    Args:
      q: for decodes [T, K, G, W], token s being sequence s's only one; else [K, G, T, W].
      cache: pages [B, K, N, L], with the step's keys and values in them; scales float32[B, K, 2, N] of eight-bit ones.
      sinks: float32[K, G] or None.

    Returns:
      What q is shaped like: sums over the rows' lanes from options.value_start on.
    """
    K, G = q.shape[1:3] if blocks.decode else q.shape[:2]
    T, W = q.shape[0 if blocks.decode else 2], q.shape[3]
    tiles = _tiles(K, G, W, blocks)
    cache = tuple(map(keep_in_hbm, cache))
    columns = None if sinks is None else _sink_columns(sinks, blocks)
    return pl.pallas_call(
        partial(_attend, options=options, blocks=blocks),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(pl.cdiv(T, blocks.tile),),
            in_specs=(tiles, (pl.BlockSpec(memory_space=pl.ANY),) * len(cache), _whole(columns)),
            out_specs=tiles,
            scratch_shapes=[Scratch.of(cache, blocks, G, W)],
        ),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",),
            vmem_limit_bytes=vmem_limit(),
            disable_bounds_checks=True,  # half the instructions that start a copy; the interpreter's tests check bounds
        ),
        cost_estimate=cost(batch, q, cache, options.window, blocks),
        name="attend_decodes" if blocks.decode else "attend_prompts",
    )(batch, q, cache, columns)


def _tiles(K: int, G: int, W: int, blocks: Blocks) -> pl.BlockSpec:
    """Of the queries and of the result, one a grid step."""
    if blocks.decode:
        return pl.BlockSpec((blocks.tile, K, G, W), lambda i, *_: (i, 0, 0, 0))
    return pl.BlockSpec((K, G, blocks.tile, W), lambda i, *_: (0, 0, i, 0))


def _sink_columns(sinks: jax.Array, blocks: Blocks) -> jax.Array:
    """[K, G] -> float32[K, G, LANES], for prompts [K, G, 1, LANES]: a lane-wide column beside the rows it starts."""
    column = sinks.astype(jnp.float32).reshape(*sinks.shape, *(1,) * (1 if blocks.decode else 2))
    return jnp.broadcast_to(column, (*column.shape[:-1], LANES))


def _whole(x: jax.Array | None) -> pl.BlockSpec | None:
    """All of x at each grid step."""
    return None if x is None else pl.BlockSpec(x.shape, lambda i, *_: (0,) * x.ndim)


def cost(
    batch: Batch, q: jax.Array, cache: tuple[jax.Array, ...], window: int | None, blocks: Blocks
) -> pl.CostEstimate:
    """What a step over full block tables costs; how long the sequences really are is known at run time alone."""
    B, _, N, _ = cache[0].shape
    S = batch.kv_lens.shape[0]
    H, W = q.size // q.shape[-1] // (T := q.shape[0 if blocks.decode else 2]), q.shape[-1]
    context = min(batch.block_tables.shape[0] // S, B) * N
    seen = context if window is None else min(window, context)
    cached = min(S * seen, B * N)
    pairs = H * (min(T, S) if blocks.decode else T) * seen
    return pl.CostEstimate(
        flops=4 * pairs * W,
        transcendentals=pairs,
        bytes_accessed=2 * q.size * q.dtype.itemsize + cached * sum(x.nbytes // (B * N) for x in cache),
    )


class Sums(NamedTuple):
    """The online softmax (arXiv 1805.02867) of the rows of each head group, or its types. Rows are [G] of a decode or
    [G, tile] of prompts.

    Attributes:
      max, total: float32[K, *rows, LANES], equal in all lanes.
      acc: float32[K, *rows, W], not yet divided by the total.
    """

    max: Any
    total: Any
    acc: Any

    def reset(self, sinks) -> None:
        """Nothing seen but the sinks, columns [K, ...] or None."""
        for h in range(self.acc.shape[0]):
            self.acc[h] = jnp.zeros(self.acc.shape[1:], jnp.float32)
            if sinks is None:
                self.max[h] = jnp.full(self.max.shape[1:], MASKED, jnp.float32)
                self.total[h] = jnp.zeros(self.total.shape[1:], jnp.float32)
            else:
                self.max[h] = jnp.broadcast_to(sinks[h], self.max.shape[1:])
                self.total[h] = jnp.ones(self.total.shape[1:], jnp.float32)

    def result(self, h: int) -> jax.Array:
        """float32[*rows, W] of head group h; zeros where nothing was seen."""
        total = self.total[h]
        total = jnp.where(total > 0, total, 1.0)
        return self.acc[h] / _across(total, self.acc.shape[-1])

    def of_head(self, h: int) -> "Sums":
        """The references to what is summed for head group h, without K."""
        return Sums(*(ref.at[h] for ref in self))


class Scratch(NamedTuple):
    """The kernel's memory, or its types: the sums, and what the Ring has."""

    buffers: tuple[Any, ...]
    sums: Sums
    cursor: Any
    arrived: Any

    @classmethod
    def of(cls, cache: tuple[jax.Array, ...], blocks: Blocks, G: int, W: int) -> "Scratch":
        """The types, for G query heads of W lanes a key/value head."""
        _, K, N, _ = cache[0].shape
        rows = (G,) if blocks.decode else (G, blocks.tile)
        column = pltpu.VMEM((K, *rows, LANES), jnp.float32)
        return cls(
            tuple(pltpu.VMEM((STAGES, blocks.chunk // N, *x.shape[1:]), x.dtype) for x in cache),
            Sums(column, column, pltpu.VMEM((K, *rows, W), jnp.float32)),
            pltpu.SMEM((CURSORS,), jnp.int32),
            pltpu.SemaphoreType.DMA((STAGES,)),
        )


@dataclass(frozen=True)
class Tile:
    """A tile of queries, which is a grid step.

    Attributes:
      number: of the tile, int32.
      q, out: in vector memory, [tile, K, G, W] of decodes, else [K, G, tile, W].
      sinks: as _sink_columns makes them, or None.
      sums: of the decode that is attended to, or of all the tile's rows.
    """

    number: jax.Array
    ring: Ring
    q: jax.Ref
    sinks: jax.Ref | None
    out: jax.Ref
    sums: Sums
    options: Options
    blocks: Blocks

    @property
    def heads(self) -> int:
        """K."""
        return self.sums.acc.shape[0]

    @property
    def rows(self) -> int:
        """R: of a head group, those that share a pass over a chunk."""
        return prod(self.sums.acc.shape[1:-1])

    def place(self, seq):
        """Where a decode is in the tile."""
        return seq - self.number * self.blocks.tile

    def queries(self, seq, h: int) -> jax.Array:
        """[R, W] of head group h: a decode's, or all of the tile's."""
        if self.blocks.decode:
            return self.q[self.place(seq), h]
        return self.q[h].reshape(self.rows, self.q.shape[-1])


def _attend(batch, q, cache, sinks, out, scratch: Scratch, *, options: Options, blocks: Blocks) -> None:
    """The kernel: the grid step of one tile, zeros where it has no rows. What it is given: see Batch, Tile and Ring."""
    pieces = Pieces.of(batch, blocks.tile, options.window)
    ring = Ring(pieces, cache, scratch.buffers, scratch.cursor, scratch.arrived)
    tile = Tile(pl.program_id(0), ring, q, sinks, out, scratch.sums, options, blocks)
    first_tile = batch.cu_q_lens[pieces.first_seq] // blocks.tile
    has_rows = (pieces.first_seq < pieces.end_seq) & (tile.number >= first_tile)
    has_rows &= tile.number * blocks.tile < batch.cu_q_lens[pieces.end_seq]
    pl.when(has_rows & (tile.number == first_tile))(partial(ring.begin, first_tile))
    out[...] = jnp.zeros(out.shape, out.dtype)
    pl.when(has_rows)(partial(_attend_to_decodes if blocks.decode else _attend_to_prompts, tile))


def _attend_to_decodes(tile: Tile) -> None:
    """Attends with each decode of the tile by itself."""

    def visit(seq):
        tile.sums.reset(tile.sinks)
        _attend_to_piece(tile, seq)
        for h in range(tile.heads):
            tile.out[tile.place(seq), h] = tile.sums.result(h).astype(tile.out.dtype)

    tile.ring.for_each_piece(tile.number, visit)


def _attend_to_prompts(tile: Tile) -> None:
    """Attends with the pieces of the tile in turn, over all its rows: those of other pieces see nothing meanwhile, and
    keep their sums."""
    tile.sums.reset(tile.sinks)
    tile.ring.for_each_piece(tile.number, partial(_attend_to_piece, tile))
    for h in range(tile.heads):
        tile.out[h] = tile.sums.result(h).astype(tile.out.dtype)


def _attend_to_piece(tile: Tile, seq) -> None:
    """Adds to the sums what the piece sees of its sequence."""
    tile.ring.for_each_chunk(tile.number, seq, partial(_attend_to_chunk, tile, seq))


def _attend_to_chunk(tile: Tile, seq, chunk, stage) -> None:
    """Adds one chunk, which lies in this stage of the ring, to the sums of every head group."""
    ring, options, W = tile.ring, tile.options, tile.q.shape[-1]
    span = ring.pieces.seen(tile.number, seq)
    visible = _visible(tile, seq, chunk)
    fetched = _fetched(ring, span, chunk, W)

    def scores_of(h):
        q = tile.queries(seq, h)
        k = ring.rows(stage, h, pl.ds(0, W), q.dtype)
        return _scores(q.astype(k.dtype), k, ring.scales(stage, h, 0), options)

    def accumulate(h, scores):
        v = ring.rows(stage, h, pl.ds(options.value_start, W), tile.q.dtype)
        v = jnp.where(fetched, v, jnp.zeros_like(v))  # the rest of the buffer is whatever was there before
        _accumulate(scores, v, ring.scales(stage, h, 1), visible, tile.sums.of_head(h))

    together = tile.blocks.heads_at_once(tile.heads)
    for first_head in range(0, tile.heads, together):
        heads = range(first_head, first_head + together)
        for h, scores in zip(heads, [scores_of(h) for h in heads], strict=True):
            accumulate(h, scores)


def _visible(tile: Tile, seq, chunk) -> jax.Array:
    """bool[R, C]: which rows of the piece see which tokens of the chunk. Rows of other pieces see none."""
    Q, C, window = tile.blocks.tile, tile.ring.chunk, tile.options.window
    first, end, shift = tile.ring.pieces.rows(tile.number, seq)
    cached = chunk * C + lax.broadcasted_iota(jnp.int32, (tile.rows, C), 1)
    if tile.blocks.decode:
        position = first + shift
        visible = cached <= position
    else:
        row = tile.number * Q + lax.broadcasted_iota(jnp.int32, (tile.rows, C), 0) % Q
        position = row + shift
        visible = (cached <= position) & (row >= first) & (row < end)
    return visible if window is None else visible & (cached > position - window)


def _fetched(ring: Ring, span, chunk, width: int) -> jax.Array:
    """bool[C, width]: which tokens of the chunk were copied, being on pages of the span (start, end) that is seen."""
    start, end = span
    N = ring.cache[0].shape[2]
    token = chunk * ring.chunk + lax.broadcasted_iota(jnp.int32, (ring.chunk, width), 0)
    return (token >= start // N * N) & (token < end)


def _scores(q, k, scales, options: Options) -> jax.Array:
    """q [R, W], k [C, W], scales [1, C] or None -> float32[R, C]."""
    scores = _dot(q, k, contract=(1, 1)) * (options.scale if scales is None else scales * options.scale)
    if options.soft_cap is not None:
        scores = options.soft_cap * jnp.tanh(scores / options.soft_cap)
    return scores


def _accumulate(scores, v, scales, visible, sums: Sums) -> None:
    """Adds one chunk to the sums of one head group. scores, visible [R, C], v [C, W], scales [1, C] or None."""
    scores = jnp.where(visible, scores, MASKED)
    rows, C = scores.shape
    old = sums.max[...].reshape(rows, LANES)
    new = jnp.maximum(old, jnp.max(scores, axis=1, keepdims=True))
    p = jnp.where(visible, jnp.exp(scores - _across(new, C)), 0.0)
    decay = jnp.exp(old - new)
    total = sums.total[...].reshape(rows, LANES) * decay + jnp.sum(p, axis=1, keepdims=True)
    if scales is not None:
        p = jnp.where(visible, p * scales, 0.0)  # scales that were not fetched may be anything
    weighted = _dot(p.astype(v.dtype), v, contract=(1, 0))
    acc = sums.acc[...].reshape(weighted.shape) * _across(decay, weighted.shape[1]) + weighted
    sums.max[...] = new.reshape(sums.max.shape)
    sums.total[...] = total.reshape(sums.total.shape)
    sums.acc[...] = acc.reshape(sums.acc.shape)


def _dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Accumulated in float32; float32 operands are rounded nowhere."""
    precision = lax.Precision.HIGHEST if b.dtype == jnp.float32 else None
    dimensions = ((contract[:1], contract[1:]), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _across(column: jax.Array, width: int) -> jax.Array:
    """[..., LANES], equal in all lanes, to [..., width]: the registers are used again, nothing moves."""
    return jnp.concatenate([column] * (width // LANES), axis=-1)
