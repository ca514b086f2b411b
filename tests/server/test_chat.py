"""/v1/chat/completions through OpenAI's client, on the default model."""

import httpx
import numpy as np
import pytest

MODEL = "smollm2-135m-instruct"
QUESTION = [{"role": "user", "content": "What is the capital of France? Answer with one word."}]
UNICODE = [{"role": "user", "content": "Repeat exactly: héllo wörld 🌍 你好"}]


@pytest.fixture
def client(smollm):
    return smollm.client()


def ask(client, messages=QUESTION, **options):
    options = {"temperature": 0, "max_tokens": 20} | options
    return client.chat.completions.create(model=MODEL, messages=messages, **options)


def test_shape_and_sense(client):
    answer = ask(client)
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    choice = answer.choices[0]
    assert choice.message.role == "assistant"
    assert "Paris" in choice.message.content
    assert choice.finish_reason == "stop"
    usage = answer.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    rendered = tokenize(client, messages=QUESTION)
    assert usage.prompt_tokens == rendered["count"] == len(rendered["tokens"])


def tokenize(client, path="tokenize", **body):
    return httpx.post(str(client.base_url).removesuffix("v1/") + path, json=body).json()


def test_greedy_is_repeatable(client):
    assert ask(client).choices[0].message.content == ask(client).choices[0].message.content


def test_stream_equals_the_whole(client):
    for messages in (QUESTION, UNICODE):
        whole = ask(client, messages).choices[0]
        chunks = [chunk.choices[0] for chunk in ask(client, messages, stream=True)]
        assert (chunks[0].delta.role, chunks[0].delta.content) == ("assistant", "")
        assert all(chunk.delta.role is None for chunk in chunks[1:])
        assert "".join(chunk.delta.content or "" for chunk in chunks) == whole.message.content
        assert [chunk.finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + [whole.finish_reason]


def test_stream_of_several_choices(client):
    options = {"n": 3, "seed": 7, "temperature": 1.0}
    whole = {choice.index: choice.message.content for choice in ask(client, **options).choices}
    texts: dict[int, str] = {}
    roles: list[int] = []
    *chunks, last = ask(client, stream=True, stream_options={"include_usage": True}, **options)
    for chunk in chunks:
        assert chunk.usage is None
        [choice] = chunk.choices
        roles += [choice.index] if choice.delta.role else []
        texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
    assert texts == whole
    assert sorted(roles) == [0, 1, 2]
    assert last.choices == []
    assert last.usage.completion_tokens == ask(client, **options).usage.completion_tokens


def test_logprobs(client):
    answer = ask(client, logprobs=True, top_logprobs=3, extra_body={"skip_special_tokens": False})
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    for token in content:
        assert len(token.top_logprobs) == 3
        assert token.logprob == token.top_logprobs[0].logprob  # greedy
        values = [candidate.logprob for candidate in token.top_logprobs]
        assert values == sorted(values, reverse=True)
        assert np.exp(values).sum() <= 1 + 1e-6
    assert all(not token.top_logprobs for token in ask(client, logprobs=True).choices[0].logprobs.content)
    assert ask(client).choices[0].logprobs is None


def test_bytes_of_the_tokens_make_up_the_text(client):
    """Also of tokens that are pieces of a character, whose text alone is a replacement character."""
    options = {"max_tokens": 40, "extra_body": {"ignore_eos": True, "skip_special_tokens": False}}
    answer = ask(client, UNICODE, logprobs=True, **options).choices[0]
    raw = b"".join(bytes(token.bytes) for token in answer.logprobs.content)
    assert raw.decode(errors="ignore") == answer.message.content  # which leaves out half a character at the end
    assert any("\ufffd" in token.token for token in answer.logprobs.content)


def test_streamed_logprobs_equal_the_whole(client):
    whole = ask(client, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    chunks = [chunk.choices[0] for chunk in ask(client, logprobs=True, top_logprobs=2, stream=True)]
    streamed = [token for chunk in chunks if chunk.logprobs for token in chunk.logprobs.content]
    assert [token.token for token in streamed] == [token.token for token in whole]
    np.testing.assert_allclose([t.logprob for t in streamed], [t.logprob for t in whole], atol=1e-5)


def test_both_names_of_max_tokens(client):
    for name in ("max_tokens", "max_completion_tokens"):
        answer = client.chat.completions.create(
            model=MODEL, messages=QUESTION, **{name: 3}, extra_body={"ignore_eos": True}
        )
        assert answer.usage.completion_tokens == 3
        assert answer.choices[0].finish_reason == "length"


def test_default_length_is_the_rest_of_the_context(client):
    messages = [{"role": "user", "content": "word " * 440}]
    answer = client.chat.completions.create(model=MODEL, messages=messages, extra_body={"ignore_eos": True})
    assert answer.usage.total_tokens == 512
    assert answer.choices[0].finish_reason == "length"


def test_stop_string(client):
    text = ask(client, [{"role": "user", "content": "Count from one to ten in words."}], max_tokens=40)
    text = text.choices[0].message.content
    stop = text[10:14]
    stopped = ask(client, [{"role": "user", "content": "Count from one to ten in words."}], max_tokens=40, stop=stop)
    assert stopped.choices[0].message.content == text[: text.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"


def test_content_parts_are_text(client):
    parts = [{"type": "text", "text": QUESTION[0]["content"]}]
    assert ask(client, [{"role": "user", "content": parts}]).choices[0] == ask(client).choices[0]


def test_continuing_the_last_message(client):
    messages = [*QUESTION, {"role": "assistant", "content": "The capital of France is"}]
    options = {"add_generation_prompt": False, "continue_final_message": True}
    answer = ask(client, messages, extra_body=options).choices[0].message.content
    assert "Paris" in answer
    echoed = ask(client, messages, extra_body=options | {"echo": True}).choices[0].message.content
    assert echoed == "The capital of France is" + answer


def test_tokenize_and_back(client):
    text = "héllo wörld 🌍 你好"
    tokens = tokenize(client, prompt=text, return_token_strs=True)
    assert tokens["count"] == len(tokens["tokens"]) == len(tokens["token_strs"])
    assert tokens["max_model_len"] == 512
    assert tokenize(client, path="detokenize", tokens=tokens["tokens"])["prompt"] == text


def test_token_ids_are_returned(client):
    answer = ask(client, extra_body={"return_token_ids": True})
    assert answer.prompt_token_ids == tokenize(client, messages=QUESTION)["tokens"]
    assert len(answer.choices[0].token_ids) == answer.usage.completion_tokens
    chunks = list(ask(client, stream=True, extra_body={"return_token_ids": True}))
    assert chunks[0].prompt_token_ids == answer.prompt_token_ids
    ids = [token for chunk in chunks for choice in chunk.choices for token in getattr(choice, "token_ids", [])]
    assert ids == answer.choices[0].token_ids


def test_models(client):
    [model] = client.models.list().data
    assert (model.id, model.owned_by, model.max_model_len) == (MODEL, "paged", 512)
    assert client.models.retrieve(MODEL).id == MODEL
