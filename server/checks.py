"""What completions and chat check alike, beyond the types of protocol.py and the ranges of SamplingParams."""

import uuid
from dataclasses import fields
from typing import Any

from paged.config import EngineConfig
from paged.sampling_params import SamplingParams
from server.errors import bad_request
from server.protocol import GenerationRequest

MAX_ID_LENGTH = 128
SAMPLING_FIELDS = frozenset(f.name for f in fields(SamplingParams))


def sampling_params(request: GenerationRequest, defaults: dict[str, Any], **decided: Any) -> SamplingParams:
    """The request's fields over the model's defaults, under what the route has `decided`; InvalidRequestError."""
    values = {name: value for name, value in defaults.items() if name in SAMPLING_FIELDS}
    for name in SAMPLING_FIELDS & type(request).model_fields.keys():
        if (value := getattr(request, name)) is not None:
            values[name] = value
    return SamplingParams(**values | decided)


def check_common(request: GenerationRequest, config: EngineConfig) -> None:
    """What concerns both routes and neither SamplingParams nor a type."""
    if request.stream_options is not None and not request.stream:
        raise bad_request("`stream_options` is only for `stream`: true.", "stream_options")
    if request.prompt_logprobs is not None and request.stream:
        raise bad_request("`prompt_logprobs` does not come with `stream`: turn one of them off.", "prompt_logprobs")
    if request.priority != 0 and config.scheduler.scheduling_policy != "priority":
        raise bad_request(
            "`priority` has no effect here: the server must be started with --scheduling-policy priority.", "priority"
        )
    if request.cache_salt == "":
        raise bad_request("`cache_salt` must not be empty: leave it out to share the cache.", "cache_salt")


def truncated(token_ids: list[int], keep: int | None, max_model_len: int) -> list[int]:
    """The last `keep` tokens; -1 keeps what fits into the context beside one token of output."""
    if keep is None:
        return token_ids
    if keep == -1:
        keep = max_model_len - 1
    if not 1 <= keep < max_model_len:
        message = f"`truncate_prompt_tokens` must be -1 or in [1, {max_model_len - 1}], not {keep}."
        raise bad_request(message, "truncate_prompt_tokens")
    return token_ids[-keep:]


def fit_context(num_prompt_tokens: int, asked: int | None, max_model_len: int, param: str) -> int:
    """How many tokens the output may have: `asked`, or all that is left; `param` is the prompt's field."""
    room = max_model_len - num_prompt_tokens
    if room >= 1 and (asked is None or asked <= room):
        return room if asked is None else asked
    wanted = "" if asked is None else f" and asks for {asked} more"
    raise bad_request(
        f"The model's context is {max_model_len} tokens, but the prompt has {num_prompt_tokens}{wanted}: "
        f"shorten the prompt{'' if asked is None else ' or lower max_tokens'}.",
        param,
        code="context_length_exceeded",
    )


def job_id(prefix: str, given: str | None) -> str:
    """A response's id: the client's behind the route's prefix, or a new one."""
    if given is None:
        return f"{prefix}-{uuid.uuid4().hex}"
    if not (0 < len(given) <= MAX_ID_LENGTH and given.isascii() and given.isprintable() and " " not in given):
        message = f"`request_id` must be 1 to {MAX_ID_LENGTH} visible ASCII characters."
        raise bad_request(message, "request_id")
    return f"{prefix}-{given}"
