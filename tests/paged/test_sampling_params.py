"""Every range of PEERS' table, at its edges, and what is refused beyond them."""

import copy
import math
import pickle
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paged.errors import InvalidRequestError
from paged.sampling_params import SamplingParams

NOT_NUMBERS = [True, "1", [1], math.nan, math.inf, -math.inf, 1j, Decimal(1), np.float32("nan"), np.array([1, 2])]
NOT_INTEGERS = [*NOT_NUMBERS, 1.0, np.float64(1)]


def refused(param, **fields):
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(**fields)
    assert caught.value.param == param
    assert str(caught.value).startswith(param)
    return str(caught.value)


def test_defaults():
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k, params.min_p) == (1, 1.0, 1.0, 0, 0.0)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (0.0, 0.0, 1.0)
    assert (params.seed, params.max_tokens, params.min_tokens) == (None, 16, 0)
    assert (params.stop, params.stop_strings, params.stop_token_ids) == ((), (), ())
    assert (params.logprobs, params.prompt_logprobs, params.logit_bias, params.allowed_token_ids) == (None,) * 4
    assert params.detokenize and params.skip_special_tokens and params.spaces_between_special_tokens
    assert not params.include_stop_str_in_output and not params.ignore_eos


@pytest.mark.parametrize(
    ("param", "accepted", "out_of_range"),
    [
        ("presence_penalty", [-2, 0, 2, 0.5], [-2.001, 2.001, 10**400]),
        ("frequency_penalty", [-2, 0, 2.0], [-2.1, 3]),
        ("repetition_penalty", [1e-3, 1, 100], [0, -1, 1e-30, 1e30]),
        ("temperature", [0, 1e-9, 0.7, 2], [-0.1, 2.1]),
        ("top_p", [1e-9, 0.5, 1], [0, -0.1, 1.1]),
        ("min_p", [0, 0.5, 1], [-0.1, 1.1]),
    ],
)
def test_numbers(param, accepted, out_of_range):
    for value in accepted:
        for same in (value, np.float64(value)):
            assert math.isclose(getattr(SamplingParams(**{"temperature": 1, param: same}), param), value)
            assert type(getattr(SamplingParams(**{"temperature": 1, param: same}), param)) is float
    for value in [*out_of_range, *NOT_NUMBERS, None]:
        refused(param, **{param: value})


@pytest.mark.parametrize(
    ("param", "accepted", "out_of_range"),
    [
        ("n", [1, 2, 128], [0, -1]),
        ("top_k", [0, 1, 10**6], [-2]),
        ("seed", [0, 7, -(2**63), 2**63, 2**64 - 1], [-(2**63) - 1, 2**64, 10**5000]),
        ("max_tokens", [1, 10**6], [0, -1]),
        ("min_tokens", [0, 1, 16], [-1]),
        ("logprobs", [-1, 0, 20], [-2]),
        ("prompt_logprobs", [-1, 0, 20], [-2]),
    ],
)
def test_integers(param, accepted, out_of_range):
    for value in accepted:
        assert getattr(SamplingParams(**{param: value}), param) == value
        if -(2**63) <= value < 2**63:
            got = getattr(SamplingParams(**{param: np.int64(value)}), param)
            assert got == value and type(got) is int
    for value in [*out_of_range, *NOT_INTEGERS]:
        refused(param, **{param: value})


@pytest.mark.parametrize("param", ["n", "top_k", "min_tokens"])
def test_integers_that_cannot_be_left_out(param):
    refused(param, **{param: None})


@pytest.mark.parametrize(
    "param",
    [
        "include_stop_str_in_output",
        "ignore_eos",
        "detokenize",
        "skip_special_tokens",
        "spaces_between_special_tokens",
    ],
)
def test_booleans(param):
    for value in (True, False):
        assert getattr(SamplingParams(**{param: value}), param) is value
    for value in (1, 0, "true", None):
        refused(param, **{param: value})


def test_values_that_mean_off_are_made_one():
    assert SamplingParams(top_k=-1).top_k == 0
    assert SamplingParams(seed=-1).seed is None
    assert SamplingParams(logit_bias={}).logit_bias is None
    assert SamplingParams(max_tokens=None).max_tokens is None


def test_greedy_ignores_the_filters_and_allows_several_completions():
    for temperature in (0, 0.9e-5):
        params = SamplingParams(temperature=temperature, top_p=0.5, top_k=3, min_p=0.1, n=2, presence_penalty=1)
        assert params.greedy
        assert (params.top_p, params.top_k, params.min_p) == (1.0, 0, 0.0)
        assert (params.n, params.presence_penalty) == (2, 1.0)
    assert not SamplingParams(temperature=1e-5).greedy
    refused("top_p", temperature=0, top_p=7)  # ignored is not unchecked


def test_stop_strings():
    assert SamplingParams(stop="end").stop == ("end",)
    assert SamplingParams(stop=["a", "b"]).stop_strings == ("a", "b")
    assert SamplingParams(stop=[]).stop == ()
    for value in ("", ["a", ""], [1], ["a", None], 3, b"end", [b"end"], {"a": 1}):
        refused("stop", stop=value)
    assert "stop_token_ids" in refused("stop", stop="x", detokenize=False)
    assert SamplingParams(detokenize=False, stop=[]).stop == ()


@pytest.mark.parametrize("param", ["stop_token_ids", "allowed_token_ids"])
def test_token_ids(param):
    for value in ([3, 0], (3, 0), np.array([3, 0]), range(3, -1, -3)):
        got = getattr(SamplingParams(**{param: value}), param)
        assert got == (3, 0) and all(type(i) is int for i in got)
    for value in ([-1], [True], [1.0], ["1"], "12", 5, [None], {1: 2}, [[1]]):
        refused(param, **{param: value})


def test_no_allowed_token_is_refused():
    refused("allowed_token_ids", allowed_token_ids=[])
    assert SamplingParams(stop_token_ids=[]).stop_token_ids == ()


def test_logit_bias():
    assert SamplingParams(logit_bias={5: -100, "7": 100, np.int32(9): 0.5}).logit_bias == {5: -100.0, 7: 100.0, 9: 0.5}
    assert len(SamplingParams(logit_bias=dict.fromkeys(range(300), 1)).logit_bias or {}) == 300
    refused("logit_bias", logit_bias=dict.fromkeys(range(301), 1))
    for value in ({1: 100.5}, {1: -101}, {1: math.nan}, {1: True}, {1: "2"}, {1: None}):
        refused("logit_bias", logit_bias=value)
    for value in ({-1: 1}, {"a": 1}, {"-1": 1}, {"": 1}, {"²": 1}, {1.0: 1}, {True: 1}, {None: 1}, {"9" * 5000: 1}):
        refused("logit_bias", logit_bias=value)
    for value in ([1, 2], "1", 3, [[1, 2]]):
        refused("logit_bias", logit_bias=value)
    assert "twice" in refused("logit_bias", logit_bias={5: 1, "5": 2})


def test_the_callers_containers_are_not_kept():
    stop, bias = ["a"], {1: 1.0}
    params = SamplingParams(stop=stop, logit_bias=bias)
    stop.append("")
    bias[1] = 1e9
    assert params.stop == ("a",) and params.logit_bias == {1: 1.0}


def test_min_tokens_is_at_most_max_tokens():
    assert SamplingParams(min_tokens=5, max_tokens=5).min_tokens == 5
    assert SamplingParams(min_tokens=5000, max_tokens=None).min_tokens == 5000
    message = refused("min_tokens", min_tokens=6, max_tokens=5)
    assert "6" in message and "5" in message


def test_min_tokens_needs_a_token_that_does_not_end_the_generation():
    stops = {"stop_token_ids": [3, 4], "max_tokens": 9}
    refused("allowed_token_ids", allowed_token_ids=[4], min_tokens=1, **stops)
    assert SamplingParams(allowed_token_ids=[4], **stops)
    params = SamplingParams(allowed_token_ids=[4, 5], min_tokens=1, **stops)
    params.validate_for(10, 20, stop_token_ids={3, 4})
    with pytest.raises(InvalidRequestError, match="another token"):
        params.validate_for(10, 20, stop_token_ids={3, 4, 5})


@pytest.mark.parametrize(
    ("param", "accepted", "value"),
    [
        ("stop_token_ids", [99], [5, 100]),
        ("allowed_token_ids", [99], [100]),
        ("logit_bias", {99: 1}, {100: 1}),
        ("logprobs", 20, 21),
        ("logprobs", -1, 21),
        ("prompt_logprobs", 20, 21),
        ("min_tokens", 49, 50),
    ],
)
def test_limits_of_the_engine(param, accepted, value):
    limits = {"vocab_size": 100, "max_logprobs": 20, "max_model_len": 50}
    SamplingParams(max_tokens=None, **{param: accepted}).validate_for(**limits)
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(max_tokens=None, **{param: value}).validate_for(**limits)
    assert caught.value.param == param
    SamplingParams(max_tokens=None, min_tokens=50).validate_for(100, 20)


anything = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.one_of(st.integers(-3, 5), st.text(max_size=2), st.none()), max_size=3),
    st.dictionaries(
        st.one_of(st.integers(-3, 5), st.text(max_size=2)), st.one_of(st.floats(), st.integers()), max_size=3
    ),
)


@settings(max_examples=300)
@given(st.dictionaries(st.sampled_from(sorted(SamplingParams.__dataclass_fields__)), anything, max_size=4))
def test_any_input_is_refused_by_name_or_made_regular(fields):
    try:
        params = SamplingParams(**fields)
    except InvalidRequestError as error:
        assert error.param in SamplingParams.__dataclass_fields__
        return
    again = SamplingParams(**vars(params))
    assert again == params == pickle.loads(pickle.dumps(params)) == copy.deepcopy(params)
    assert 0 <= params.temperature <= 2 and 0 < params.top_p <= 1 and 0 <= params.min_p <= 1 and params.top_k >= 0
    assert params.max_tokens is None or params.min_tokens <= params.max_tokens
