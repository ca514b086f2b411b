"""From logits to tokens, on the device and without sorting the vocabulary. Pure functions, no policy.

Shape letters: S rows of the step, V vocabulary, A requests admitted in a step; `slots` is the number of slots,
and what a running request needs is in row `slot` of every array of a SlotState.

It is compiled in four variants, from which the engine takes the cheapest that serves all rows of a step:
"greedy" (argmax), "random" (temperature alone), "filtered" (top-k, top-p and min-p too) and "full" (everything).
Rows mix freely: a row's token is the same under every variant that can serve it, and in any company. Within "full",
what no row asks for is skipped at run time.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from paged.draw import BLOCK, best, draw, draw_adjusted, draw_filtered, if_any, keys_of
from paged.sampling_params import MAX_LOGIT_BIAS, SamplingParams

Variant = Literal["greedy", "random", "filtered", "full"]
VARIANTS: tuple[Variant, ...] = ("greedy", "random", "filtered", "full")

_FLOATS = ("temperature", "top_p", "min_p", "presence", "frequency", "repetition")
_INTS = ("top_k", "min_length", "logprobs", "full")
_WORDS = ("seed_lo", "seed_hi")
_SCALARS = _FLOATS + _INTS + _WORDS
PACKED_WIDTH = 1 + len(_SCALARS)  # a packed row: the slot, then the scalars
_INT32_MAX = 2**31 - 1


@partial(jax.tree_util.register_dataclass)
@dataclass(frozen=True)
class SlotState:
    """Sampling parameters and token counts of the running requests, one row a slot.

    Attributes:
      temperature, top_p, min_p, presence, frequency, repetition: float32[slots]; temperature 0 is greedy.
      top_k: int32[slots], 0 is off.
      min_length: int32[slots], tokens of prompt and output before which stop tokens are banned.
      logprobs: int32[slots], 1 if the request wants logprobs.
      full: int32[slots], 1 if the arrays below are this request's; else they are of an earlier one and ignored.
      seed_lo, seed_hi: uint32[slots], the words of the 64-bit seed.
      counts: int32[slots, V], twice the occurrences in the output, plus 1 if the prompt has the token.
      bias_ids, bias_values: int32 and float32[slots, 300], padded with id V.
      allowed, stop_mask: uint32[slots, ceil(V / 32)], bit v % 32 of word v // 32 is token v: it may be
        generated, it ends the generation.
    """

    temperature: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    presence: jax.Array
    frequency: jax.Array
    repetition: jax.Array
    top_k: jax.Array
    min_length: jax.Array
    logprobs: jax.Array
    full: jax.Array
    seed_lo: jax.Array
    seed_hi: jax.Array
    counts: jax.Array
    bias_ids: jax.Array
    bias_values: jax.Array
    allowed: jax.Array
    stop_mask: jax.Array


class FullRow(NamedTuple):
    """The large per-slot arrays of one request; fields as in SlotState, without the leading dimension."""

    counts: np.ndarray
    bias_ids: np.ndarray
    bias_values: np.ndarray
    allowed: np.ndarray
    stop_mask: np.ndarray


class SampleOutput(NamedTuple):
    """Tokens, and their logprobs: log softmax of the model's own logits, before bias, penalties and temperature.
    Variants but "full" have tokens alone; in "full" the rest is zeros if no row wants logprobs.

    Attributes:
      tokens: int32[S], -1 where the logits had a NaN.
      logprobs: float32[S].
      rank: int32[S], 1 + how many tokens are strictly more likely.
      top_ids, top_logprobs: int32 and float32[S, n], the n = min(max_logprobs, V) most likely tokens, in falling
        order, ties by rising id.
    """

    tokens: jax.Array
    logprobs: jax.Array | None = None
    rank: jax.Array | None = None
    top_ids: jax.Array | None = None
    top_logprobs: jax.Array | None = None


# ---- host side: which variant a request needs, and its rows ----


def needs_full_row(params: SamplingParams) -> bool:
    """Whether the request uses the large per-slot arrays, so that `write_full_slot` must follow `write_slots`."""
    penalties = params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1
    return bool(penalties or params.min_tokens or params.logit_bias or params.allowed_token_ids)


def variant_of(params: SamplingParams) -> Variant:
    """The cheapest variant that serves the request."""
    filters = params.top_k > 0 or params.top_p < 1 or params.min_p > 0
    logprobs = params.logprobs is not None or params.prompt_logprobs is not None
    if needs_full_row(params) or logprobs:
        return "full"
    if params.greedy:
        return "greedy"
    return "filtered" if filters else "random"


def pack_scalars(slot: int, params: SamplingParams, seed: int, prompt_len: int) -> np.ndarray:
    """int32[PACKED_WIDTH] for `write_slots`; `seed` is any 64-bit integer, signed or not."""
    values = {
        "temperature": 0.0 if params.greedy else params.temperature,
        "top_p": params.top_p,
        "min_p": params.min_p,
        "presence": params.presence_penalty,
        "frequency": params.frequency_penalty,
        "repetition": params.repetition_penalty,
        "top_k": min(params.top_k, _INT32_MAX),
        "min_length": min(prompt_len + params.min_tokens, _INT32_MAX) if params.min_tokens else 0,
        "logprobs": params.logprobs is not None,
        "full": needs_full_row(params),
        "seed_lo": seed & 0xFFFFFFFF,
        "seed_hi": (seed >> 32) & 0xFFFFFFFF,
    }
    row = np.empty(PACKED_WIDTH, np.int32)
    row[0] = slot
    row[1:] = np.concatenate([
        np.array([values[name] for name in _FLOATS], np.float32).view(np.int32),
        np.array([values[name] for name in _INTS], np.int32),
        np.array([values[name] for name in _WORDS], np.uint32).view(np.int32),
    ])  # fmt: skip
    return row


def full_row(
    params: SamplingParams,
    prompt_ids: Sequence[int],
    output_ids: Sequence[int],
    stop_ids: Collection[int],
    vocab_size: int,
) -> FullRow:
    """The large arrays of a request that has generated `output_ids` so far (some, after a preemption)."""
    counts = 2 * np.bincount(np.asarray(output_ids, np.int64), minlength=vocab_size).astype(np.int32)
    counts[np.asarray(prompt_ids, np.int64)] |= 1
    bias = params.logit_bias or {}
    bias_ids = np.full(MAX_LOGIT_BIAS, vocab_size, np.int32)
    bias_values = np.zeros(MAX_LOGIT_BIAS, np.float32)
    bias_ids[: len(bias)] = list(bias.keys())
    bias_values[: len(bias)] = list(bias.values())
    everything = slice(None)
    allowed = _bit_mask(everything if params.allowed_token_ids is None else params.allowed_token_ids, vocab_size)
    return FullRow(counts, bias_ids, bias_values, allowed, _bit_mask(stop_ids, vocab_size))


def _bit_mask(token_ids: Collection[int] | slice, vocab_size: int) -> np.ndarray:
    bits = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
    bits[token_ids if isinstance(token_ids, slice) else np.fromiter(token_ids, np.int64)] = 1
    return np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32)


# ---- device side: the state ----


def slot_state_shapes(num_slots: int, vocab_size: int) -> SlotState:
    """A SlotState of jax.ShapeDtypeStruct. All zeros is a valid start."""
    scalars = dict.fromkeys(_FLOATS, jnp.float32) | dict.fromkeys(_INTS, jnp.int32) | dict.fromkeys(_WORDS, jnp.uint32)
    shapes: dict[str, Any] = {name: jax.ShapeDtypeStruct((num_slots,), dtype) for name, dtype in scalars.items()}
    for name, row in full_row_shapes(vocab_size)._asdict().items():
        shapes[name] = jax.ShapeDtypeStruct((num_slots, *row.shape), row.dtype)
    return SlotState(**shapes)


def full_row_shapes(vocab_size: int) -> FullRow:
    """A FullRow of jax.ShapeDtypeStruct."""
    words = -(-vocab_size // 32)
    shapes: list[Any] = [
        jax.ShapeDtypeStruct((vocab_size,), jnp.int32),
        jax.ShapeDtypeStruct((MAX_LOGIT_BIAS,), jnp.int32),
        jax.ShapeDtypeStruct((MAX_LOGIT_BIAS,), jnp.float32),
        jax.ShapeDtypeStruct((words,), jnp.uint32),
        jax.ShapeDtypeStruct((words,), jnp.uint32),
    ]
    return FullRow(*shapes)


def write_slots(state: SlotState, packed: jax.Array) -> SlotState:
    """Writes the scalars of the requests in packed int32[A, PACKED_WIDTH], rows of `pack_scalars`.
    A row whose slot is past the last is padding."""
    columns = dict(zip(_SCALARS, packed[:, 1:].T, strict=True))

    def written(name: str) -> jax.Array:
        old = getattr(state, name)
        return old.at[packed[:, 0]].set(lax.bitcast_convert_type(columns[name], old.dtype), mode="drop")

    return _replace(state, **{name: written(name) for name in _SCALARS})


def write_full_slot(state: SlotState, slot: jax.Array, row: FullRow) -> SlotState:
    """Writes the large arrays of one request (int32 scalar `slot`)."""
    new = {name: getattr(state, name).at[slot].set(value, mode="drop") for name, value in row._asdict().items()}
    return _replace(state, **new)


def count_tokens(state: SlotState, slots: jax.Array, tokens: jax.Array, mask: jax.Array) -> SlotState:
    """Counts the sampled tokens int32[S] of the rows where mask bool[S] holds."""
    counts = state.counts.at[slots, tokens].add(2 * mask.astype(jnp.int32), mode="drop")
    return _replace(state, counts=counts)


def _replace(state: SlotState, **new: jax.Array) -> SlotState:
    return SlotState(**(vars(state) | new))


# ---- device side: sampling ----


def sample(
    logits: jax.Array,
    state: SlotState,
    slots: jax.Array,
    positions: jax.Array,
    variant: Variant,
    max_logprobs: int = 0,
) -> SampleOutput:
    """Draws the next token of every row.

    In vLLM's order: allowed tokens, bias, min tokens, penalties; then temperature, min-p, top-k and top-p.

    Args:
      logits: float32[S, V].
      slots: int32[S]; rows of padding may have any slot, their result means nothing.
      positions: int32[S], of the tokens being drawn: as many tokens come before them.
      variant: static; see the module.
      max_logprobs: static; how many of the most likely tokens to report.
    """
    if variant == "greedy":
        return SampleOutput(best(logits))
    rows = _rows_of(state, slots, positions)
    if variant == "random":
        return SampleOutput(draw(logits, rows))
    if variant == "filtered":
        return SampleOutput(draw_filtered(logits, rows))
    tokens = draw_adjusted(partial(_adjusted, logits, state, slots, rows), rows)
    scored = partial(prompt_logprobs, logits, tokens, max_logprobs)
    unscored = jax.tree.map(jnp.zeros_like, jax.eval_shape(scored))
    return if_any(rows["logprobs"], scored, unscored)._replace(tokens=tokens)


def tokens_without_logits(
    best_tokens: Callable[..., jax.Array | None],
    state: SlotState,
    slots: jax.Array,
    positions: jax.Array,
    variant: Variant,
) -> jax.Array | None:
    """`sample`'s tokens in variant "greedy" or "random" by best_tokens(*drawn), which finds those with the best scores
    (as `kernels_pallas.best_tokens`, whose keys and temperature `drawn` are): int32[S], or None if it cannot."""
    if variant == "greedy":
        return best_tokens()
    rows = _rows_of(state, slots, positions)
    return best_tokens(keys_of(rows), rows["temperature"])


def _rows_of(state: SlotState, slots, positions) -> dict[str, jax.Array]:
    slots = slots.astype(jnp.uint32)  # which cannot be negative, what a kernel would see to otherwise
    rows = {name: getattr(state, name).at[slots].get(mode="clip") for name in _SCALARS}
    return rows | {"position": positions}


def prompt_logprobs(logits: jax.Array, targets: jax.Array, max_logprobs: int) -> SampleOutput:
    """Logprobs of given tokens: int32[R] `targets` under float32[R, V] `logits`."""
    norm = jax.nn.logsumexp(logits, axis=-1)
    logit = jnp.take_along_axis(logits, targets[:, None], axis=1, mode="clip")
    rank = 1 + jnp.sum(logits > logit, axis=-1, dtype=jnp.int32)
    top_ids, top = _top_n(logits, min(max_logprobs, logits.shape[1]))
    return SampleOutput(targets, logit[:, 0] - norm, rank, top_ids, top - norm[:, None])


def _adjusted(logits, state: SlotState, slots, rows, then: Callable, in_one_pass: bool):
    """then(logits), with what requests' own arrays say about them. in_one_pass: static, whether to see if there is a
    bias at all: without, nothing stands between logits and `then`."""

    def adjusted(biased: bool = True):
        return then(_adjust(logits, state, slots, rows, biased))

    def by_bias():
        has_bias = rows["full"] * (state.bias_ids.at[slots, 0].get(mode="clip") < logits.shape[1])
        return lax.cond(jnp.any(has_bias != 0), adjusted, partial(adjusted, False))

    anyone = jnp.any(rows["full"] != 0)
    return lax.cond(anyone, by_bias if in_one_pass else adjusted, lambda: then(logits))


def _adjust(logits, state: SlotState, slots, rows, biased: bool):
    """Everything that a request's own arrays say about its logits: float32[S, V]. biased: static, whether any has a
    bias."""
    V = logits.shape[1]
    mine = rows["full"][:, None] == 1

    def rows_of(name: str) -> jax.Array:
        return getattr(state, name).at[slots].get(mode="clip")

    x = jnp.where(mine & ~_unpack(rows_of("allowed"), V), -jnp.inf, logits)
    if biased:
        bias_ids = jnp.where(mine, rows_of("bias_ids"), V)
        x = x.at[jnp.arange(len(slots))[:, None], bias_ids].add(rows_of("bias_values"), mode="drop")
    too_short = (rows["position"] < rows["min_length"])[:, None]
    x = jnp.where(mine & too_short & _unpack(rows_of("stop_mask"), V), -jnp.inf, x)

    counts = jnp.where(mine, rows_of("counts"), 0)
    repetition = rows["repetition"][:, None]
    x = jnp.where(counts > 0, x * jnp.where(x > 0, 1 / repetition, repetition), x)
    generated = counts >> 1
    return x - rows["frequency"][:, None] * generated - rows["presence"][:, None] * (generated > 0)


def _unpack(words: jax.Array, num_bits: int) -> jax.Array:
    """uint32[S, W] -> bool[S, num_bits]"""
    bits = (words[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    return bits.reshape(len(words), -1)[:, :num_bits] == 1


def _top_n(x, n: int):
    """Ids int32[S, n] and values of each row's n largest elements in falling order, ties by rising id.

    Exact in two rounds: an element of the n largest is in one of the n blocks with the largest maxima.
    """
    S, V = x.shape
    num_blocks = -(-V // BLOCK)
    blocks = jnp.pad(x, ((0, 0), (0, num_blocks * BLOCK - V)), constant_values=-jnp.inf).reshape(S, num_blocks, BLOCK)
    _, chosen = lax.top_k(jnp.max(blocks, axis=-1), min(n, num_blocks))
    chosen = jnp.sort(chosen, axis=-1)  # so that ties go by id
    candidates = jnp.take_along_axis(blocks, chosen[:, :, None], axis=1).reshape(S, -1)
    values, where = lax.top_k(candidates, n)
    ids = jnp.take_along_axis(chosen, where // BLOCK, axis=1) * BLOCK + where % BLOCK
    return ids, values
