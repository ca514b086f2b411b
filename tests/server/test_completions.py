"""/v1/completions through OpenAI's client."""

import itertools
import json

import httpx
import numpy as np
import pytest

GREEDY = {"temperature": 0, "extra_body": {"repetition_penalty": 1.0, "ignore_eos": True}}
PROMPT = "Ein Prompt: "


@pytest.fixture
def client(tiny):
    return tiny.client()


def complete(client, prompt=PROMPT, *, extra_body=None, **options):
    extra_body = GREEDY["extra_body"] | (extra_body or {})
    return client.completions.create(
        model="tiny", prompt=prompt, **{"temperature": 0, "max_tokens": 12} | options, extra_body=extra_body
    )


def by_choice(stream) -> dict[int, list]:
    choices: dict[int, list] = {}
    for chunk in stream:
        for choice in chunk.choices:
            choices.setdefault(choice.index, []).append(choice)
    return choices


def test_shape(client):
    answer = complete(client)
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    assert answer.model == "tiny"
    assert [choice.index for choice in answer.choices] == [0]
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.prompt_tokens == len(PROMPT)
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == len(PROMPT) + 12


def test_greedy_is_repeatable(client):
    assert complete(client).choices[0].text == complete(client).choices[0].text


def test_default_length_is_16(client):
    answer = client.completions.create(model="tiny", prompt=PROMPT, extra_body={"ignore_eos": True})
    assert answer.usage.completion_tokens == 16


def test_default_length_is_what_is_left_near_the_end_of_the_context(client):
    answer = client.completions.create(model="tiny", prompt="a" * 8187, extra_body={"ignore_eos": True})
    assert answer.usage.completion_tokens == 5
    assert answer.choices[0].finish_reason == "length"


def test_unset_fields_come_from_the_models_generation_config(client):
    def text(**fields):
        answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=24, seed=5, **fields)
        return answer.choices[0].text

    spelled_out = text(temperature=0.4, extra_body={"top_k": 7, "repetition_penalty": 1.3})
    assert text() == spelled_out
    assert text(temperature=1.9, extra_body={"top_k": 0, "repetition_penalty": 1.0}) != spelled_out


def test_prompts_in_all_four_forms(client):
    texts = [PROMPT, "ünï🌍"]
    token_ids = [[*map(int, tokens)] for tokens in (tokenize(client, text) for text in texts)]
    expected = [complete(client, text).choices[0].text for text in texts]
    for prompt in (texts, token_ids):
        answer = complete(client, prompt)
        assert [choice.index for choice in answer.choices] == [0, 1]
        assert [choice.text for choice in answer.choices] == expected
        assert answer.usage.prompt_tokens == sum(map(len, token_ids))
    assert complete(client, token_ids[0]).choices[0].text == expected[0]


def tokenize(client, text: str) -> list[int]:
    url = str(client.base_url).removesuffix("/v1/") + "/tokenize"
    return httpx.post(url, json={"prompt": text}).json()["tokens"]


def test_many_prompts_times_n(client):
    answer = complete(client, ["a", "b", "c"], n=2)
    assert [choice.index for choice in answer.choices] == list(range(6))
    single = [complete(client, prompt).choices[0].text for prompt in "abc"]
    assert [choice.text for choice in answer.choices] == [text for text in single for _ in range(2)]
    assert answer.usage.prompt_tokens == 3
    assert answer.usage.completion_tokens == 6 * 12


def test_n_with_a_seed(client):
    def texts():
        return [c.text for c in complete(client, n=3, seed=11, temperature=1.0, max_tokens=20).choices]

    first = texts()
    assert first == texts()
    assert len(set(first)) == 3


@pytest.mark.parametrize("options", [{}, {"n": 3, "seed": 4, "temperature": 1.0}, {"prompt": ["a", "b", "c"]}])
def test_stream_equals_the_whole(client, options):
    whole = complete(client, **options, max_tokens=40).choices
    streamed = by_choice(complete(client, **options, max_tokens=40, stream=True))
    assert sorted(streamed) == list(range(len(whole)))
    for choice in whole:
        chunks = streamed[choice.index]
        assert "".join(chunk.text for chunk in chunks) == choice.text
        assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
        assert chunks[-1].finish_reason == choice.finish_reason == "length"


def test_choices_of_a_stream_are_interleaved(client):
    order = [c.index for chunk in complete(client, n=2, max_tokens=60, stream=True) for c in chunk.choices]
    switches = sum(a != b for a, b in itertools.pairwise(order))
    assert switches > 2


def test_stream_usage(client):
    chunks = list(complete(client, stream=True, n=2, stream_options={"include_usage": True}))
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    usage = chunks[-1].usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (len(PROMPT), 24, len(PROMPT) + 24)
    assert len({chunk.id for chunk in chunks}) == 1


def test_stream_on_the_wire(tiny):
    body = {"prompt": PROMPT, "max_tokens": 5, "temperature": 0, "stream": True, "ignore_eos": True}
    body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    response = tiny.post("/v1/completions", body)
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, done, end = response.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    counts = [json.loads(event.removeprefix("data: "))["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts)
    assert counts[-1] == 5


def test_stop_string(client):
    text = complete(client, max_tokens=60).choices[0].text
    stop = text[20:23]
    before = text[: text.index(stop)]
    for stream in (False, True):
        kept = complete(client, max_tokens=60, stop=["never there", stop], stream=stream)
        choices = by_choice(kept)[0] if stream else kept.choices
        assert "".join(choice.text for choice in choices) == before
        assert choices[-1].finish_reason == "stop"
        assert choices[-1].stop_reason == stop
    included = complete(client, max_tokens=60, stop=stop, extra_body={"include_stop_str_in_output": True})
    assert included.choices[0].text == before + stop


def test_stop_token(client):
    answer = complete(client, extra_body={"return_token_ids": True})
    stop = answer.choices[0].token_ids[5]
    first = answer.choices[0].token_ids.index(stop)
    stopped = complete(client, extra_body={"stop_token_ids": [stop], "return_token_ids": True}).choices[0]
    assert stopped.token_ids[:first] == answer.choices[0].token_ids[:first]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", stop)


def test_logprobs(client):
    choice = complete(client, logprobs=4, extra_body={"return_token_ids": True}).choices[0]
    logprobs = choice.logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == 12
    for token, value, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert value == max(top.values())  # greedy
        assert top[token] == value
        assert 1 <= len(top) <= 5  # tokens of one text are one entry
        assert sum(np.exp(list(top.values()))) <= 1 + 1e-6
    lengths = [len(token) for token in logprobs.tokens]
    assert logprobs.text_offset == [0, *itertools.accumulate(lengths[:-1])]


@pytest.mark.parametrize("n", [1, 2])
def test_streamed_logprobs_equal_the_whole(client, n):
    whole = complete(client, logprobs=2, echo=True, n=n).choices
    streamed = by_choice(complete(client, logprobs=2, echo=True, n=n, stream=True))
    for choice in whole:
        parts = [chunk.logprobs for chunk in streamed[choice.index] if chunk.logprobs]
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            assert [item for part in parts for item in getattr(part, name)] == getattr(choice.logprobs, name)


def test_tokens_as_ids(client):
    choice = complete(client, logprobs=1, extra_body={"return_token_ids": True, "return_tokens_as_token_ids": True})
    choice = choice.choices[0]
    assert choice.logprobs.tokens == [f"token_id:{token}" for token in choice.token_ids]


def test_echo(client):
    plain = complete(client).choices[0].text
    assert complete(client, echo=True).choices[0].text == PROMPT + plain
    assert "".join(c.text for c in by_choice(complete(client, echo=True, stream=True))[0]) == PROMPT + plain
    token_ids = tokenize(client, PROMPT)
    assert complete(client, token_ids, echo=True).choices[0].text == PROMPT + plain


def test_echo_without_generation_scores_the_prompt(client):
    generated = complete(client, logprobs=3, extra_body={"return_token_ids": True}).choices[0]
    whole = tokenize(client, PROMPT) + generated.token_ids
    scored = complete(client, whole, max_tokens=0, echo=True, logprobs=3)
    assert scored.usage.completion_tokens == 0
    assert scored.usage.prompt_tokens == len(whole)
    choice = scored.choices[0]
    assert choice.finish_reason == "length"
    assert len(choice.logprobs.tokens) == len(whole)
    assert choice.logprobs.token_logprobs[0] is None
    assert choice.logprobs.top_logprobs[0] is None
    tail = choice.logprobs.token_logprobs[-len(generated.token_ids) :]
    np.testing.assert_allclose(tail, generated.logprobs.token_logprobs, atol=1e-4)


def test_prompt_logprobs(client):
    choice = complete(client, extra_body={"prompt_logprobs": 2}).choices[0]
    assert choice.prompt_logprobs[0] is None
    assert len(choice.prompt_logprobs) == len(PROMPT)
    for token, candidates in zip(tokenize(client, PROMPT)[1:], choice.prompt_logprobs[1:], strict=True):
        assert 2 <= len(candidates) <= 3
        assert candidates[str(token)]["logprob"] <= 0
        assert {1, 2} <= {candidate["rank"] for candidate in candidates.values()}


def test_token_ids_are_returned(client):
    whole = complete(client, extra_body={"return_token_ids": True}).choices[0]
    assert whole.prompt_token_ids == tokenize(client, PROMPT)
    assert len(whole.token_ids) == 12
    chunks = by_choice(complete(client, stream=True, extra_body={"return_token_ids": True}))[0]
    assert [token for chunk in chunks for token in chunk.token_ids] == whole.token_ids
    assert chunks[0].prompt_token_ids == whole.prompt_token_ids


def test_truncation_keeps_the_end(client):
    tail = complete(client, "bcd").choices[0].text
    answer = complete(client, "aaabcd", echo=True, extra_body={"truncate_prompt_tokens": 3})
    assert answer.choices[0].text == "bcd" + tail
    assert answer.usage.prompt_tokens == 3


def test_cached_tokens_are_counted(client):
    prompt = "the same long prompt " * 10
    complete(client, prompt)
    cached = complete(client, prompt).usage.prompt_tokens_details.cached_tokens
    assert 0.8 * len(prompt) < cached < len(prompt)
    salted = complete(client, prompt, extra_body={"cache_salt": "other tenant"})
    assert salted.usage.prompt_tokens_details.cached_tokens == 0


def test_logit_bias_and_allowed_tokens(client):
    forced = complete(client, logit_bias={"65": 100}, extra_body={"return_token_ids": True, "ignore_eos": True})
    assert forced.choices[0].token_ids == [65] * 12
    allowed = complete(client, temperature=1.5, extra_body={"allowed_token_ids": [70, 71], "return_token_ids": True})
    assert set(allowed.choices[0].token_ids) <= {70, 71}


def test_request_id(tiny):
    body = {"prompt": PROMPT, "max_tokens": 1}
    for given in ({"json": body | {"request_id": "mine"}}, {"json": body, "headers": {"x-request-id": "mine"}}):
        response = httpx.post(tiny.url + "/v1/completions", **given)
        assert response.json()["id"] == "cmpl-mine"
        assert response.headers["x-request-id"] == "cmpl-mine"
