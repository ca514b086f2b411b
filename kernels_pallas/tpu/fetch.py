"""How cached tokens come to the attention kernel: which of them are seen, and their pages' way into vector memory.

What of one sequence lies in one tile of queries is a *piece*. A piece walks over its sequence's cached tokens in
chunks. Two cursors go through pieces and chunks in the same order: the fetching one starts the copies of a chunk's
pages, STAGES - 1 chunks ahead of the computing one and across pieces, tiles and sequences, so that HBM is never idle
between them (as in arXiv 2604.15464).
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.tpu.layout import STAGES

# The cursors, in scalar memory: where to fetch, how many chunks have been fetched and computed, where to compute.
TILE, SEQ, CHUNK, FETCHED, COMPUTED, COMPUTED_SEQ = range(6)
CURSORS = 6


class Batch(NamedTuple):
    """Scalar memory: the sequences first..end-1 are attended to; token t of cu_q_lens is row t of the queries."""

    seqs: jax.Array  # int32[2]: first, end
    kv_lens: jax.Array  # int32[S]
    block_tables: jax.Array  # int32[S * P]
    cu_q_lens: jax.Array  # int32[S + 1]


@dataclass(frozen=True)
class Pieces:
    """What of each sequence lies in each tile of queries, and what it sees. Tiles and sequences go by their numbers.

    Attributes:
      batch: in scalar memory.
      first_seq, end_seq: int32; the sequences first..end-1 are attended to.
      tile: query tokens of a tile.
      window: see kernels_pallas.attention.
    """

    batch: Batch
    first_seq: jax.Array
    end_seq: jax.Array
    tile: int
    window: int | None

    @classmethod
    def of(cls, batch: Batch, tile: int, window: int | None) -> "Pieces":
        return cls(batch, batch.seqs[0], batch.seqs[1], tile, window)

    def rows(self, tile, seq):
        """The rows first..end-1 of the piece, and what is added to a row to get its position."""
        cu_q_lens = self.batch.cu_q_lens
        first = jnp.maximum(cu_q_lens[seq], tile * self.tile)
        end = jnp.minimum(cu_q_lens[seq + 1], (tile + 1) * self.tile)
        return first, end, self.batch.kv_lens[seq] - cu_q_lens[seq + 1]

    def seen(self, tile, seq):
        """Cached tokens start..end-1 are seen by some row of the piece."""
        first, end, shift = self.rows(tile, seq)
        start = 0 if self.window is None else jnp.maximum(first + shift - self.window + 1, 0)
        return start, end + shift


@dataclass(frozen=True)
class Ring:
    """Chunks of cached tokens on their way through STAGES places in vector memory.

    Attributes:
      pieces: those that see the tokens.
      cache: in HBM, pages [B, K, N, L], and over eight bits their scales, float32[B, K, 2, N].
      buffers: in vector memory, for each of these [STAGES, pages, ...].
      cursor: int32[CURSORS] in scalar memory.
      arrived: [STAGES], semaphores that count the bytes copied.
    """

    pieces: Pieces
    cache: tuple[jax.Ref, ...]
    buffers: tuple[jax.Ref, ...]
    cursor: jax.Ref
    arrived: Any

    @property
    def pages(self) -> int:
        """Of a chunk."""
        return self.buffers[0].shape[1]

    @property
    def chunk(self) -> int:
        """Tokens of a chunk."""
        return self.pages * self.buffers[0].shape[3]

    def begin(self, tile) -> None:
        """Puts both cursors on the first piece, which lies in this tile, and fetches what is to be ahead."""
        cursor, seq = self.cursor, self.pieces.first_seq
        cursor[TILE], cursor[SEQ] = tile, seq
        cursor[CHUNK] = self.pieces.seen(tile, seq)[0] // self.chunk
        cursor[FETCHED] = cursor[COMPUTED] = 0
        cursor[COMPUTED_SEQ] = seq
        for _ in range(STAGES - 1):
            self._fetch_next()

    def for_each_piece(self, tile, visit) -> None:
        """Calls visit(seq) for those of the tile, and puts the computing cursor on the sequence that the next tile
        begins with, which may be the last one here."""
        cu_q_lens, end_seq = self.pieces.batch.cu_q_lens, self.pieces.end_seq
        tile_end = (tile + 1) * self.pieces.tile

        def begins_in_tile(seq):
            return (seq < end_seq) & (cu_q_lens[jnp.minimum(seq, end_seq)] < tile_end)

        def go_on(seq):
            visit(seq)
            return seq + 1

        after = lax.while_loop(begins_in_tile, go_on, self.cursor[COMPUTED_SEQ])
        self.cursor[COMPUTED_SEQ] = jnp.where(cu_q_lens[after] > tile_end, after - 1, after)

    def for_each_chunk(self, tile, seq, compute) -> None:
        """Calls compute(chunk, stage) for those that the piece sees, each when it is there."""
        start, end = self.pieces.seen(tile, seq)

        @pl.loop(start // self.chunk, (end + self.chunk - 1) // self.chunk)
        def _(chunk):
            stage = self.cursor[COMPUTED] % STAGES
            self._wait(tile, seq, chunk, stage)
            self._fetch_next()  # into the stage that the chunk before this one has left
            compute(chunk, stage)
            self.cursor[COMPUTED] += 1

    def rows(self, stage, h: int, lanes, dtype) -> jax.Array:
        """[C, lanes] of head h and of the chunk in this stage, in the type that is multiplied with `dtype`."""
        rows = self.buffers[0][stage, :, h, :, lanes].reshape(self.chunk, -1)
        return rows.astype(dtype) if self.buffers[1:] else rows

    def scales(self, stage, h: int, which: int) -> jax.Array | None:
        """float32[1, C] of keys (0) or values (1); None: all are 1."""
        if not self.buffers[1:]:
            return None
        pages = [self.buffers[1][stage, page, h, pl.ds(which, 1)] for page in range(self.pages)]
        return jnp.concatenate(pages, axis=1)

    def _fetch_next(self) -> None:
        """Starts the copies of the chunk under the fetching cursor, and moves it on."""
        cursor, pieces = self.cursor, self.pieces
        tile, seq, chunk = cursor[TILE], cursor[SEQ], cursor[CHUNK]

        @pl.when(seq < pieces.end_seq)
        def _():
            self._start(tile, seq, chunk, cursor[FETCHED] % STAGES)
            cursor[FETCHED] += 1
            _, end = pieces.seen(tile, seq)
            tile_end = (tile + 1) * pieces.tile
            is_last = (chunk + 1) * self.chunk >= end
            next_tile = jnp.where(is_last & (pieces.batch.cu_q_lens[seq + 1] >= tile_end), tile + 1, tile)
            next_seq = jnp.where(is_last & (pieces.batch.cu_q_lens[seq + 1] <= tile_end), seq + 1, seq)
            first_chunk = pieces.seen(next_tile, jnp.minimum(next_seq, pieces.end_seq - 1))[0] // self.chunk
            cursor[TILE], cursor[SEQ] = next_tile, next_seq
            cursor[CHUNK] = jnp.where(is_last, first_chunk, chunk + 1)

    def _pages_of(self, tile, seq, chunk):
        """Pages first..end-1 of the sequence are those of this chunk that the piece sees something of."""
        start, end = self.pieces.seen(tile, seq)
        pages, N = self.pages, self.buffers[0].shape[3]
        return jnp.maximum(start // N, chunk * pages), jnp.minimum((end + N - 1) // N, (chunk + 1) * pages)

    def _start(self, tile, seq, chunk, stage) -> None:
        """Starts the copies of a chunk's pages."""
        tables = self.pieces.batch.block_tables
        blocks_per_seq = tables.shape[0] // self.pieces.batch.kv_lens.shape[0]

        @pl.loop(*self._pages_of(tile, seq, chunk))
        def _(page):
            block = tables[seq * blocks_per_seq + page]
            for source, buffer in zip(self.cache, self.buffers, strict=True):
                place = buffer.at[stage, page - chunk * self.pages]
                pltpu.make_async_copy(source.at[block], place, self.arrived.at[stage]).start()

    def _wait(self, tile, seq, chunk, stage) -> None:
        """Waits for the copies of a chunk's pages: one wait is enough where all were copied, as bytes are counted."""
        first_page, end_page = self._pages_of(tile, seq, chunk)
        is_whole = end_page - first_page == self.pages

        def wait_for(*place):
            for buffer in self.buffers:
                pltpu.make_async_copy(buffer.at[place], buffer.at[place], self.arrived.at[stage]).wait()

        @pl.when(is_whole)
        def _():
            wait_for(stage)

        @pl.loop(0, jnp.where(is_whole, 0, end_page - first_page))
        def _(_):
            wait_for(stage, 0)
