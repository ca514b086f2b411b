"""From logits to one token a row: the best one, a draw, or a draw among those that min-p, top-k and top-p keep.

Shape letters: S rows, V vocabulary, C candidates. A draw is Gumbel-max: the argmax of logits plus Gumbel noise is one
from their softmax. Noise depends on a row's seed, its position and the token id alone, so that a token's noise is the
same however few of a row's tokens are looked at. Nothing sorts a vocabulary.

On CUDA, where each pass over the logits costs as much as reading a small model's weights, a filtered row is drawn from
its C largest tokens, found through the maxima of blocks, whenever they hold all that the filters keep. Where they do
not (a flat distribution, a large k), and on other machines, the whole row is searched. Which it is depends on the row
alone, and the token is the same.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.noise import PAIR, RUN, gumbel, hash_through_xla

BLOCK = 128  # tokens that compete as one in the first round of a search for the largest
_PART = 8  # and in the second
_CANDIDATES = 256
_ROWS_AT_ONCE = 32  # that are searched whole: they stay in a GPU's second-level cache from one pass to the next
_DIGIT = 4  # bits of a threshold that a pass over the row finds

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
    counters = jnp.broadcast_to(jnp.arange(-(-vocab_size // PAIR) * RUN), (len(keys), -(-vocab_size // PAIR) * RUN))
    words = jnp.stack([word.reshape(len(keys), -1, RUN) for word in _hash(keys, counters)], axis=2)
    return jnp.where(greedy[:, None], 0, gumbel(words.reshape(len(keys), -1)[:, :vocab_size]))


def keys_of(rows: Rows) -> jax.Array:
    """uint32[S, 2] from seed and position."""
    lo, hi, position = (rows[name].astype(jnp.uint32) for name in ("seed_lo", "seed_hi", "position"))
    return jnp.stack(hash_through_xla(hi, lo, position), axis=1)


def _hash(keys, counters):
    """Two words uint32[S, ...] for each counter int32[S, ...]."""
    high, low = (jnp.broadcast_to(keys[:, i].reshape(-1, *[1] * (counters.ndim - 1)), counters.shape) for i in range(2))
    return hash_through_xla(high, low, counters.astype(jnp.uint32))


# ---- filters ----


def draw_filtered(adjusted: Callable[..., Any], rows: Rows) -> jax.Array:
    """`draw` among what the rows' filters keep. adjusted(f, in_one_pass) gives f(logits), with f fused with what makes
    them if in_one_pass."""

    def on_cuda():
        x, maxima = adjusted(lambda logits: _with_maxima(logits, rows), in_one_pass=True)
        return _draw_from_blocks(x, maxima, rows)

    def elsewhere():
        return _draw_from_whole_rows(at_temperature(adjusted(lambda logits: logits, in_one_pass=False), rows), rows)

    return lax.platform_dependent(cuda=on_cuda, default=elsewhere)


def _draw_from_whole_rows(x, rows):
    kept = jnp.where(x < threshold(x, rows)[:, None], -jnp.inf, x)
    some = partial(noise_of_all, keys_of(rows), rows["temperature"] == 0, x.shape[1])
    return best(kept + if_any(rows["temperature"], some, jnp.zeros_like(x)))


def _with_maxima(logits, rows):
    """x float32[S, V], V up to a multiple of 128, and its blocks' maxima, float32[S, V / 128]."""
    x = pad(at_temperature(logits, rows), BLOCK)
    return x, jnp.max(_nan_first(x).reshape(len(x), -1, BLOCK), axis=-1)


def _draw_from_blocks(x, maxima, rows):
    drawn = rows["temperature"] > 0
    filtered = drawn & ((rows["top_k"] > 0) | (rows["top_p"] < 1) | (rows["min_p"] > 0))
    plain = drawn & ~filtered
    tokens = _best_by_blocks(x, maxima)
    tokens = jnp.where(plain, if_any(plain, lambda: _draw(x, rows), tokens), tokens)
    found, decided = if_any(filtered, lambda: _draw_from_largest(x, maxima, rows), (tokens, ~filtered))
    tokens = jnp.where(filtered, found, tokens)
    return _draw_from_all(x, rows, filtered & ~decided, tokens)


def _nan_first(x):
    return jnp.where(jnp.isnan(x), jnp.inf, x)


def pad(x: jax.Array, multiple: int) -> jax.Array:
    """x[S, V] with -inf up to a multiple of so many tokens."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % multiple)), constant_values=-jnp.inf)


def _best_by_blocks(x, maxima):
    block = jnp.argmax(maxima, axis=-1)
    winner = best(_take(x.reshape(len(x), -1, BLOCK), block[:, None])[:, 0])
    return jnp.where(winner < 0, -1, block * BLOCK + winner)


def _draw_from_largest(x, maxima, rows):
    """Tokens int32[S] drawn from each row's largest ones, and bool[S]: where these hold all that is kept."""
    values, ids = largest(x, maxima, _CANDIDATES)
    threshold, decided = threshold_of_largest(x, values, rows)
    scores = values + noise(keys_of(rows), rows["temperature"] == 0, ids)
    scores = jnp.where(values >= threshold[:, None], scores, -jnp.inf)
    winners = scores == jnp.max(scores, axis=-1, keepdims=True)
    tokens = jnp.min(jnp.where(winners, ids, x.shape[1]), axis=-1)
    return tokens, decided & (jnp.max(maxima, axis=-1) < jnp.inf)


def largest(x: jax.Array, maxima: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
    """Values in falling order and ids of each row's n largest elements, of ties any; fewer if a row has not as many.

    Exact in three rounds: one of the n largest elements is in one of the n blocks with the largest maxima.
    """
    S = len(x)
    values, chosen = lax.top_k(maxima, min(n, maxima.shape[1]))
    for size, parts in ((_PART, BLOCK // _PART), (1, _PART)):
        inner = (chosen[:, :, None] * parts + jnp.arange(parts)).reshape(S, -1)
        tops = jnp.max(_take(x.reshape(S, -1, size), inner), axis=-1)
        values, where = lax.top_k(tops, min(n, tops.shape[1]))
        chosen = jnp.take_along_axis(inner, where, axis=1)
    return values, chosen


def _take(blocks, chosen):
    """[S, n, size] of blocks [S, N, size] by int32[S, n]."""
    return jax.vmap(lambda row, at: row.at[at].get(mode="promise_in_bounds"))(blocks, chosen)


def threshold_of_largest(x: jax.Array, values: jax.Array, rows: Rows) -> tuple[jax.Array, jax.Array]:
    """`threshold` by each row's C largest elements, values float32[S, C] in falling order, and bool[S]: whether they
    tell it. They do if what it keeps is among them."""
    C = values.shape[1]
    top, last = values[:, 0], values[:, -1]
    all_here = last == -jnp.inf  # nothing else has any probability
    k = jnp.where(rows["top_k"] > 0, rows["top_k"], x.shape[1])
    kth = jnp.take_along_axis(values, jnp.minimum(k, C)[:, None] - 1, axis=1)[:, 0]
    min_p_floor = top + jnp.log(rows["min_p"])
    floor = jnp.maximum(min_p_floor, jnp.where(k <= C, kth, -jnp.inf))
    known = (rows["top_k"] == 0) | (k <= C) | (min_p_floor > last) | all_here

    here = (floor > last) | all_here
    elsewhere = (rows["top_p"] < 1) & ~here & known
    mass = jnp.where(values >= floor[:, None], jnp.exp(values - top[:, None]), 0)
    above = jnp.sum(jnp.where(values[:, None, :] >= values[:, :, None], mass[:, None, :], 0), axis=-1)
    total = jnp.where(here, above[:, -1], if_any(elsewhere, lambda: _mass(x, top, floor), top))
    enough = above >= (rows["top_p"] * total)[:, None]
    nucleus = jnp.max(jnp.where(enough, values, -jnp.inf), axis=-1)
    floor = jnp.maximum(floor, jnp.where(rows["top_p"] < 1, nucleus, -jnp.inf))
    return floor, known & ((floor > last) | all_here)


def _mass(x, top, floor):
    return jnp.sum(jnp.where(x >= floor[:, None], jnp.exp(x - top[:, None]), 0), axis=-1)


# ---- the whole row ----


def _draw_from_all(x, rows, left, tokens):
    """Tokens, those of the rows `left` drawn from whole rows, some at a time."""
    S = len(x)
    size = min(S, _ROWS_AT_ONCE)
    order = jnp.nonzero(left, size=-(-S // size) * size, fill_value=S)[0]

    def some(i, tokens):
        at = lax.dynamic_slice_in_dim(order, i * size, size)
        mine = {name: value.at[at].get(mode="clip") for name, value in rows.items()}
        return tokens.at[at].set(_draw_from_whole_rows(x.at[at].get(mode="clip"), mine), mode="drop")

    return lax.fori_loop(0, (jnp.sum(left) + size - 1) // size, some, tokens)


def threshold(x: jax.Array, rows: Rows) -> jax.Array:
    """float32[S]: what min-p, top-k and top-p, each applied to what the one before left, keep is x >= it."""
    V = x.shape[1]
    top = jnp.max(x, axis=-1)
    nothing = jnp.full_like(top, -jnp.inf)
    image = _image_of(x)

    def top_k_floor():
        k = jnp.where(rows["top_k"] > 0, jnp.minimum(rows["top_k"], V), V)
        return _search(image, jnp.ones_like(image, jnp.int32), k)

    def top_p_floor():
        mass = jnp.where(x >= floor[:, None], jnp.exp(x - top[:, None]), 0)
        found = _search(image, mass, rows["top_p"] * jnp.sum(mass, axis=-1))
        return jnp.where(rows["top_p"] < 1, found, -jnp.inf)

    floor = top + jnp.log(rows["min_p"])
    floor = jnp.maximum(floor, if_any(rows["top_k"], top_k_floor, nothing))
    return jnp.maximum(floor, if_any(rows["top_p"] < 1, top_p_floor, nothing))


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

    one_bit, a_digit = partial(search, 1), partial(search, _DIGIT)  # on a CPU, sums do not share a pass
    found = lax.platform_dependent(image, weights, wanted, cpu=one_bit, default=a_digit)
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
