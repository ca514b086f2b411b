"""The sampler against numpy: exact where it is exact, by distribution where it draws.

Every draw here has a fixed seed, so no run differs from another. The significance level says how a right
implementation would fare if they did: a false alarm in about one of a million tests.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from kernels_pallas import noise
from paged import draw as draw_module
from paged import sampler
from paged.sampler import VARIANTS, count_tokens, full_row, pack_scalars, prompt_logprobs, sample, variant_of
from paged.sampling_params import SamplingParams

V = 37  # a multiple of nothing
SLOTS = 4
DRAWS = 20_000
FALSE_ALARM = 1e-6
PROMPT, OUTPUT, STOPS = [1, 2, 2, 3, 30], [2, 5, 5, 5, 36], [0, 7]

sample_jit = partial(jax.jit, static_argnames=("variant", "max_logprobs"))(sample)
write_slots = jax.jit(sampler.write_slots)
write_full_slot = jax.jit(sampler.write_full_slot)


def empty_state(num_slots=SLOTS, vocab_size=V):
    shapes = sampler.slot_state_shapes(num_slots, vocab_size)
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


def admit(state, slot, params, seed=0, prompt=PROMPT, output=OUTPUT, stops=STOPS, vocab_size=V):
    """As the runner does it: scalars always, in a padded batch; the large arrays if the request needs them."""
    padding = pack_scalars(state.temperature.shape[0], SamplingParams(temperature=1.9), 99, 5)
    packed = np.stack([pack_scalars(slot, params, seed, len(prompt)), padding])
    state = write_slots(state, packed)
    if sampler.needs_full_row(params):
        state = write_full_slot(state, np.int32(slot), full_row(params, prompt, output, stops, vocab_size))
    return state


def logits_of(seed, rows=1, vocab_size=V, scale=2.0):
    return (np.random.default_rng(seed).normal(size=(rows, vocab_size)) * scale).astype(np.float32)


FLAT = logits_of(3, scale=0.7)[0]  # no token so likely that it hides the others


# ---- the oracle: straight from the definitions, by sorting, in float64 ----


def adjusted(logits, params, prompt, output, stops, position):
    x = logits.astype(np.float64).copy()
    if params.allowed_token_ids is not None:
        banned = np.ones(len(x), bool)
        banned[list(params.allowed_token_ids)] = False
        x[banned] = -np.inf
    for token, value in (params.logit_bias or {}).items():
        x[token] += value
    if position < len(prompt) + params.min_tokens:
        x[list(stops)] = -np.inf
    for token in set(prompt) | set(output):
        x[token] = x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
    for token in set(output):
        x[token] -= params.frequency_penalty * output.count(token) + params.presence_penalty
    return x


def softmax(x):
    p = np.exp(x - x.max())
    return p / p.sum()


def kept(x, top_k, top_p, min_p):
    """bool[V]: min-p, then top-k, then top-p, each over what is left; ties at an edge all stay."""
    p = softmax(x)
    keep = p >= min_p * p.max() * (1 - 1e-6)
    if top_k:
        keep &= x >= np.sort(x)[::-1][min(top_k, len(x)) - 1]
    if top_p < 1:
        p = np.where(keep, p, 0)
        p /= p.sum()
        order = np.argsort(-p)
        size = np.searchsorted(np.cumsum(p[order]), top_p) + 1
        keep &= p >= p[order[min(size, len(p)) - 1]]
    return keep


def distribution(logits, params, position=100):
    x = adjusted(logits, params, PROMPT, OUTPUT, STOPS, position) / params.temperature
    return softmax(np.where(kept(x, params.top_k, params.top_p, params.min_p), x, -np.inf))


def assert_drawn_from(tokens, p):
    counts = np.bincount(tokens, minlength=len(p))
    assert counts[p == 0].sum() == 0, f"drew what has no probability: {np.flatnonzero((p == 0) & (counts > 0))}"
    expected = p * len(tokens)
    rare = expected < 5  # too few for the statistic: one cell together
    observed, expected = (np.append(a[~rare], a[rare].sum()) for a in (counts, expected))
    observed, expected = observed[expected > 0], expected[expected > 0]
    statistic = ((observed - expected) ** 2 / expected).sum()
    assert statistic <= stats.chi2.isf(FALSE_ALARM, max(len(expected) - 1, 1)), (observed, expected)


def draw(logits, state, slot=1, variant="full", first_position=100):
    rows = np.broadcast_to(logits, (DRAWS, V))
    positions = np.arange(first_position, first_position + DRAWS)
    return np.asarray(sample_jit(rows, state, np.full(DRAWS, slot), positions, variant, 0).tokens)


# ---- distributions ----


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.3},
        {"temperature": 1.7},
        {"top_k": 5},
        {"top_k": 1},
        {"top_k": 1000},
        {"top_p": 0.7},
        {"top_p": 1e-9},
        {"min_p": 0.2},
        {"min_p": 1.0},
        {"temperature": 1.5, "min_p": 0.05, "top_k": 9, "top_p": 0.8},
        {"presence_penalty": 1.5},
        {"frequency_penalty": 0.9},
        {"frequency_penalty": -1.0, "presence_penalty": -0.5},
        {"repetition_penalty": 1.8},
        {"repetition_penalty": 0.5},
        {"logit_bias": {4: 3.0, 9: -100.0, 36: 1.0}},
        {"allowed_token_ids": [0, 6, 31, 32, 36]},
        {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.3, "frequency_penalty": 0.4, "logit_bias": {5: 4}},
        {"allowed_token_ids": [1, 5, 6, 12, 35], "top_k": 3, "presence_penalty": 0.7, "temperature": 1.4},
    ],
    ids=str,
)
def test_draws_follow_the_distribution(params):
    params = SamplingParams(**params)
    logits = FLAT
    state = admit(empty_state(), 1, params, seed=11)
    assert_drawn_from(draw(logits, state), distribution(logits, params))


@pytest.mark.parametrize(
    "wrong", [{"temperature": 1.1}, {"min_p": 0.02}, {"presence_penalty": 0.5}, {"repetition_penalty": 1.5}], ids=str
)
def test_the_distribution_test_has_teeth(wrong):
    logits = FLAT
    tokens = draw(logits, admit(empty_state(), 1, SamplingParams(), seed=11))
    with pytest.raises(AssertionError):
        assert_drawn_from(tokens, distribution(logits, SamplingParams(**wrong)))


@pytest.mark.parametrize("seed_of", [lambda i: i, lambda i: i << 32, lambda i: -i - 2, lambda i: i * 2**33 + i])
def test_seeds_are_independent_draws(seed_of):
    logits = FLAT
    packed = np.stack([pack_scalars(i, SamplingParams(), seed_of(i), 3) for i in range(DRAWS)])
    state = write_slots(empty_state(DRAWS), packed)
    rows, positions = np.broadcast_to(logits, (DRAWS, V)), np.full(DRAWS, 17)
    tokens = np.asarray(sample_jit(rows, state, np.arange(DRAWS), positions, "random").tokens)
    assert_drawn_from(tokens, softmax(logits.astype(np.float64)))


def test_consecutive_positions_are_independent():
    logits = np.where(np.arange(V) < 4, 0, -np.inf).astype(np.float32)
    tokens = draw(logits, admit(empty_state(), 1, SamplingParams(), seed=8), variant="random")
    for lag in (1, 2, 7):
        assert_drawn_from(4 * tokens[:-lag] + tokens[lag:], np.full(16, 1 / 16))


def test_noise_is_gumbel_and_always_finite():
    zeros = jnp.zeros(50, jnp.uint32)
    keys = draw_module.keys_of({"seed_lo": zeros, "seed_hi": zeros, "position": jnp.arange(50)})
    ids = jnp.broadcast_to(jnp.arange(2000), (50, 2000))
    noise = np.asarray(draw_module.noise(keys, jnp.zeros(50, bool), ids)).ravel()
    assert stats.kstest(noise, stats.gumbel_r.cdf).pvalue > FALSE_ALARM
    extremes = np.asarray(draw_module.gumbel(jnp.array([0, 1, 2**31, 2**32 - 2, 2**32 - 1], jnp.uint32)))
    assert np.isfinite(extremes).all()
    assert extremes[0] > 20, "the upper tail is cut off"


# ---- exactness ----


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_rows_are_the_argmax_whatever_runs_beside_them(variant):
    state = empty_state()
    others = SamplingParams() if variant == "random" else SamplingParams(top_k=3, presence_penalty=1)
    for slot in range(SLOTS):
        greedy = slot % 2 == 0 or variant == "greedy"
        state = admit(state, slot, SamplingParams(temperature=0) if greedy else others, seed=slot)
    logits = np.round(logits_of(1, rows=SLOTS * 50))  # ties: the lowest id wins
    slots = np.tile(np.arange(SLOTS), 50)
    tokens = np.asarray(sample_jit(logits, state, slots, np.arange(len(slots)), variant, 5).tokens)
    greedy = (slots % 2 == 0) | (variant == "greedy")
    np.testing.assert_array_equal(tokens[greedy], logits.argmax(-1)[greedy])
    if variant != "greedy":
        assert (tokens[~greedy] != logits.argmax(-1)[~greedy]).any()


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    presence=st.floats(-2, 2),
    frequency=st.floats(-2, 2),
    repetition=st.floats(0.1, 10),
    prompt=st.lists(st.integers(0, V - 1), min_size=1, max_size=30),
    output=st.lists(st.integers(0, V - 1), max_size=30),
    bias=st.dictionaries(st.integers(0, V - 1), st.floats(-100, 100), max_size=V),
    allowed=st.none() | st.sets(st.integers(8, V - 1), min_size=1),
    min_tokens=st.integers(0, 30),
    max_tokens=st.none(),
)
def test_logits_are_adjusted_as_in_numpy(
    seed, presence, frequency, repetition, prompt, output, bias, allowed, min_tokens, max_tokens
):
    params = SamplingParams(
        temperature=0,
        presence_penalty=presence,
        frequency_penalty=frequency,
        repetition_penalty=repetition,
        logit_bias=bias,
        allowed_token_ids=sorted(allowed) if allowed else None,
        min_tokens=min_tokens,
        max_tokens=max_tokens,
    )
    logits = logits_of(seed, rows=8)
    state = admit(empty_state(), 2, params, prompt=prompt, output=output)
    position = len(prompt) + len(output)
    got = np.asarray(sample_jit(logits, state, np.full(8, 2), np.full(8, position), "full", 0).tokens)
    want = np.stack([adjusted(row, params, prompt, output, STOPS, position) for row in logits])
    chosen = want[np.arange(8), got]
    np.testing.assert_allclose(chosen, want.max(-1), rtol=1e-5, atol=1e-4)  # the argmax, but for rounding


def test_counts_follow_what_is_generated():
    params = SamplingParams(temperature=0, frequency_penalty=0.75, presence_penalty=0.5, repetition_penalty=1.25)
    logits = np.abs(logits_of(9)[0])
    state = admit(empty_state(), 3, params, output=[])
    output: list[int] = []
    count = jax.jit(count_tokens)
    for step in range(40):
        position = len(PROMPT) + step
        rows = np.stack([logits, logits])
        tokens = sample_jit(rows, state, np.array([3, 0]), np.array([position, 0]), "full", 0).tokens
        want = int(adjusted(logits, params, PROMPT, output, STOPS, 100).argmax())
        assert int(tokens[0]) == want
        state = count(state, np.array([3, 0]), tokens, np.array([True, False]))
        output.append(want)
    assert len(set(output)) > 5
    assert not np.asarray(state.counts[0]).any()
    resumed = full_row(params, PROMPT, output, STOPS, V)  # what a preempted request is admitted with again
    np.testing.assert_array_equal(np.asarray(state.counts[3]), resumed.counts)


def test_min_tokens_bans_stop_tokens_until_then():
    logits = np.zeros((1, V), np.float32)
    logits[0, STOPS] = 50
    params = SamplingParams(min_tokens=3, temperature=0)
    state = admit(empty_state(), 0, params, output=[])
    tokens = [
        int(sample_jit(logits, state, np.array([0]), np.array([len(PROMPT) + i]), "full", 0).tokens[0])
        for i in range(5)
    ]
    assert [token in STOPS for token in tokens] == [False, False, False, True, True]


logit = st.one_of(
    st.floats(-30, 30, width=32, allow_subnormal=False),  # devices flush those to zero
    st.sampled_from([-np.inf, 0.0, -0.0, 1.0, 1.5, -3e38, 3e38, 2e-38, -2e-38, 88.0]),
    st.integers(-3, 3).map(float),
)


@settings(max_examples=150)
@given(
    x=st.lists(logit, min_size=V, max_size=V).filter(lambda row: max(row) > -np.inf),
    top_k=st.integers(0, V + 3),
    top_p=st.one_of(st.just(1.0), st.floats(1e-6, 1, exclude_min=True)),
    min_p=st.one_of(st.just(0.0), st.floats(0, 1), st.sampled_from([1e-30, 1.0])),
)
def test_thresholds_keep_what_sorting_keeps(x, top_k, top_p, min_p):
    x = np.array(x, np.float32)
    row = {"top_k": np.array([top_k]), "top_p": np.float32([top_p]), "min_p": np.float32([min_p])}
    keep = x >= np.asarray(threshold(x[None], row))[0]
    assert keep[x == x.max()].all()
    slack = 1e-5  # float32 sums and exponentials decide on which side of an edge a token is
    with np.errstate(over="ignore"):
        least = kept(x.astype(np.float64), top_k, top_p * (1 - slack), min(min_p * (1 + slack), 1))
        most = kept(x.astype(np.float64), top_k, top_p + slack if top_p < 1 else 1, min_p * (1 - slack))
    # -inf and what underflows beside the maximum have probability 0: kept or not is no matter
    matters = softmax(x.astype(np.float64)) > 1e-37
    assert (least & matters <= keep).all()
    assert (keep & matters <= most).all()


threshold = jax.jit(draw_module.threshold)


@pytest.mark.parametrize("k", [1, 2, 19, 20, 21, V])
def test_top_k_is_exact_to_the_last_bit(k):
    """Neighbouring floats, on both sides of zero: nothing but an exact search tells them apart."""
    steps = np.random.default_rng(k).permutation(V) - V // 2
    x = np.where(steps < 0, -1, 1).astype(np.float32)
    for _ in range(V):
        x = np.where(steps != 0, np.nextafter(x, np.inf, dtype=np.float32), x)
        steps = steps - np.sign(steps)
    x[5] = x[6]
    row = {"top_k": np.array([k]), "top_p": np.ones(1, np.float32), "min_p": np.zeros(1, np.float32)}
    keep = x >= np.asarray(threshold(x[None], row))[0]
    np.testing.assert_array_equal(keep, x >= np.sort(x)[-k])


# ---- what a token may not depend on ----


def test_a_token_is_the_same_alone_and_in_any_batch_slot_and_variant():
    params = [
        SamplingParams(),
        SamplingParams(temperature=0.5, top_p=0.8),
        SamplingParams(top_k=7, repetition_penalty=1.2),
        SamplingParams(min_p=0.1, logprobs=3),
        SamplingParams(temperature=0),
    ]
    logits = logits_of(4, rows=len(params), vocab_size=1000)
    admit_wide = partial(admit, vocab_size=1000)
    alone = []
    for i, p in enumerate(params):
        state = admit_wide(empty_state(16, 1000), i, p, seed=40 + i)
        out = sample_jit(logits[i : i + 1], state, np.array([i]), np.array([60 + i]), variant_of(p), 3)
        alone.append(int(out.tokens[0]))
    rng = np.random.default_rng(0)
    for size in (5, 8, 13):
        slots = rng.permutation(15)[: len(params)]
        state = empty_state(16, 1000)
        for i, p in enumerate(params):
            state = admit_wide(state, slots[i], p, seed=40 + i)
        mine = rng.permutation(size)[: len(params)]
        rows, row_slots, positions = logits_of(77, size, 1000), np.full(size, 15), np.zeros(size, int)
        rows[mine], row_slots[mine], positions[mine] = logits, slots, 60 + np.arange(len(params))
        tokens = np.asarray(sample_jit(rows, state, row_slots, positions, "full", 3).tokens)
        assert tokens[mine].tolist() == alone


def test_a_slot_forgets_its_last_request():
    logits = logits_of(6, rows=64)
    demanding = SamplingParams(
        temperature=1.3,
        allowed_token_ids=[1],
        logit_bias={3: 100.0},
        presence_penalty=2,
        repetition_penalty=5,
        min_tokens=10,
        top_k=1,
        min_p=0.5,
    )
    used = admit(empty_state(), 1, demanding, seed=5)
    for successor in (SamplingParams(), SamplingParams(temperature=0), SamplingParams(top_p=0.9, logprobs=2)):
        fresh, reused = admit(empty_state(), 1, successor, seed=9), admit(used, 1, successor, seed=9)
        # beside a request that makes the step "full" and has large arrays of its own
        fresh, reused = admit(fresh, 2, demanding), admit(reused, 2, demanding)
        slots = np.array([1, 2] * 32)
        results = [sample_jit(logits, state, slots, np.arange(64), "full", 0).tokens for state in (fresh, reused)]
        np.testing.assert_array_equal(*results)
        assert len(set(np.asarray(results[0])[::2].tolist())) > 5
        assert set(np.asarray(results[0])[1::2].tolist()) == {1}


def test_a_request_can_be_written_into_any_slot_and_padding_into_none():
    state = admit(empty_state(), SLOTS - 1, SamplingParams(temperature=0.25, top_k=4), seed=-(2**63))
    assert np.asarray(state.temperature).tolist() == [0, 0, 0, 0.25]
    assert np.asarray(state.top_k).tolist() == [0, 0, 0, 4]
    assert np.asarray(state.seed_hi).tolist() == [0, 0, 0, 2**31]
    untouched = write_full_slot(state, np.int32(SLOTS), full_row(SamplingParams(), PROMPT, OUTPUT, STOPS, V))
    jax.tree.map(np.testing.assert_array_equal, state, untouched)


def test_masks_hold_the_tokens_they_were_made_of():
    for size in (31, 32, 33, 64, 257):
        ids = np.unique(np.random.default_rng(size).integers(0, size, 20))
        words = full_row(SamplingParams(allowed_token_ids=ids.tolist()), [0], [], [size - 1], size)
        unpacked = np.asarray(sampler._unpack(jnp.stack([words.allowed, words.stop_mask]), size))
        assert np.flatnonzero(unpacked[0]).tolist() == ids.tolist()
        assert np.flatnonzero(unpacked[1]).tolist() == [size - 1]


@pytest.mark.parametrize("vocab_size", [V, 1000])  # a few and enough for vector instructions, which pass over a NaN
def test_nan_logits_give_no_token(vocab_size):
    logits, state = logits_of(0, rows=2, vocab_size=vocab_size), empty_state(vocab_size=vocab_size)
    logits[1, 3] = np.nan
    for variant in VARIANTS:
        tokens = sample_jit(logits, state, np.array([0, 1]), np.array([0, 0]), variant, 0).tokens
        assert np.asarray(tokens).tolist() == [int(logits[0].argmax()), -1]


# ---- logprobs ----


@pytest.mark.parametrize("vocab_size", [5, 128, 129, 257, 1000])
@pytest.mark.parametrize("n", [0, 1, 20])
@pytest.mark.parametrize("ties", [False, True])
def test_logprobs_ranks_and_top_n(vocab_size, n, ties):
    logits = logits_of(vocab_size + n, rows=6, vocab_size=vocab_size, scale=4)
    if ties:
        logits = np.round(logits) + 0.0  # no -0.0, which top_k takes to be less than 0.0
    logits[5, 3:] = -np.inf  # fewer tokens than are asked for
    targets = np.random.default_rng(1).integers(0, vocab_size, 6)
    out = jax.tree.map(np.asarray, prompt_logprobs(jnp.asarray(logits), jnp.asarray(targets), n))
    exact = logits.astype(np.float64)
    logprobs = exact - np.log(np.exp(exact).sum(-1, keepdims=True))
    np.testing.assert_allclose(out.logprobs, logprobs[np.arange(6), targets], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(out.rank, 1 + (logits > logits[np.arange(6), targets][:, None]).sum(-1))
    best = np.argsort(-logits, axis=-1, kind="stable")[:, :n]
    np.testing.assert_array_equal(out.top_ids, best)
    np.testing.assert_allclose(out.top_logprobs, np.take_along_axis(logprobs, best, 1), rtol=1e-5, atol=1e-5)


def test_sampled_logprobs_are_the_models_own():
    """Whatever was done to the logits to draw: not biased, not penalised, not tempered."""
    params = SamplingParams(temperature=0.5, logit_bias={8: 20.0}, repetition_penalty=2, top_k=4, logprobs=3)
    logits = logits_of(2, rows=8)
    state = admit(empty_state(), 1, params)
    out = sample_jit(logits, state, np.ones(8, int), np.arange(8), "full", 3)
    want = prompt_logprobs(jnp.asarray(logits), out.tokens, 3)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), tuple(out), tuple(want))
    assert (np.asarray(out.tokens) == 8).all()


def test_nothing_is_computed_that_no_row_asks_for():
    state = admit(empty_state(), 1, SamplingParams(top_k=3))
    out = sample_jit(logits_of(2), state, np.array([1]), np.array([5]), "full", 3)
    assert not np.asarray(out.top_logprobs).any()
    for variant in ("greedy", "random"):
        assert sample_jit(logits_of(2), state, np.array([1]), np.array([5]), variant, 3)[1:] == (None,) * 4


@pytest.mark.parametrize(
    ("params", "variant", "full"),
    [
        ({"temperature": 0}, "greedy", False),
        ({"temperature": 0, "top_p": 0.5, "top_k": 3, "min_p": 0.2}, "greedy", False),
        ({}, "random", False),
        ({"seed": 3, "temperature": 0.2, "stop_token_ids": [4]}, "random", False),
        ({"top_p": 0.5}, "filtered", False),
        ({"top_k": 3}, "filtered", False),
        ({"min_p": 0.1}, "filtered", False),
        ({"temperature": 0, "logprobs": 0}, "full", False),
        ({"prompt_logprobs": 0}, "full", False),
        ({"temperature": 0, "presence_penalty": 0.1}, "full", True),
        ({"frequency_penalty": -0.1}, "full", True),
        ({"repetition_penalty": 0.9}, "full", True),
        ({"min_tokens": 1}, "full", True),
        ({"logit_bias": {1: 0.5}}, "full", True),
        ({"allowed_token_ids": [0]}, "full", True),
    ],
    ids=str,
)
def test_the_cheapest_variant_that_serves(params, variant, full):
    params = SamplingParams(**params)
    assert variant_of(params) == variant
    assert sampler.needs_full_row(params) == full


# ---- what CUDA runs instead, here on the CPU ----


@pytest.mark.parametrize("variant", ["greedy", "random"])
def test_an_output_head_is_told_what_it_takes_the_same_tokens_with(variant):
    rows, vocab_size = 40, 600
    logits = logits_of(9, rows, vocab_size)
    params = [SamplingParams(temperature=0 if variant == "greedy" else i % 4 / 2) for i in range(rows)]
    packed = np.stack([pack_scalars(i, params[i], seed=7 * i << 30, prompt_len=3) for i in range(rows)])
    state, slots, positions = write_slots(empty_state(rows, vocab_size), packed), np.arange(rows)[::-1], np.arange(rows)

    def best_tokens(keys=None, temperature=None):
        """A hash for every token, and float64."""
        if keys is None:
            return logits.argmax(axis=1)
        ids = np.arange(vocab_size)
        counters = np.tile(ids // noise.PAIR * noise.RUN + ids % noise.RUN, (rows, 1)).astype(np.uint32)
        words = noise.threefry(*(np.tile(keys[:, i : i + 1], vocab_size) for i in range(2)), counters)
        gumbel = np.asarray(noise.gumbel(jnp.where(ids % noise.PAIR < noise.RUN, *words)), np.float64)
        temperature = np.asarray(temperature, np.float64)[:, None]
        return np.where(temperature > 0, logits / np.where(temperature > 0, temperature, 1) + gumbel, logits).argmax(1)

    tokens = sampler.tokens_without_logits(best_tokens, state, slots, positions, variant)
    np.testing.assert_array_equal(tokens, sample_jit(logits, state, slots, positions, variant).tokens)
    assert sampler.tokens_without_logits(lambda *_: None, state, slots, positions, variant) is None


by_blocks = jax.jit(lambda x, rows: draw_module._draw_by_blocks(x, draw_module.keys_of(rows), rows["temperature"] == 0))
plainly = jax.jit(lambda x, rows: draw_module._draw_plainly(x, draw_module.keys_of(rows), rows["temperature"] == 0))
from_whole_rows = jax.jit(lambda x, rows: draw_module._draw_from_rows(draw_module.at_temperature(x, rows), rows))
in_one_pass = jax.jit(draw_module._best_in_one_pass)


@jax.jit
def from_blocks(logits, rows):
    x = draw_module._tempered(logits, rows)
    return draw_module._draw_from_blocks(lambda: x, draw_module.blocks_of(x), rows)


def random_rows(rng, count):
    """Sampling parameters of a batch, as the step's program has them: each filter on or off, k from 1 to all."""

    def some(on, off):
        return np.where(rng.random(count) < 0.6, on, off)

    return {
        "temperature": some(rng.uniform(0.1, 2, count), 0).astype(np.float32),
        "top_k": some(rng.choice([1, 2, 40, 63, 64, 65, 900, 10**6], count), 0).astype(np.int32),
        "top_p": some(rng.uniform(0.01, 0.999, count), 1).astype(np.float32),
        "min_p": some(rng.uniform(0, 0.5, count), 0).astype(np.float32),
        "seed_lo": rng.integers(0, 2**32, count, dtype=np.uint32),
        "seed_hi": rng.integers(0, 2**32, count, dtype=np.uint32),
        "position": rng.integers(0, 4096, count).astype(np.int32),
    }


def awkward_logits(rng, count, vocab_size):
    """Peaked, flat, with ties, with few tokens allowed, and one row with a NaN."""
    x = rng.normal(size=(count, vocab_size)) * rng.choice([0.01, 0.5, 3.0, 10.0], (count, 1))
    x = np.where(rng.random((count, 1)) < 0.2, np.round(x), x)
    allowed = rng.random((count, vocab_size)) < rng.choice([0.02, 0.3, 1, 1, 1], (count, 1))
    allowed[:, rng.integers(vocab_size)] = True
    x = np.where(allowed, x, -np.inf)
    x[rng.integers(count), rng.integers(vocab_size)] = np.nan
    return x.astype(np.float32)


@pytest.mark.parametrize("vocab_size", [5, 128, 300, 1000, 40_001])
def test_blocks_draw_what_whole_rows_draw(vocab_size):
    rng = np.random.default_rng(vocab_size)
    for _ in range(6):
        x, rows = awkward_logits(rng, 40, vocab_size), random_rows(rng, 40)
        np.testing.assert_array_equal(by_blocks(x, rows), plainly(x, rows))
        np.testing.assert_array_equal(from_blocks(x, rows), from_whole_rows(x, rows))
        expected = np.where(np.isnan(x).any(axis=1), -1, np.argmax(x, axis=1))
        np.testing.assert_array_equal(in_one_pass(x), expected)


@pytest.mark.parametrize("biased", [False, True])
def test_adjusting_in_one_pass_is_adjusting(biased):
    logits, state, slots = logits_of(5, rows=SLOTS), empty_state(), np.arange(SLOTS)
    penalties = SamplingParams(presence_penalty=0.5, repetition_penalty=1.3, min_tokens=9)
    bias = SamplingParams(logit_bias={4: 3.0, 36: -2.0}, frequency_penalty=0.4)
    for slot, params in enumerate([SamplingParams(), penalties, bias if biased else penalties]):
        state = admit(state, slot, params)
    rows = {name: getattr(state, name)[:SLOTS] for name in sampler._SCALARS} | {"position": np.full(SLOTS, 12)}
    adjust = jax.jit(partial(sampler._adjusted, then=jnp.negative), static_argnames="in_one_pass")
    got, want = (np.asarray(adjust(logits, state, slots, rows, in_one_pass=one)) for one in (True, False))
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(got[[0, 3]], -logits[[0, 3]])
    for slot, params in ((1, penalties), (2, bias if biased else penalties)):
        expected = adjusted(logits[slot], params, PROMPT, OUTPUT, STOPS, 12)
        np.testing.assert_allclose(-got[slot], expected, rtol=1e-5)
