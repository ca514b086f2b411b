"""From logits to one token a row: the best one, a draw, or a draw among those that min-p, top-k and top-p keep.

Shape letters: S rows, V vocabulary, C candidates. A draw is Gumbel-max: the argmax of logits plus Gumbel noise is one
from their softmax. Noise depends on a row's seed, its position and the token id alone, so that a token's noise is the
same however few of a row's tokens are looked at. Nothing sorts a vocabulary.

On CUDA, where each pass over the logits costs as much as reading a small model's weights, a filtered row is drawn from
its C largest tokens, found through the maxima of blocks, whenever they hold all that the filters keep. Where they do
not (a flat distribution, a large k), the whole row is drawn from until a token comes that the filters keep. On other
machines a search finds the least likely token that is kept. Which way it is depends on the row alone, and the token is
the same.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.noise import PAIR, RUN, gumbel, threefry

BLOCK = 128  # tokens that compete as one in the first round of a search for the largest
_PART = 8  # and in the second
_CANDIDATES = 64
_ROWS_AT_ONCE = 32  # that are drawn from whole: they stay in a GPU's second-level cache from one pass to the next
_DIGIT = 4  # bits of a threshold that a pass over the row finds, on a TPU

Rows = Mapping[str, jax.Array]  # of each row: temperature, top_k, top_p, min_p, seed_lo, seed_hi, position


def best(x: jax.Array) -> jax.Array:
    """int32[S]: the lowest index of each row's largest element, -1 if there is a NaN."""
    return lax.platform_dependent(x, cuda=_best_in_one_pass, default=_best_by_two_reductions)


def _best_by_two_reductions(x):
    """They fuse with what computes x; a compiler's own argmax need not. XLA:CPU's maximum passes over a NaN."""
    V = x.shape[1]
    largest = jnp.max(x, axis=-1, keepdims=True)
    return jnp.min(jnp.where(jnp.isnan(x), -1, jnp.where(x == largest, jnp.arange(V), V)), axis=-1)


def _best_in_one_pass(x):
    def larger(a, b):
        a_first = jnp.isnan(a[0]) | (a[0] > b[0]) | ((a[0] == b[0]) & (a[1] < b[1]))
        return tuple(jnp.where(a_first, left, right) for left, right in zip(a, b, strict=True))

    ids = lax.broadcasted_iota(jnp.int32, x.shape, 1)
    value, index = lax.reduce((x, ids), (jnp.float32(-jnp.inf), jnp.int32(x.shape[1])), larger, (1,))
    return jnp.where(jnp.isnan(value), -1, index)


# ---- noise ----


def draw(logits: jax.Array, rows: Rows) -> jax.Array:
    """int32[S]: a draw from each row of float32[S, V]; the best where its temperature is 0; -1 where there is a NaN."""
    return _draw(at_temperature(logits, rows), rows)


def _draw(x, rows):
    greedy = rows["temperature"] == 0
    return lax.platform_dependent(x, keys_of(rows), greedy, cuda=_draw_by_blocks, default=_draw_plainly)


def at_temperature(logits: jax.Array, rows: Rows) -> jax.Array:
    return logits / jnp.where(rows["temperature"] > 0, rows["temperature"], 1)[:, None]


def _draw_plainly(x, keys, greedy):
    return best(x + noise_of_all(keys, greedy, x.shape[1]))


def _draw_by_blocks(x, keys, greedy):
    """Every hash is computed once for its two tokens, in a pass that leaves maxima of blocks. The best block's noise is
    computed once more."""
    pairs = pad(_nan_first(x), PAIR).reshape(len(x), -1, 2, RUN)
    block, place = (lax.broadcasted_iota(jnp.int32, pairs[:, :, 0].shape, axis) for axis in (1, 2))
    words = _hash(keys, block * RUN + place)
    still = greedy[:, None, None]
    scores = [pairs[:, :, i] + jnp.where(still, 0, gumbel(words[i])) for i in range(2)]
    block = jnp.argmax(jnp.max(jnp.maximum(*scores), axis=-1), axis=-1)
    ids = block[:, None] * PAIR + jnp.arange(PAIR)
    candidates = jnp.take_along_axis(x, ids, axis=1, mode="fill", fill_value=-jnp.inf)
    winner = best(candidates + noise(keys, greedy, ids))
    return jnp.where(winner < 0, -1, block * PAIR + winner)


def noise(keys: jax.Array, greedy: jax.Array, ids: jax.Array) -> jax.Array:
    """float32[S, n] for token ids int32[S, n] under keys uint32[S, 2]; 0 in greedy rows (bool[S])."""
    first, second = _hash(keys, ids // PAIR * RUN + ids % RUN)
    return jnp.where(greedy[:, None], 0, gumbel(jnp.where(ids % PAIR < RUN, first, second)))


def noise_of_all(keys: jax.Array, greedy: jax.Array, vocab_size: int) -> jax.Array:
    """`noise` for every token id, float32[S, V]: each hash is computed once for its two."""
    counters = jnp.arange(-(-vocab_size // PAIR) * RUN).reshape(1, -1, RUN)
    pairs = jnp.concatenate([gumbel(word) for word in _hash(keys, counters)], axis=2)
    return jnp.where(greedy[:, None], 0, pairs.reshape(len(keys), -1)[:, :vocab_size])


def keys_of(rows: Rows) -> jax.Array:
    """uint32[S, 2] from seed and position."""
    lo, hi, position = (rows[name].astype(jnp.uint32) for name in ("seed_lo", "seed_hi", "position"))
    return jnp.stack(threefry(hi, lo, position), axis=1)


def _hash(keys, counters):
    """Two words uint32[S, ...] for each counter int32[S, ...], or int32[1, ...]: of every row."""
    high, low = (keys[:, i].reshape(-1, *[1] * (counters.ndim - 1)) for i in range(2))
    return threefry(high, low, counters.astype(jnp.uint32))


# ---- filters ----


def draw_filtered(logits: jax.Array, rows: Rows) -> jax.Array:
    """`draw` among what the rows' filters keep."""

    def on_cuda():
        return _draw_from_blocks(lambda: _tempered(logits, rows), blocks_of(_tempered(logits, rows)), rows)

    return lax.platform_dependent(cuda=on_cuda, default=lambda: _draw_from_rows(at_temperature(logits, rows), rows))


def draw_adjusted(adjusted: Callable[..., Any], rows: Rows) -> jax.Array:
    """`draw_filtered` from logits that are made first. adjusted(f, in_one_pass) gives f(logits), with f fused with what
    makes them if in_one_pass."""

    def on_cuda():
        def x_and_blocks(logits):
            x = _tempered(logits, rows)
            return x, blocks_of(x)

        x, blocks = adjusted(x_and_blocks, in_one_pass=True)
        return _draw_from_blocks(lambda: x, blocks, rows)

    def elsewhere():
        return _draw_from_rows(at_temperature(adjusted(lambda logits: logits, in_one_pass=False), rows), rows)

    return lax.platform_dependent(cuda=on_cuda, default=elsewhere)


def _draw_from_rows(x, rows):
    kept = jnp.where(x < threshold(x, rows)[:, None], -jnp.inf, x)
    some = partial(noise_of_all, keys_of(rows), rows["temperature"] == 0, x.shape[1])
    return best(kept + if_any(rows["temperature"], some, jnp.zeros_like(x)))


# ---- filters, on CUDA ----


class Blocks(NamedTuple):
    """Of each 128 tokens of a row; float32[S, V / 128]."""

    maxima: jax.Array  # infinity where there is a NaN
    masses: jax.Array  # sums of exp(x - maximum)


def _tempered(logits, rows):
    """float32[S, V], V up to a multiple of 128."""
    return pad(at_temperature(logits, rows), BLOCK)


def blocks_of(x: jax.Array) -> Blocks:
    """In one pass, as a softmax's maximum and sum can be had (Milakov and Gimelshein, arXiv 1805.02867)."""

    def joined(a, b):
        largest, smallest = jnp.maximum(a[0], b[0]), jnp.minimum(a[0], b[0])
        factor = jnp.where(largest == smallest, 1, jnp.exp(smallest - largest))
        return largest, jnp.where(a[0] >= b[0], a[1] + b[1] * factor, b[1] + a[1] * factor)

    x = _nan_first(x).reshape(len(x), -1, BLOCK)
    return Blocks(*lax.reduce((x, jnp.ones_like(x)), (jnp.float32(-jnp.inf), jnp.float32(0)), joined, (2,)))


def _draw_from_blocks(x, blocks: Blocks, rows):
    """x() is float32[S, V]: where what makes it costs less than to keep it, it is made where it is used."""
    drawn = rows["temperature"] > 0
    filtered = drawn & ((rows["top_k"] > 0) | (rows["top_p"] < 1) | (rows["min_p"] > 0))
    plain = drawn & ~filtered
    tokens = _best_by_blocks(x(), blocks.maxima)
    tokens = jnp.where(plain, if_any(plain, lambda: _draw(x(), rows), tokens), tokens)
    found, decided = _draw_from_largest(x(), blocks, rows)
    tokens = jnp.where(filtered, found, tokens)
    return _draw_from_all(x, blocks, rows, filtered & ~decided, tokens)


def _nan_first(x):
    return jnp.where(jnp.isnan(x), jnp.inf, x)


def pad(x: jax.Array, multiple: int) -> jax.Array:
    """x[S, V] with -inf up to a multiple of so many tokens."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % multiple)), constant_values=-jnp.inf)


def _best_by_blocks(x, maxima):
    block = jnp.argmax(maxima, axis=-1)
    winner = best(_take(x.reshape(len(x), -1, BLOCK), block[:, None])[:, 0])
    return jnp.where(winner < 0, -1, block * BLOCK + winner)


def _draw_from_largest(x, blocks, rows):
    """Tokens int32[S] drawn from each row's largest ones, and bool[S]: where these hold all that is kept."""
    values, ids, rest = largest(x, blocks.maxima, _CANDIDATES)
    threshold, decided = threshold_of_largest(values, rest, blocks, rows)
    scores = values + noise(keys_of(rows), rows["temperature"] == 0, ids)
    scores = jnp.where(values >= threshold[:, None], scores, -jnp.inf)
    winners = scores == jnp.max(scores, axis=-1, keepdims=True)
    tokens = jnp.min(jnp.where(winners, ids, x.shape[1]), axis=-1)
    return tokens, decided & (jnp.max(blocks.maxima, axis=-1) < jnp.inf)


def largest(x: jax.Array, maxima: jax.Array, n: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Values in falling order and ids of each row's n largest elements, of ties any; fewer if a row has not as many.
    And the largest of all others, -infinity if there is none.

    Exact in three rounds: one of the n largest elements is in one of the n blocks with the largest maxima.
    """
    S = len(x)
    values, chosen, rest = _top(maxima, n)
    for size, parts in ((_PART, BLOCK // _PART), (1, _PART)):
        inner = (chosen[:, :, None] * parts + jnp.arange(parts)).reshape(S, -1)
        values, where, others = _top(jnp.max(_take(x.reshape(S, -1, size), inner), axis=-1), n)
        chosen, rest = jnp.take_along_axis(inner, where, axis=1), jnp.maximum(rest, others)
    return values, chosen, rest


def _top(x, n):
    """Values and places of the n largest elements of each row, and the next one's value."""
    values, places = lax.top_k(x, min(n + 1, x.shape[1]))
    rest = values[:, n] if x.shape[1] > n else jnp.full(len(x), -jnp.inf)
    return values[:, :n], places[:, :n], rest


def _take(blocks, chosen):
    """[S, n, size] of blocks [S, N, size] by int32[S, n]."""
    return jax.vmap(lambda row, at: row.at[at].get(mode="promise_in_bounds"))(blocks, chosen)


def threshold_of_largest(values: jax.Array, rest: jax.Array, blocks: Blocks, rows: Rows) -> tuple[jax.Array, jax.Array]:
    """`threshold` by each row's C largest elements, values float32[S, C] in falling order, and the largest of all
    others; and bool[S]: whether they tell it. They do if what it keeps is among them, and what top-p is a part of is
    known."""
    C = values.shape[1]
    top, all_here = values[:, 0], rest == -jnp.inf  # nothing else has any probability
    is_among = (rows["top_k"] > 0) & (rows["top_k"] <= C)
    kth = jnp.take_along_axis(values, jnp.clip(rows["top_k"], 1, C)[:, None] - 1, axis=1)[:, 0]
    floor = jnp.maximum(top + jnp.log(rows["min_p"]), jnp.where(is_among, kth, -jnp.inf))

    here = (floor > rest) | all_here
    mass = jnp.where(values >= floor[:, None], jnp.exp(values - top[:, None]), 0)
    above = jnp.sum(jnp.where(values[:, None, :] >= values[:, :, None], mass[:, None, :], 0), axis=-1)
    of_all = jnp.sum(blocks.masses * jnp.exp(blocks.maxima - top[:, None]), axis=-1)
    enough = above >= (rows["top_p"] * jnp.where(here, above[:, -1], of_all))[:, None]
    nucleus = jnp.max(jnp.where(enough, values, -jnp.inf), axis=-1)
    floor = jnp.maximum(floor, jnp.where(rows["top_p"] < 1, nucleus, -jnp.inf))
    known = here | ((rows["top_k"] == 0) & (rows["min_p"] == 0))
    return floor, known & ((floor > rest) | all_here)


def _draw_from_all(x, blocks, rows, left, tokens):
    """Tokens, those of the rows `left` drawn from whole rows, some at a time.

    A token with the best score of all that may be kept is drawn if it is kept. If it is not, neither is one that is no
    more likely, and the best of the others is next.
    """
    S = len(tokens)
    size = min(S, _ROWS_AT_ONCE)
    top = jnp.max(blocks.maxima, axis=-1)

    def try_some(state):
        left, bound, tokens = state
        at = jnp.argsort(~left)[:size]
        mine = {name: value[at] for name, value in rows.items()}
        mine["top_k"] = jnp.where(left[at], mine["top_k"], 0)
        found, kept, value = _try(x()[at], top[at], mine, bound[at])
        done = jnp.where(left[at] & kept, at, S)
        left = left.at[done].set(False, mode="drop")
        return left, bound.at[at].set(value), tokens.at[done].set(found, mode="drop")

    return lax.while_loop(lambda state: jnp.any(state[0]), try_some, (left, jnp.full(S, -jnp.inf), tokens))[2]


def _try(x, top, rows, bound):
    """Of each row the token with the best score among those that are above the bound and that min-p and top-k keep,
    bool[S]: whether top-p keeps it, and its x."""
    floor = floor_of(x, top, rows)
    allowed = ((x > bound[:, None]) & ~(x < floor[:, None])) | jnp.isnan(x)
    tokens = _draw(jnp.where(allowed, x, -jnp.inf), rows)
    value = jnp.take_along_axis(x, tokens[:, None], axis=1, mode="clip")[:, 0]
    mass = jnp.exp(x - top[:, None])
    above = jnp.sum(jnp.where(x > value[:, None], mass, 0), axis=-1)
    total = jnp.sum(jnp.where(x >= floor[:, None], mass, 0), axis=-1)
    is_beyond = (rows["top_p"] < 1) & (above >= rows["top_p"] * total)
    return tokens, (tokens < 0) | ~is_beyond, value


# ---- thresholds of whole rows ----


def threshold(x: jax.Array, rows: Rows) -> jax.Array:
    """float32[S]: what min-p, top-k and top-p, each applied to what the one before left, keep is x >= it."""
    top = jnp.max(x, axis=-1)
    floor = floor_of(x, top, rows)

    def top_p_floor():
        mass = jnp.where(x >= floor[:, None], jnp.exp(x - top[:, None]), 0)
        found = _search(_image_of(x), mass, rows["top_p"] * jnp.sum(mass, axis=-1))
        return jnp.where(rows["top_p"] < 1, found, -jnp.inf)

    return jnp.maximum(floor, if_any(rows["top_p"] < 1, top_p_floor, jnp.full_like(top, -jnp.inf)))


def floor_of(x: jax.Array, top: jax.Array, rows: Rows) -> jax.Array:
    """float32[S]: `threshold` of min-p and top-k alone. top: each row's maximum."""
    V = x.shape[1]

    def top_k_floor():
        image = _image_of(x)
        k = jnp.where(rows["top_k"] > 0, jnp.minimum(rows["top_k"], V), V)
        return _search(image, jnp.ones_like(image, jnp.int32), k)

    floor = top + jnp.log(rows["min_p"])
    return jnp.maximum(floor, if_any(rows["top_k"], top_k_floor, jnp.full_like(top, -jnp.inf)))


def _search(image, weights, wanted):
    """The largest float32[S] threshold such that the weights of the elements that reach it sum to at least `wanted`;
    all elements are taken to.

    Finds the bits of its order-preserving unsigned image, some at a time: exact whatever the values.
    """

    def search(bits, image, weights, wanted):
        def digit(i, found):
            step = jnp.uint32(1) << (32 - bits * (i + 1)).astype(jnp.uint32)
            reach = [image >= (found + d * step)[:, None] for d in range(1, 1 << bits)]
            sums = [jnp.sum(jnp.where(reached, weights, 0), axis=-1) for reached in reach]
            return found + step * sum((s >= wanted).astype(jnp.uint32) for s in sums)

        return lax.fori_loop(0, 32 // bits, digit, jnp.zeros(len(image), jnp.uint32))

    # On a CPU sums do not share a pass; on a GPU each is two kernels more.
    one_bit, a_digit = partial(search, 1), partial(search, _DIGIT)
    found = lax.platform_dependent(image, weights, wanted, tpu=a_digit, default=one_bit)
    return _float_of(jnp.maximum(found, _image_of(jnp.float32(-jnp.inf))))


def _image_of(x):
    """float32 -> uint32, order preserved."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _float_of(image):
    return lax.bitcast_convert_type(jnp.where(image >> 31 == 1, image & 0x7FFFFFFF, ~image), jnp.float32)


def if_any(rows: jax.Array, compute: Callable, otherwise):
    """compute(), unless no row asks for it."""
    return lax.cond(jnp.any(rows != 0), compute, lambda: otherwise)
