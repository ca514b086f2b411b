"""/v1/completions: text or token ids, continued."""

from collections.abc import Iterator
from typing import Any

from paged.engine_client import TextEngine
from paged.outputs import CompletionDelta, TokenLogprobs
from server.checks import check_common, fit_context, job_id, sampling_params, truncated
from server.errors import bad_request, shown
from server.generation import Choice, Job, Prompt, collect
from server.logprobs import LogprobFormat
from server.protocol import CompletionRequest
from server.service import Service
from server.streaming import Chunk

DEFAULT_MAX_TOKENS = 16
OBJECT = "text_completion"


def prepare(service: Service, engine: TextEngine, body: bytes, given_id: str | None) -> tuple[CompletionRequest, Job]:
    """Everything before the engine: parse, check, tokenize. ApiError or InvalidRequestError."""
    request = CompletionRequest.parse(body)
    service.check_model(request.model)
    check_common(request, service.config)
    if request.best_of not in (None, request.n):
        raise bad_request("`best_of` must equal `n`: this server returns every completion it samples.", "best_of")
    if request.max_tokens == 0 and not request.echo:
        raise bad_request("`max_tokens` 0 generates nothing: it only goes with `echo`.", "max_tokens")
    prompts = read_prompts(request.prompt)
    service.check_choices(len(prompts), request.n)
    job = Job(
        id=job_id("cmpl", request.request_id or given_id),
        model=service.model_name,
        prompts=[prepare_prompt(service, engine, request, prompt) for prompt in prompts],
        n=request.n,
        priority=request.priority,
        cache_salt=request.cache_salt,
        echo_only=request.max_tokens == 0,
    )
    return request, job


def read_prompts(prompt: Any) -> list[str | list[int]]:
    """The prompts in any of the four forms: str, [str], [int], [[int]]."""
    if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and type(prompt[0]) is int):
        return [check_prompt(prompt, "prompt")]
    if isinstance(prompt, list) and prompt:
        return [check_prompt(item, f"prompt.{i}") for i, item in enumerate(prompt)]
    raise bad_request(
        f"`prompt` must be a string, a list of strings, a list of token ids, or a list of such lists, not "
        f"{shown(prompt)}.",
        "prompt",
        "invalid_type",
    )


def check_prompt(prompt: Any, param: str) -> str | list[int]:
    if isinstance(prompt, str) or (isinstance(prompt, list) and all(type(token) is int for token in prompt)):
        return prompt
    raise bad_request(f"`{param}` must be a string or a list of token ids, not {shown(prompt)}.", param, "invalid_type")


def prepare_prompt(service: Service, engine: TextEngine, request: CompletionRequest, prompt: str | list[int]) -> Prompt:
    if isinstance(prompt, str):
        service.check_text(engine, "prompt")
        whole = engine.tokenizer.encode(prompt, add_special_tokens=request.add_special_tokens)
    else:
        whole = prompt
    token_ids = truncated(whole, request.truncate_prompt_tokens, engine.max_model_len)
    check_token_ids(token_ids, engine.vocab_size, "prompt")
    asked = 1 if request.max_tokens == 0 else request.max_tokens
    room = fit_context(len(token_ids), asked, engine.max_model_len, "prompt")
    defaults = engine.default_sampling_params
    params = sampling_params(
        request,
        defaults,
        max_tokens=min(room, defaults.get("max_tokens", DEFAULT_MAX_TOKENS)) if asked is None else asked,
        prompt_logprobs=prompt_logprobs(request),
        detokenize=engine.tokenizer is not None,
    )
    if not request.echo:
        return Prompt(token_ids, params)
    if isinstance(prompt, str) and len(token_ids) == len(whole):
        return Prompt(token_ids, params, echo=prompt)
    service.check_text(engine, "echo")
    text = engine.tokenizer.decode(token_ids, skip_special_tokens=params.skip_special_tokens)
    return Prompt(token_ids, params, echo=text)


def prompt_logprobs(request: CompletionRequest) -> int | None:
    """Echoed tokens have logprobs like generated ones."""
    if not request.echo or request.logprobs is None:
        return request.prompt_logprobs
    if request.prompt_logprobs not in (None, request.logprobs):
        message = "`prompt_logprobs` must equal `logprobs` when `echo` is on; it can be left out."
        raise bad_request(message, "prompt_logprobs")
    return request.logprobs


def check_token_ids(token_ids: list[int], vocab_size: int, param: str) -> None:
    if not token_ids:
        raise bad_request(f"`{param}` is empty: give at least one token.", param)
    if not 0 <= min(token_ids) <= max(token_ids) < vocab_size:
        raise bad_request(f"`{param}` has token ids outside the vocabulary, 0 to {vocab_size - 1}.", param)


async def answer(engine: TextEngine, job: Job, request: CompletionRequest) -> dict[str, Any]:
    result = await collect(engine, job)
    shape = ChoiceShape(engine, job, request)
    choices = []
    for index, choice in enumerate(result.choices):
        p = index // job.n
        choices.append(shape.whole(index, choice, result.prompt_logprobs[p]))
    return {
        "id": job.id,
        "object": OBJECT,
        "created": job.created,
        "model": job.model,
        "choices": choices,
        "usage": result.usage.as_dict(),
    }


class ChoiceShape:
    """Completions as the entries of `choices`, whole or delta by delta."""

    def __init__(self, engine: TextEngine, job: Job, request: CompletionRequest):
        self.job, self.request = job, request
        self.format = LogprobFormat(engine.tokenizer, request.return_tokens_as_token_ids)
        self._offsets: dict[int, int] = {}  # choice -> characters of the tokens so far; absent before its first delta
        self._prompt_logprobs: dict[int, list[TokenLogprobs | None]] = {}

    def whole(self, index: int, choice: Choice, prompt_logprobs: list[TokenLogprobs | None] | None) -> dict[str, Any]:
        prompt = self.job.prompts[index // self.job.n]
        body: dict[str, Any] = {
            "index": index,
            "text": prompt.echo + "".join(choice.text),
            "logprobs": None,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }
        if self.request.logprobs is not None:
            before = prompt_logprobs if self.request.echo and prompt_logprobs is not None else []
            token_ids = prompt.token_ids[: len(before)] + choice.token_ids
            body["logprobs"] = self.format.completion([*before, *choice.logprobs], token_ids, 0)
        if self.request.prompt_logprobs is not None:
            body["prompt_logprobs"] = None if prompt_logprobs is None else self.format.prompt(prompt_logprobs)
        if self.request.return_token_ids:
            body |= {"prompt_token_ids": prompt.token_ids, "token_ids": choice.token_ids}
        return body

    def chunks(self, p: int, delta: CompletionDelta) -> Iterator[Chunk]:
        index, prompt = p * self.job.n + delta.index, self.job.prompts[p]
        first = index not in self._offsets
        offset = self._offsets.setdefault(index, 0)
        text = prompt.echo + delta.text if first else delta.text
        logprobs: list[TokenLogprobs | None] = [*(delta.logprobs or [])]
        token_ids = delta.token_ids
        if delta.prompt_logprobs is not None:
            self._prompt_logprobs[p] = delta.prompt_logprobs
        if first and self.request.echo and p in self._prompt_logprobs:
            logprobs, token_ids = self._prompt_logprobs[p] + logprobs, prompt.token_ids + token_ids
        choice: dict[str, Any] = {"index": index, "text": text, "logprobs": None, "finish_reason": delta.finish_reason}
        if delta.finish_reason is not None:
            choice["stop_reason"] = delta.stop_reason
        if self.request.logprobs is not None and logprobs:
            choice["logprobs"] = self.format.completion(logprobs, token_ids, offset)
            self._offsets[index] += sum(map(len, choice["logprobs"]["tokens"]))
        if self.request.return_token_ids:
            choice |= {"token_ids": delta.token_ids} | ({"prompt_token_ids": prompt.token_ids} if first else {})
        if text or choice["logprobs"] or delta.finish_reason is not None or self.request.return_token_ids:
            yield choice, {}
