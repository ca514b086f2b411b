"""What a line of the input asks for: OpenAI's batch form, or a plain prompt or conversation."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

from paged.errors import InvalidRequestError
from paged.sampling_params import SamplingParams

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"

SAMPLING_FIELDS = frozenset(f.name for f in fields(SamplingParams))
ENVELOPE_FIELDS = frozenset({"custom_id", "method", "url", "body"})
OPTION_TYPES: Mapping[str, type] = {
    "priority": int,
    "cache_salt": str,
    "return_token_ids": bool,
    "add_special_tokens": bool,
    "add_generation_prompt": bool,
    "continue_final_message": bool,
    "chat_template_kwargs": dict,
}
COMMON_FIELDS = SAMPLING_FIELDS | {"priority", "cache_salt", "return_token_ids"}
PROMPT_FIELDS = frozenset({"prompt", "add_special_tokens"})
CHAT_FIELDS = frozenset({"messages", "add_generation_prompt", "continue_final_message", "chat_template_kwargs"})
OPENAI_FIELDS = COMMON_FIELDS - {"prompt_logprobs", "detokenize"}
# Fields of the HTTP API that change nothing at these values, and are refused at any other.
INERT_FIELDS: Mapping[str, Any] = {
    "stream": False,
    "echo": False,
    "best_of": 1,
    "store": False,
    "response_format": {"type": "text"},
}


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the input. `number` counts from 1, blank lines included; `digest` tells a changed line or run."""

    number: int
    text: bytes
    digest: str


@dataclass(frozen=True, slots=True)
class Job:
    """A validated line.

    Attributes:
      url: the API's route, of an OpenAI line; None for a plain one.
      prompts: texts or token ids (several only on an OpenAI completions line); empty if there are `messages`.
      sampling: the fields of SamplingParams that the line sets.
      options: what else the line sets, by field name.
    """

    id: str | int
    url: str | None
    prompts: list[str | list[int]]
    messages: list[dict[str, Any]] | None
    sampling: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)


def read_lines(path: str, stdin: BinaryIO, key: bytes) -> Iterator[Line]:
    """The lines of a file, or of `stdin` if path is "-", one at a time. Blank lines are skipped.

    Args:
      key: at most 64 bytes that go into every digest.
    """
    with stdin if path == "-" else Path(path).open("rb") as file:
        for number, text in enumerate(file, start=1):
            text = text.strip()
            if text:
                yield Line(number, text, blake2b(text, digest_size=8, key=key).hexdigest())


def parse_json(line: Line) -> dict[str, Any]:
    try:
        value = json.loads(line.text)
    except (ValueError, RecursionError) as e:
        raise InvalidRequestError(f"this line is not JSON: {e}") from None
    if not isinstance(value, dict):
        raise InvalidRequestError(f"this line is not a JSON object but a {type(value).__name__}")
    return value


def is_openai(value: Mapping[str, Any]) -> bool:
    return any(name in value for name in ENVELOPE_FIELDS - {"custom_id"})


def explicit_id(value: Mapping[str, Any]) -> str | int | None:
    """The id that the line gives itself, None if it gives none.

    Raises:
      InvalidRequestError: it is no string or integer, or there are two.
    """
    given = [name for name in ("custom_id", "id") if value.get(name) is not None]
    if len(given) == 2:
        raise InvalidRequestError("give `custom_id` or `id`, not both", param="id")
    if not given:
        return None
    name = given[0]
    if isinstance(value[name], bool) or not isinstance(value[name], str | int):
        raise InvalidRequestError(f"`{name}` must be a string or an integer, not {value[name]!r:.40}", param=name)
    return value[name]


def parse_job(value: Mapping[str, Any], number: int, model_names: tuple[str, ...]) -> Job:
    """Checks everything that can be checked without the model; values of sampling fields are checked later.

    Raises:
      InvalidRequestError: with `param` where one field is at fault.
    """
    return _openai_job(value, model_names) if is_openai(value) else _plain_job(value, number)


def _openai_job(value: Mapping[str, Any], model_names: tuple[str, ...]) -> Job:
    _refuse_unknown(value, ENVELOPE_FIELDS)
    custom_id, body, url = value.get("custom_id"), value.get("body"), value.get("url")
    if not isinstance(custom_id, str):
        raise InvalidRequestError("`custom_id` must be a string", param="custom_id")
    if value.get("method") != "POST":
        raise InvalidRequestError('`method` must be "POST"', param="method")
    if url not in (COMPLETIONS, CHAT):
        raise InvalidRequestError(f"`url` must be {COMPLETIONS} or {CHAT}, not {url!r:.60}", param="url")
    if not isinstance(body, dict):
        raise InvalidRequestError("`body` must be an object", param="body")
    body = {k: v for k, v in body.items() if v is not None}
    for name, harmless in INERT_FIELDS.items():
        if body.pop(name, harmless) != harmless:
            raise InvalidRequestError(f"`{name}` can only be {json.dumps(harmless)} in a batch", param=name)
    model = body.pop("model", model_names[0])
    if model not in model_names:
        raise InvalidRequestError(
            f"The model `{model}` does not exist; this run has `{model_names[0]}`.", param="model"
        )
    body.pop("user", None)
    if url == CHAT:
        _refuse_unknown(body, OPENAI_FIELDS | CHAT_FIELDS | {"max_completion_tokens", "top_logprobs"})
        return _job(custom_id, url, [], _messages(body), _chat_sampling(body))
    _refuse_unknown(body, OPENAI_FIELDS | PROMPT_FIELDS)
    return _job(custom_id, url, _prompts(body.pop("prompt", None)), None, body)


def _plain_job(value: Mapping[str, Any], number: int) -> Job:
    given = explicit_id(value)
    body = {k: v for k, v in value.items() if v is not None and k not in ("id", "custom_id")}
    if ("prompt" in body) == ("messages" in body):
        raise InvalidRequestError("a line has either `prompt` or `messages` (or OpenAI's `url` and `body`)")
    if "messages" in body:
        _refuse_unknown(body, COMMON_FIELDS | CHAT_FIELDS)
        prompts, messages = [], _messages(body)
    else:
        _refuse_unknown(body, COMMON_FIELDS | PROMPT_FIELDS)
        prompts, messages = _prompts(body.pop("prompt")), None
        if len(prompts) != 1:
            raise InvalidRequestError("`prompt` must be one text or one list of token ids", param="prompt")
    return _job(number if given is None else given, None, prompts, messages, body)


def _job(id: str | int, url: str | None, prompts: list, messages: list | None, body: dict[str, Any]) -> Job:
    sampling = {k: v for k, v in body.items() if k in SAMPLING_FIELDS}
    options = {k: v for k, v in body.items() if k not in SAMPLING_FIELDS}
    for name, value in options.items():
        kind = OPTION_TYPES[name]
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise InvalidRequestError(f"`{name}` must be of type {kind.__name__}, not {value!r:.40}", param=name)
    return Job(id, url, prompts, messages, sampling, options)


def _refuse_unknown(value: Mapping[str, Any], known: frozenset[str]) -> None:
    for name in value:
        if name not in known:
            raise InvalidRequestError(f"Unknown or unsupported field `{name}`: check its spelling or remove it.", name)


def _prompts(prompt: Any) -> list[str | list[int]]:
    """OpenAI's four forms of a prompt: a text, texts, token ids, several lists of token ids."""
    if isinstance(prompt, str) or (_is_list(prompt, int) and prompt):
        return [prompt]
    if prompt and (_is_list(prompt, str) or (_is_list(prompt, list) and all(p and _is_list(p, int) for p in prompt))):
        return prompt
    raise InvalidRequestError("`prompt` must be a text, a list of token ids, or a list of either", param="prompt")


def _is_list(value: Any, of: type) -> bool:
    return isinstance(value, list) and all(isinstance(x, of) and not isinstance(x, bool) for x in value)


def _messages(body: dict[str, Any]) -> list[dict[str, Any]]:
    messages = body.pop("messages", None)
    if not messages or not _is_list(messages, dict):
        raise InvalidRequestError("`messages` must be a list of objects with `role` and `content`", param="messages")
    return messages


def _chat_sampling(body: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's chat names for the sampling fields: max_completion_tokens, and logprobs as yes or no."""
    if "max_completion_tokens" in body:
        if "max_tokens" in body:
            raise InvalidRequestError("give `max_completion_tokens` or `max_tokens`, not both", param="max_tokens")
        body["max_tokens"] = body.pop("max_completion_tokens")
    wanted, top = body.pop("logprobs", False), body.pop("top_logprobs", None)
    if not isinstance(wanted, bool):
        raise InvalidRequestError("`logprobs` must be true or false for chat; `top_logprobs` says how many", "logprobs")
    if top is not None and not wanted:
        raise InvalidRequestError("`top_logprobs` needs `logprobs` to be true", param="top_logprobs")
    return body | ({"logprobs": top or 0} if wanted else {})
