"""Reading requests: nothing that OpenAI's own types know comes as a surprise."""

import json
from typing import get_type_hints

import pytest
from openai.types import completion_create_params as completion_types
from openai.types.chat import ChatCompletionAssistantMessageParam, ChatCompletionUserMessageParam
from openai.types.chat import completion_create_params as chat_types

from paged.errors import EngineStoppedError, InvalidRequestError, QueueFullError, RequestFailedError
from server.checks import SAMPLING_FIELDS, fit_context, sampling_params, truncated
from server.errors import ApiError, to_api_error
from server.protocol import ChatRequest, CompletionRequest, Message

CHAT = {"messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (CompletionRequest, completion_types.CompletionCreateParamsStreaming),
        (ChatRequest, chat_types.CompletionCreateParamsStreaming),
    ],
)
def test_every_field_of_openais_is_known(ours, theirs):
    assert not [name for name in get_type_hints(theirs) if not ours.knows(name)]


@pytest.mark.parametrize("theirs", [ChatCompletionAssistantMessageParam, ChatCompletionUserMessageParam])
def test_every_field_of_openais_messages_is_known(theirs):
    assert get_type_hints(theirs).keys() <= Message.model_fields.keys()


@pytest.mark.parametrize("kind", [CompletionRequest, ChatRequest])
def test_a_field_is_one_thing_only(kind):
    groups = [kind.model_fields.keys(), kind.harmless, kind.neutral.keys()]
    assert sum(map(len, groups)) == len(set().union(*groups))


def test_every_sampling_parameter_can_be_set_over_http():
    for kind in (CompletionRequest, ChatRequest):
        assert SAMPLING_FIELDS - kind.model_fields.keys() == {"detokenize"}


def test_null_is_absent():
    fields = dict.fromkeys([*ChatRequest.model_fields, *ChatRequest.harmless, *ChatRequest.neutral])
    assert ChatRequest.parse(json.dumps(fields | CHAT).encode()) == ChatRequest.parse(json.dumps(CHAT).encode())


def test_request_fields_go_over_the_models_defaults():
    defaults = {"temperature": 0.3, "top_k": 9, "eos_token_id": 2}
    request = ChatRequest.parse(json.dumps(CHAT | {"temperature": 0.5, "seed": 1, "stop": ["x"]}).encode())
    params = sampling_params(request, defaults, max_tokens=7, logprobs=None)
    assert (params.temperature, params.top_k, params.seed, params.max_tokens) == (0.5, 9, 1, 7)
    assert params.stop_strings == ("x",)
    assert params.logprobs is None  # chat's `logprobs` is a bool, which is none of the parameter's business


def test_context():
    assert fit_context(10, None, 16, "prompt") == 6
    assert fit_context(10, 6, 16, "prompt") == 6
    for prompt, asked in ((16, None), (17, None), (10, 7), (16, 1)):
        with pytest.raises(ApiError, match="context is 16 tokens"):
            fit_context(prompt, asked, 16, "prompt")


def test_truncation():
    tokens = list(range(10))
    assert truncated(tokens, None, 8) == tokens
    assert truncated(tokens, 3, 8) == [7, 8, 9]
    assert truncated(tokens, -1, 8) == tokens[-7:]
    assert truncated(tokens, 7, 8) == tokens[-7:]
    for keep in (0, -2, 8):
        with pytest.raises(ApiError):
            truncated(tokens, keep, 8)


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (InvalidRequestError("no", param="n"), 400, "invalid_request_error"),
        (QueueFullError("full", retry_after=2.1), 429, "rate_limit_error"),
        (EngineStoppedError("bye"), 503, "server_error"),
        (RequestFailedError("boom"), 500, "server_error"),
        (ZeroDivisionError("secret"), 500, "server_error"),
    ],
)
def test_errors_of_the_engine(error, status, kind):
    answer = to_api_error(error)
    assert (answer.status, answer.body["error"]["type"]) == (status, kind)
    assert ("Retry-After" in answer.headers) == (status in (429, 503))
    assert "secret" not in answer.body["error"]["message"]
    if status == 429:
        assert answer.headers["Retry-After"] == "3"
