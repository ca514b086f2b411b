"""How a linear layer is cut into products, and which CTA makes which."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from kernels_pallas.gpu.rows import ROWS, num_sms

SHARED_MEMORY = 200 * 1024  # bytes that the ring may take
NARROW = 32  # rows of W that a CTA should have at least
WIDE = 160  # rows of W that may be multiplied at a time by few rows of x, for which W should come in many small stages
PANEL = 16  # tiles of x's rows that are multiplied by all of W before the next
ITEM_COST, STORE_COST = 64 * 1024, 4096  # bytes that shared memory moves while a CTA goes on to another product, and
# while it stores a column of one


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
            """Bytes that shared memory could move while the busiest SM multiplies and moves: that binds where memory
            does not."""
            warpgroups, features = tile
            rows, columns = ROWS * warpgroups, halves * features
            rounds = pl.cdiv(pl.cdiv(M, rows) * (F // features) * splits, sms)
            moved = 2 * (rows + columns) + 2 * warpgroups * (ROWS + columns)
            return rounds * ((moved + 4 * warpgroups * columns) * C // splits + columns * STORE_COST + ITEM_COST)

        few = M <= 2 * ROWS  # memory binds: stages should have much of W, so better read it once for each 64 rows
        most = 1 if few or M % (2 * ROWS) else 2
        tiles = ((w, f) for w in range(1, most + 1) for f in range(8, widest + 1, 8) if F % f == 0)
        warpgroups, features = min(tiles, key=cost)
        column = (ROWS * warpgroups + halves * features) * 2
        # Longer pieces of W's rows are read faster, if beside the stages that are worked on some are on their way.
        depth = 128 if few and C % 128 == 0 and column * 128 * 4 <= SHARED_MEMORY else 64
        return cls(warpgroups, features, splits, depth, min(SHARED_MEMORY // (column * depth), 12))


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
