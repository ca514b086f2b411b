"""What the CTAs of prefill attention work on, in which order: a list of tiles of queries, each for some heads."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from kernels_pallas.gpu.rows import ROWS


class Item(NamedTuple):
    """A tile of queries of one head, or of two, one a warpgroup, from `head` on. All but the head is a row of the list.

    Attributes:
      row: the tile's first row in the batch.
      low, high: which of its rows are the sequence's, the first and the last + 1.
      position: of the first row in its sequence.
      begin, end: the tiles of cached tokens that it walks over, the first and the last + 1.
      seq: the sequence's row of the block tables.
    """

    head: jax.Array
    row: jax.Array
    low: jax.Array
    high: jax.Array
    position: jax.Array
    begin: jax.Array
    end: jax.Array
    seq: jax.Array


def list_work(T: int, kv_lens, cu_q_lens, num_seqs, tokens: int, tile: int, window: int | None):
    """The tiles of `tokens` queries, the longest walks over tiles of `tile` cached tokens first.

    A tile begins at a multiple of 8 rows, as the copy engine wants it, so that a sequence's first may begin with rows
    of the one before. Padding rows are one more sequence that sees nothing, so that they become zeros.

    Returns int32[W, 8], an Item without its head and with padding, and int32[1], how many of them are real.
    """
    S = kv_lens.shape[0]
    seq = jnp.arange(S + 1)
    start = jnp.where(seq < num_seqs[1], cu_q_lens, cu_q_lens[num_seqs[1]])
    stop = jnp.where(seq < num_seqs[1], jnp.append(cu_q_lens[1:], T), jnp.where(seq == num_seqs[1], T, start))
    aligned = start // 8 * 8
    tiles = jnp.where((seq >= num_seqs[0]) & (stop > start), pl.cdiv(stop - aligned, tokens), 0)
    through = jnp.sum(jnp.where(seq[:, None] >= seq[None, :], tiles[None, :], 0), axis=1)
    i = jnp.arange(pl.cdiv(T + 7 * (S + 1), tokens) + S + 1)
    s = jnp.minimum(jnp.sum(through[None, :] <= i[:, None], axis=1), S)
    row = aligned[s] + (through[s] - 1 - i) * tokens
    kv_len = jnp.append(kv_lens, 0)[s]
    position = kv_len - (stop[s] - row)
    begin = jnp.zeros_like(s) if window is None else jnp.maximum(position - (window - 1), 0) // tile
    seen = jnp.where(s < num_seqs[1], jnp.minimum(kv_len, position + tokens), 0)
    end = jnp.maximum(pl.cdiv(seen, tile), begin)
    work = jnp.stack([row, start[s] - row, stop[s] - row, position, begin, end, s, jnp.zeros_like(s)], axis=-1)
    walk = jnp.where(i < through[-1], end - begin, -1)
    longer = (walk[None, :] > walk[:, None]) | ((walk[None, :] == walk[:, None]) & (i[None, :] < i[:, None]))
    place = jnp.sum(longer, axis=1)
    work = jnp.zeros_like(work).at[place].set(work, unique_indices=True)
    return work.astype(jnp.int32), through[-1:].astype(jnp.int32)


@dataclass(frozen=True)
class Items:
    """The items of work of a CTA, which its warpgroups read off the list, each for itself.

    Attributes:
      work: int32[W, 8], the list.
      heads: query heads of an item.
      groups: of so many heads: each row of the list is so many items.
      total: items of all CTAs.
      cta, ctas: this one's number, and how many there are.
    """

    work: Any
    heads: int
    groups: jax.Array
    total: jax.Array
    cta: jax.Array
    ctas: jax.Array

    @classmethod
    def of(cls, work, count, H: int, heads: int) -> "Items":
        """Of H heads; work, count: see list_work."""
        cta, ctas = lax.axis_index("cta"), jnp.int32(lax.axis_size("cta"))
        groups = jnp.int32(H // heads)
        return cls(work, heads, groups, count[0] * groups, cta, ctas)

    def index(self, r):
        """Back and forth over the CTAs, as work gets lighter along the list."""
        return r * self.ctas + jnp.where(lax.rem(r, jnp.int32(2)) == 0, self.cta, self.ctas - 1 - self.cta)

    def read(self, r) -> Item:
        """This CTA's item number r."""
        i = jnp.clip(self.index(r), 0, jnp.maximum(self.total - 1, 0))
        tile, group = lax.div(i, self.groups), lax.rem(i, self.groups)
        return Item(group * self.heads, *(self.work[tile, f] for f in range(len(Item._fields) - 1)))

    def for_each(self, visit) -> None:
        """Calls visit(r, item, tiles walked over before) for this CTA's items. The next one is read meanwhile."""
        whole = lax.div(self.total, self.ctas)
        mine = whole + (self.index(whole) < self.total)

        def step(r, carry):
            item, done = carry
            after = self.read(r + 1)
            visit(r, item, done)
            return after, done + item.end - item.begin

        lax.fori_loop(0, mine, step, (self.read(0), jnp.int32(0)))

    def rows_of(self, item: Item, warpgroup):
        """The query head of a warpgroup, and how far behind the tile's first row its own begin."""
        return (item.head + warpgroup, 0) if self.heads > 1 else (item.head, warpgroup * ROWS)
