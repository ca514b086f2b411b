"""How decode attention cuts sequences into splits, and which worker takes which: plain jnp, on the device."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
import numpy as np
from jax import lax

TILE = 64  # cached tokens multiplied at a time
FIELDS = 8  # columns of the list of work, see list_work


@dataclass(frozen=True)
class DecodeConfig:
    """How the work is cut and laid out on the machine.

    Attributes:
      min_split: a sequence is cut into splits of at least this many tokens ...
      max_splits: ... and into at most this many of them.
      workers: pairs of a compute and a memory warpgroup in one CTA, one CTA to an SM.
      stages: tiles of keys, and of values, in flight for each worker.
      runs_from: workers have runs of items if there are more than so many sequences and key/value heads for each ...
      whole_until: ... and of up to so many, which have to be alike, each worker has a whole one, or none.
      alike: sequences are if none is so many tiles longer than the mean, which a worker would read with few beside it.
      waves: else, how runs are in length, those of as many CTAs as there are SMs each. The fastest SM is done in 70% of
        the slowest's time, and the hardware gives it the next CTA.
    """

    min_split: int
    max_splits: int
    workers: int
    stages: int
    runs_from: float = 0.9
    whole_until: float = 1.4
    alike: int = 8
    waves: tuple[int, ...] = (22, 2, 1)

    @classmethod
    def of(cls, head_dim: int) -> "DecodeConfig":
        """Fills the 227 KB of an H100's shared memory: a worker needs ROWS queries and its stages."""
        workers, stages = {64: (2, 6), 128: (2, 3), 256: (1, 3)}[head_dim]
        runs_from = 0.9 if workers == 2 else cls.whole_until  # with one, half a batch would keep half of the SMs busy
        return cls(min_split=256, max_splits=32, workers=workers, stages=stages, runs_from=runs_from)


class Cuts(NamedTuple):
    """How sequences are cut, int32[S] each: first visible token, tokens from there, tokens of a split (but the last),
    and splits; and `most`, the most splits that a sequence can have."""

    start: jax.Array
    tokens: jax.Array
    size: jax.Array
    splits: jax.Array
    most: int

    @classmethod
    def of(cls, kv_lens, block_table_tokens: int, window: int | None, config: DecodeConfig) -> "Cuts":
        start = jnp.maximum(kv_lens - (window or block_table_tokens), 0) // TILE * TILE
        tokens = kv_lens - start
        size = jnp.maximum(pl.cdiv(pl.cdiv(tokens, config.max_splits), TILE) * TILE, config.min_split)
        visible = block_table_tokens if window is None else min(block_table_tokens, window + TILE)
        most = min(config.max_splits, pl.cdiv(visible, config.min_split))
        return cls(start, tokens, size, pl.cdiv(tokens, size).astype(jnp.int32), most)


def list_work(cuts: Cuts, kv_lens, short_last: bool = False):
    """The items of work, before the split over key/value heads, by sequence and split. short_last: the last split of
    each sequence, which may be short, comes behind all others, so that workers that have every so many items are done
    at about the same time.

    Returns int32[W, FIELDS], the sequence, the first token, the last + 1, kv_len, split, then how many splits come
    before the sequence's first, how many it has, and the tokens of each but the last; and int32[1], how many rows are
    real. Those behind them are zeros. They depend on nothing but lengths, so that one list serves all layers that have
    the same window.
    """
    S = kv_lens.shape[0]
    before = _before(cuts.splits)
    j = jnp.arange(cuts.most)[None, :]
    first = cuts.start[:, None] + j * cuts.size[:, None]
    stop = jnp.minimum(first + cuts.size[:, None], kv_lens[:, None])
    of_seq = [column[:, None] for column in (before, cuts.splits, cuts.size)]
    columns = [jnp.arange(S)[:, None], first, stop, kv_lens[:, None], j, *of_seq]
    rows = jnp.stack([jnp.broadcast_to(c, (S, cuts.most)) for c in columns], axis=-1).astype(jnp.int32)
    is_real, count = j < cuts.splits[:, None], jnp.sum(cuts.splits).astype(jnp.int32)[None]
    if S == 1:  # they are in their places: no scatter, which takes two kernels
        return jnp.where(is_real[0, :, None], rows[0], 0), count
    place = before[:, None] + j
    if short_last:
        is_there = (cuts.splits > 0).astype(jnp.int32)
        lasts = _before(is_there)
        is_last = j == cuts.splits[:, None] - 1
        place = jnp.where(is_last, count - jnp.sum(is_there) + lasts[:, None], place - lasts[:, None])
    place = jnp.where(is_real, place, S * cuts.most)
    work = jnp.zeros((S * cuts.most, FIELDS), jnp.int32)
    return work.at[place].set(rows, mode="drop", unique_indices=True), count


def _before(counts):
    """int32[S]: the sum of those before each."""
    S = counts.shape[0]
    return jnp.sum(jnp.where(jnp.arange(S)[:, None] > jnp.arange(S)[None, :], counts[None, :], 0), axis=1)


def share_work(cuts: Cuts, K: int, config: DecodeConfig, sms: int):
    """int32[workers + 1], of the workers of all waves of CTAs: worker w has the items from number w of these up to
    number w + 1. Items are ordered by sequence, head and split.

    An item is of the worker in whose share of all tiles its middle lies. Or, if the first wave's workers are enough and
    all sequences alike, each of them has a whole sequence and head, so that nothing has to be merged, or none: copies
    need not all workers.
    """
    workers, first_wave = config.workers * sms, [1, *[0] * (len(config.waves) - 1)]
    tiles, weight = pl.cdiv(cuts.tokens, TILE), _before_each(config.waves, config, sms)
    total = jnp.sum(tiles) * K
    share = total // weight[-1] * weight + total % weight[-1] * weight // weight[-1]
    if cuts.splits.shape[0] * K <= config.whole_until * workers:
        is_there = (cuts.splits > 0).astype(jnp.int32)
        count = jnp.sum(is_there)
        alike = (count * K <= workers) & (count * (jnp.max(tiles) - config.alike) <= jnp.sum(tiles))
        whole = jnp.minimum(_before_each(first_wave, config, sms), count * K)
        tiles, share = jnp.where(alike, is_there, tiles), jnp.where(alike, whole, share)  # as if each were one tile
    return _items_before(cuts, K, tiles, share)


def _before_each(of_wave, config: DecodeConfig, sms: int):
    """The sums before each worker, and of all, of what the workers of a wave have each."""
    return np.cumsum([0, *np.tile(np.repeat(of_wave, sms), config.workers)])


def _items_before(cuts: Cuts, K: int, tiles, share):
    """int32[any]: how many items have their middles before each share, int32[any], of all tiles, of which each sequence
    has so many for each of its K heads."""
    S = cuts.splits.shape[0]
    size, before, splits_before = cuts.size // TILE, _before(tiles) * K, _before(cuts.splits) * K
    seq = jnp.sum((before + tiles * K)[None, :] <= share[:, None], axis=1)
    tiles, size, splits, before, splits_before = (
        x.at[seq].get(mode="fill", fill_value=fill)
        for x, fill in ((tiles, 1), (size, 1), (cuts.splits, 0), (before, 0), (splits_before, 0))
    )
    head, place = (share - before) // tiles, (share - before) % tiles
    whole = jnp.clip(pl.cdiv(2 * place - size, 2 * size), 0, splits - 1)  # splits whose middle comes before `place`
    last = 2 * (splits - 1) * size + tiles - (splits - 1) * size
    behind = jnp.where((whole == splits - 1) & (last < 2 * place), splits, whole)
    found = splits_before + head * splits + behind
    return jnp.where(seq < S, found, jnp.sum(cuts.splits) * K).astype(jnp.int32)


class Item(NamedTuple):
    """One split of a sequence for one key/value head, as a worker reads it in a kernel.

    Attributes:
      seq, head: whose.
      split, splits: its number among the sequence's, and how many these are.
      first, stop: the first of its cached tokens, and the last + 1.
      length: of the sequence.
    """

    seq: jax.Array
    head: jax.Array
    split: jax.Array
    splits: jax.Array
    first: jax.Array
    stop: jax.Array
    length: jax.Array

    @classmethod
    def at(cls, work, i, heads: int) -> "Item":
        """Number i of all items by row and head; work: int32[W, FIELDS] of list_work."""
        row = lax.div(i, jnp.int32(heads))
        seq, first, stop, length, split, _, splits, _ = (work[row, f] for f in range(FIELDS))
        return cls(seq, lax.rem(i, jnp.int32(heads)), split, splits, first, stop, length)

    @classmethod
    def in_run(cls, work, i, heads: int) -> "Item":
        """Number i of all items by sequence, head and split, as share_work counts them."""
        row = lax.div(i, jnp.int32(heads))
        seq, first, _, length, split, before, splits, size = (work[row, f] for f in range(FIELDS))
        i -= before * heads
        head, nth = lax.div(i, splits), lax.rem(i, splits)
        first += (nth - split) * size
        return cls(seq, head, nth, splits, first, jnp.minimum(first + size, length), length)

    @property
    def tiles(self):
        return lax.div(self.stop - self.first + TILE - 1, jnp.int32(TILE))
