"""Every bad input has its status and OpenAI's error body, which names the field at fault."""

import httpx
import pytest

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]


def completion(**fields):
    return {"prompt": "hi", "max_tokens": 2} | fields


def chat(**fields):
    return {"messages": HI, "max_tokens": 2} | fields


def content(part):
    return {"messages": [{"role": "user", "content": [part]}]}


BAD_COMPLETIONS = [
    ({}, "prompt", "missing_field"),
    (completion(prompt=5), "prompt", "invalid_type"),
    (completion(prompt=[]), "prompt", "invalid_type"),
    (completion(prompt=""), "prompt", "invalid_value"),
    (completion(prompt=[1, "a"]), "prompt", "invalid_type"),
    (completion(prompt=["a", 1]), "prompt.1", "invalid_type"),
    (completion(prompt=[[1], []]), "prompt", "invalid_value"),
    (completion(prompt=[258]), "prompt", "invalid_value"),
    (completion(prompt=[-1]), "prompt", "invalid_value"),
    (completion(prompt=[True]), "prompt.0", "invalid_type"),
    (completion(prompt=["a"] * 65), "n", "invalid_value"),
    (completion(n=0), "n", "invalid_value"),
    (completion(n=65), "n", "invalid_value"),
    (completion(n="2"), "n", "invalid_type"),
    (completion(best_of=3), "best_of", "invalid_value"),
    (completion(temperature="hot"), "temperature", "invalid_type"),
    (completion(temperature=2.5), "temperature", "invalid_value"),
    (completion(temperature=-0.1), "temperature", "invalid_value"),
    (completion(temperature=True), "temperature", "invalid_type"),
    (completion(top_p=0), "top_p", "invalid_value"),
    (completion(top_k=-2), "top_k", "invalid_value"),
    (completion(top_k=1.5), "top_k", "invalid_type"),
    (completion(min_p=1.1), "min_p", "invalid_value"),
    (completion(presence_penalty=3), "presence_penalty", "invalid_value"),
    (completion(frequency_penalty=-3), "frequency_penalty", "invalid_value"),
    (completion(repetition_penalty=0), "repetition_penalty", "invalid_value"),
    (completion(seed=1.5), "seed", "invalid_type"),
    (completion(seed=2**70), "seed", "invalid_value"),
    (completion(stop=""), "stop", "invalid_value"),
    (completion(stop=7), "stop", "invalid_value"),
    (completion(stop_token_ids=["a"]), "stop_token_ids.0", "invalid_type"),
    (completion(stop_token_ids=[258]), "stop_token_ids", "invalid_value"),
    (completion(max_tokens=-1), "max_tokens", "invalid_value"),
    (completion(max_tokens=0), "max_tokens", "invalid_value"),
    (completion(min_tokens=3), "min_tokens", "invalid_value"),
    (completion(logprobs=True), "logprobs", "invalid_type"),
    (completion(logprobs=21), "logprobs", "invalid_value"),
    (completion(logprobs=2, echo=True, prompt_logprobs=3), "prompt_logprobs", "invalid_value"),
    (completion(prompt_logprobs=1, stream=True), "prompt_logprobs", "invalid_value"),
    (completion(logit_bias={"x": 1}), "logit_bias", "invalid_value"),
    (completion(logit_bias={"5": 101}), "logit_bias", "invalid_value"),
    (completion(logit_bias={"258": 1}), "logit_bias", "invalid_value"),
    (completion(allowed_token_ids=[]), "allowed_token_ids", "invalid_value"),
    (completion(stream="yes"), "stream", "invalid_type"),
    (completion(stream_options={"include_usage": True}), "stream_options", "invalid_value"),
    (completion(stream=True, stream_options={"x": 1}), "stream_options.x", "unknown_field"),
    (completion(suffix="end"), "suffix", "unsupported_field"),
    (completion(response_format={"type": "json_object"}), "response_format", "unsupported_field"),
    (completion(guided_json={}), "guided_json", "unsupported_field"),
    (completion(use_beam_search=True), "use_beam_search", "unsupported_field"),
    (completion(bad_words=["no"]), "bad_words", "unsupported_field"),
    (completion(store=True), "store", "unsupported_field"),
    (completion(priority=1), "priority", "invalid_value"),
    (completion(cache_salt=""), "cache_salt", "invalid_value"),
    (completion(request_id="a b"), "request_id", "invalid_value"),
    (completion(request_id="a" * 129), "request_id", "invalid_value"),
    (completion(truncate_prompt_tokens=0), "truncate_prompt_tokens", "invalid_value"),
    (completion(truncate_prompt_tokens=9000), "truncate_prompt_tokens", "invalid_value"),
    (completion(max_completion_tokens=4), "max_completion_tokens", "unknown_field"),
    (completion(temprature=1), "temprature", "unknown_field"),
    (completion(temprature=None), "temprature", "unknown_field"),
    (completion(prompt="a" * 8192), "prompt", "context_length_exceeded"),
    (completion(max_tokens=8191), "prompt", "context_length_exceeded"),
]
BAD_CHATS = [
    ({}, "messages", "missing_field"),
    (chat(messages=[]), "messages", "invalid_value"),
    (chat(messages="hi"), "messages", "invalid_type"),
    (chat(messages=["hi"]), "messages.0", "invalid_type"),
    (chat(messages=[{"content": "hi"}]), "messages.0.role", "missing_field"),
    (chat(messages=[{"role": "tool", "content": "hi"}]), "messages.0.role", "invalid_type"),
    (chat(messages=[{"role": "user"}]), "messages.0.content", "invalid_type"),
    (chat(messages=[{"role": "user", "content": 5}]), "messages.0.content", "invalid_type"),
    (chat(messages=[*HI, {"role": "user", "content": "", "x": 1}]), "messages.1.x", "unknown_field"),
    (
        chat(messages=[*HI, {"role": "assistant", "tool_calls": [{"id": "1"}]}]),
        "messages.1.tool_calls",
        "unsupported_field",
    ),
    (content({"type": "image_url", "image_url": {"url": "x"}}), "messages.0.content.0", "unsupported_content"),
    (content({"type": "input_audio"}), "messages.0.content.0", "unsupported_content"),
    (content({"type": "text"}), "messages.0.content.0", "invalid_type"),
    (content(7), "messages.0.content.0", "unsupported_content"),
    (chat(tools=[{"type": "function"}]), "tools", "unsupported_field"),
    (chat(tool_choice="required"), "tool_choice", "unsupported_field"),
    (chat(functions=[{"name": "f"}]), "functions", "unsupported_field"),
    (chat(response_format={"type": "json_schema"}), "response_format", "unsupported_field"),
    (chat(modalities=["text", "audio"]), "modalities", "unsupported_field"),
    (chat(audio={"voice": "x"}), "audio", "unsupported_field"),
    (chat(reasoning_effort="high"), "reasoning_effort", "unsupported_field"),
    (chat(service_tier="priority"), "service_tier", "unsupported_field"),
    (chat(chat_template="x"), "chat_template", "unsupported_field"),
    (chat(add_special_tokens=True), "add_special_tokens", "unsupported_field"),
    (chat(logprobs=3), "logprobs", "invalid_type"),
    (chat(top_logprobs=3), "top_logprobs", "invalid_value"),
    (chat(logprobs=True, top_logprobs=21), "top_logprobs", "invalid_value"),
    (chat(max_completion_tokens=3), "max_tokens", "invalid_value"),
    (chat(continue_final_message=True), "continue_final_message", "invalid_value"),
    (chat(prompt="hi"), "prompt", "unknown_field"),
    (chat(temperature=9), "temperature", "invalid_value"),
    (chat(max_tokens=0), "max_tokens", "invalid_value"),
    (chat(max_tokens=8192), "messages", "context_length_exceeded"),
    (chat(messages=[{"role": "user", "content": "a" * 9000}]), "messages", "context_length_exceeded"),
]
BAD_TOKENS = [
    ("/tokenize", {}, "prompt", "invalid_value"),
    ("/tokenize", {"prompt": "a", "messages": HI}, "prompt", "invalid_value"),
    ("/tokenize", {"prompt": "a", "add_generation_prompt": True}, "add_generation_prompt", "invalid_value"),
    ("/tokenize", {"messages": HI, "add_special_tokens": True}, "add_special_tokens", "invalid_value"),
    ("/detokenize", {}, "tokens", "missing_field"),
    ("/detokenize", {"tokens": [258]}, "tokens", "invalid_value"),
    ("/detokenize", {"tokens": "a"}, "tokens", "invalid_type"),
]
BAD_BODIES = [b"", b"{", b"[]", b'"hi"', b'{"prompt": "a", "temperature": NaN}', b"[" * 1000, b'{"prompt": "\\ud800"}']


def check_error(response: httpx.Response, status: int, param: str | None, code: str) -> dict:
    assert response.status_code == status, response.text
    assert response.json().keys() == {"error"}
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["param"], error["code"]) == (param, code), error
    return error


@pytest.mark.parametrize(("body", "param", "code"), BAD_COMPLETIONS)
def test_bad_completion(tiny, body, param, code):
    check_error(tiny.post(COMPLETIONS, body), 400, param, code)


@pytest.mark.parametrize(("body", "param", "code"), BAD_CHATS)
def test_bad_chat(tiny, body, param, code):
    check_error(tiny.post(CHAT, body), 400, param, code)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "body"), [(COMPLETIONS, completion()), (CHAT, chat())])
def test_a_stream_that_is_refused_has_the_same_status(tiny, path, body, stream):
    """Also where the engine, not the route, refuses."""
    body = body | {"stream": stream, "stop_token_ids": [258]}
    check_error(tiny.post(path, body), 400, "stop_token_ids", "invalid_value")


@pytest.mark.parametrize(("path", "body", "param", "code"), BAD_TOKENS)
def test_bad_tokens(tiny, path, body, param, code):
    check_error(tiny.post(path, body), 400, param, code)


@pytest.mark.parametrize("body", BAD_BODIES)
def test_bad_json(tiny, body):
    response = httpx.post(tiny.url + COMPLETIONS, content=body, headers={"content-type": "application/json"})
    check_error(response, 400, None, "invalid_json")


def test_context_error_has_the_numbers(tiny):
    error = check_error(
        tiny.post(COMPLETIONS, completion(prompt="a" * 8190, max_tokens=5)), 400, "prompt", "context_length_exceeded"
    )
    assert all(number in error["message"] for number in ("8192", "8190", "5"))


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/tokenize", "/detokenize"])
def test_unknown_model(tiny, path):
    body = {
        COMPLETIONS: completion(),
        CHAT: chat(),
        "/tokenize": {"prompt": "a"},
        "/detokenize": {"tokens": [1]},
    }[path]
    error = check_error(tiny.post(path, body | {"model": "gpt-x"}), 404, "model", "model_not_found")
    assert "gpt-x" in error["message"]


def test_unknown_model_card(tiny):
    check_error(tiny.get("/v1/models/org/gpt-x"), 404, "model", "model_not_found")


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/embeddings", "/v1/completions/", "/docs"])
def test_unknown_route(tiny, path):
    for response in (tiny.get(path), tiny.post(path, {})):
        check_error(response, 404, None, "unknown_route")


@pytest.mark.parametrize(("method", "path"), [("GET", COMPLETIONS), ("PUT", CHAT), ("POST", "/v1/models")])
def test_wrong_method(tiny, method, path):
    response = httpx.request(method, tiny.url + path)
    check_error(response, 405, None, "method_not_allowed")
    assert response.headers["allow"]


def test_body_must_be_declared_json(tiny):
    response = httpx.post(tiny.url + COMPLETIONS, content=b"{}", headers={"content-type": "text/plain"})
    check_error(response, 415, None, "unsupported_media_type")


def test_too_large_body(tiny):
    check_error(tiny.post(COMPLETIONS, completion(prompt="a" * 100_000)), 413, None, "body_too_large")


def test_too_large_body_of_unknown_length(tiny):
    def parts():
        for _ in range(20):
            yield b"a" * 10_000

    response = httpx.post(tiny.url + COMPLETIONS, content=parts(), headers={"content-type": "application/json"})
    check_error(response, 413, None, "body_too_large")


def test_errors_are_counted_by_cause(tiny):
    name = "paged:request_errors_total{status=400,code=unsupported_field}"
    before = tiny.metrics().get(name, 0)
    tiny.post(COMPLETIONS, completion(suffix="end"))
    assert tiny.metrics()[name] == before + 1


NEUTRAL = {
    "user": "me",
    "store": False,
    "service_tier": "auto",
    "response_format": {"type": "text"},
    "stop": None,
    "logit_bias": {},
    "n": 1,
    "temperature": None,
    "seed": None,
}
NEUTRAL_CHAT = {
    "metadata": {"a": "b"},
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "tool_choice": "none",
    "parallel_tool_calls": True,
    "modalities": ["text"],
    "top_logprobs": None,
    "reasoning_effort": None,
    "safety_identifier": "x",
    "prompt_cache_key": "k",
}


def test_fields_that_ask_for_nothing_are_accepted(tiny):
    assert tiny.post(COMPLETIONS, completion(**NEUTRAL, suffix=None, best_of=1)).status_code == 200
    assert tiny.post(CHAT, chat(**NEUTRAL, **NEUTRAL_CHAT)).status_code == 200


def test_an_answer_can_be_sent_back_as_history(tiny):
    answer = tiny.post(CHAT, chat()).json()["choices"][0]["message"]
    history = [*HI, answer | {"tool_calls": None, "annotations": []}, {"role": "developer", "content": "b"}]
    assert tiny.post(CHAT, chat(messages=history)).status_code == 200
