"""What a decode worker begins an item with: the queries of its head and, if they are not cached yet, the newest token's
key and value."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic.gpu import utils as mgpu
from jax.experimental.mosaic.gpu.fragmented_array import FragmentedArray
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from kernels_pallas.gpu.decode_work import Item
from kernels_pallas.gpu.heads import halves_layout, halves_of, halves_shape, rotated
from kernels_pallas.gpu.rows import ROWS, SCALAR, TILED, block_at, bytes_of, load_rows, store, sync_warpgroup


@dataclass(frozen=True)
class Queries:
    """Queries as they are, of tokens whose keys and values are cached.

    Attributes:
      q: [S, H, D].
      tile: [ROWS, D] in shared memory, of which the first G rows become an item's. What is behind them does not matter.
    """

    q: jax.Ref
    tile: jax.Ref
    G: int

    def fetch(self, item: Item) -> None:
        """Those of an item's sequence and head into the tile."""
        self.tile[...] = load_rows(self.q.at[item.seq, pl.ds(item.head * self.G, self.G)], self.G)
        plgpu.commit_smem()

    def begin(self, item: Item, logits):
        """What is found before the item's first tile of cached tokens is seen."""
        return empty(self.tile.shape[1])

    def stop(self, item: Item):
        """The last of the item's tokens that are cached, + 1."""
        return item.stop


@dataclass(frozen=True)
class Projected:
    """Queries, the newest key and the newest value of each sequence, made from the fused projection as the kernel in
    `qkv` does; they are rows of one tile, so that wgmma multiplies queries by the new key and weights by the new value
    as it does with those from the cache, where whoever has a sequence's first split writes them.

    Attributes:
      parts: [any, T, H + 2K, D] with sequence s's newest token in row s.
      rotary: cos and sin, float32[T, D / 2].
      norms: [D] each, of queries and keys, or empty.
      cache: keys and values [B, K, N, D].
      block_tables: int32[S, P].
      tile: [ROWS, D] in shared memory: G rows of queries, one of the key, one of the value, then finite ones.
      epsilon, offset: of the norms.
    """

    parts: jax.Ref
    rotary: tuple[jax.Ref, jax.Ref]
    norms: tuple[jax.Ref, ...]
    cache: tuple[jax.Ref, jax.Ref]
    block_tables: jax.Ref
    tile: Any
    G: int
    epsilon: float
    offset: float

    def clear(self) -> None:
        """Before anything else: all rows are zeros."""
        self.tile[...] = plgpu.layout_cast(jnp.zeros(self.tile.shape, self.tile.dtype), plgpu.Layout.WGMMA)

    def fetch(self, item: Item) -> None:
        sync_warpgroup()  # all warps are done with the rows before
        block = block_at(self.block_tables, item.seq, item.length - 1, self.cache[0].shape[2], 0)
        for first in range(0, self.G + 2, halves_shape(self.tile.shape[1])[0]):
            self._fetch_rows(item, first, block)
        plgpu.commit_smem()

    def begin(self, item: Item, logits):
        is_last = item.split + 1 == item.splits
        attend, nothing = lambda: self._attend_to_newest(item, logits), lambda: empty(self.tile.shape[1])
        return lax.cond(is_last, attend, nothing)

    def stop(self, item: Item):
        return jnp.minimum(item.stop, item.length - 1)

    def _fetch_rows(self, item: Item, first: int, block) -> None:
        """Those of the tile from `first` on, as many as a warpgroup holds at once; and what of them is new, into the
        block."""
        G, dtype, D = self.G, self.tile.dtype, self.tile.shape[1]
        shape, layout = halves_shape(D), halves_layout(D)
        halves = halves_of(D)

        def rows_of(half):
            parts = [self.parts.at[i, item.seq, :, half] for i in range(self.parts.shape[0])]
            found = [_load_heads(part, item.head, G, first, shape, layout) for part in parts]
            return sum(found[1:], start=found[0]).astype(dtype)

        old = [rows_of(half) for half in halves]
        tables = [table.at[item.seq] for table in self.rotary]
        turned = rotated(old, tables, self.norms, G - first, self.epsilon, self.offset)
        is_turned = first + plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout) <= G
        new = [jnp.where(is_turned, *pair) for pair in zip(turned, old, strict=True)]
        _store_in_tile(self.tile, first, new, layout)
        to = lax.rem(item.length - 1, jnp.int32(self.cache[0].shape[2]))

        @pl.when(item.split == 0)
        def write():
            for row, ref in enumerate(self.cache, start=G - first):
                for half, x in zip(halves, new, strict=True):
                    if 0 <= row < shape[0]:
                        store(ref.at[block, item.head, :, half], x, row, row + 1, layout, to - row)

    def _attend_to_newest(self, item: Item, logits):
        """What a split has found that has seen the newest token alone."""
        G, (_, D) = self.G, self.tile.shape

        def multiply(scores):
            plgpu.wgmma(scores, self.tile, self.tile.transpose((1, 0)))
            return scores[...]

        scores = pl.run_scoped(multiply, plgpu.ACC((ROWS, ROWS), jnp.float32))
        column = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=plgpu.Layout.WGMMA)
        newest = item.length - 1
        scores = jnp.where(column == G, logits(scores, newest - G, item.length, item.length), -jnp.inf)
        m = whole(scores.max(axis=1))
        total = jnp.exp2(scores - lax.broadcast_in_dim(m, scores.shape, [0])).sum(axis=1)
        weights = jnp.where(column == G + 1, lax.broadcast_in_dim(total, scores.shape, [0]), 0.0)
        weigh = lambda acc: plgpu.wgmma(acc, weights.astype(self.tile.dtype), self.tile)  # noqa: E731
        return pl.run_state(weigh)(plgpu.ACC.init(empty(D)[0])), m, total


def _load_heads(ref, head, G: int, first: int, shape, layout) -> jax.Array:
    """Of ref [H + 2K, D / 2], rows as a Projected has them for key/value head `head`, from number `first` on: [shape].
    Those behind its last are that again."""
    K = ref.shape[0] // (G + 2)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), SCALAR),
        return_type=plgpu.ShapeDtypeStruct(shape, ref.dtype, layout=layout),
    )
    def load_registers(_, ref, head):
        tiled, index = layout.to_mgpu(), ir.IndexType.get()
        at = lambda n: mgpu.c(n, index)  # noqa: E731
        head = arith.index_cast(index, head.registers.item())
        queries, key, value = arith.muli(head, at(G)), arith.addi(head, at(K * G)), arith.addi(head, at(K * G + K))
        kind = tiled.registers_element_type(ir.MemRefType(ref.type).element_type)
        registers = np.empty(tiled.registers_shape(shape), dtype=object)
        for i, (row, column) in enumerate(tiled.thread_idxs(shape)):
            row = arith.addi(row, at(first))
            is_query, is_key = (arith.cmpi(arith.CmpIPredicate.slt, row, at(n)) for n in (G, G + 1))
            source = arith.select(is_query, arith.addi(queries, row), arith.select(is_key, key, value))
            registers.flat[i] = vector.load(kind, ref, [source, column])
        return FragmentedArray(_registers=registers, _layout=tiled, _is_signed=None)

    return load_registers(ref, head)


def _store_in_tile(tile, first: int, halves, layout) -> None:
    """The halves of some rows go to those of tile [ROWS, D] from `first` on."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(TILED), layout, layout))
    def store_registers(_, tile, *halves):
        index = ir.IndexType.get()
        at = lambda n: mgpu.c(n, index)  # noqa: E731
        for i, x in enumerate(halves):
            for (row, column), register in zip(x.layout.thread_idxs(x.shape), x.registers.flat, strict=True):
                row, column = arith.addi(row, at(first)), arith.addi(column, at(i * x.shape[1]))
                (tile_row, row), (tile_column, column) = (
                    (arith.divui(n, at(size)), arith.remui(n, at(size))) for n, size in ((row, 8), (column, 64))
                )
                swizzled = arith.xori(column, arith.muli(row, at(8)))  # runs of 8 numbers change places
                vector.store(register, tile, [tile_row, tile_column, row, swizzled], alignment=bytes_of(register))

    store_registers(tile, *halves)


def whole(x):
    """To the nearest whole number, where it is below 2^22."""
    return (x + 1.5 * 2.0**23) - 1.5 * 2.0**23


def empty(D):
    """Nothing found: the weighted sum of values [ROWS, D], the maximum [ROWS] in base 2 and the denominator [ROWS]."""
    column = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), plgpu.Layout.WGMMA.reduce(1))
    acc = plgpu.layout_cast(jnp.zeros((ROWS, D), jnp.float32), plgpu.Layout.WGMMA)
    return acc, column - jnp.inf, column
