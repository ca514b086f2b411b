"""/v1/chat/completions: a conversation, answered through the model's own chat template."""

from collections.abc import Iterator, Sequence
from typing import Any

from paged.chat import render_chat
from paged.engine_client import TextEngine
from paged.outputs import CompletionDelta, TokenLogprobs
from server.checks import check_common, fit_context, job_id, sampling_params, truncated
from server.errors import bad_request, shown
from server.generation import Choice, Job, Prompt, collect
from server.logprobs import LogprobFormat
from server.protocol import ChatRequest, ChatTemplateOptions, Message
from server.service import Service
from server.streaming import Chunk

OBJECT = "chat.completion"
CHUNK_OBJECT = "chat.completion.chunk"
ROLE = "assistant"


def prepare(service: Service, engine: TextEngine, body: bytes, given_id: str | None) -> tuple[ChatRequest, Job]:
    """Everything before the engine: parse, check, render, tokenize. ApiError or InvalidRequestError."""
    request = ChatRequest.parse(body)
    service.check_model(request.model)
    check_common(request, service.config)
    service.check_choices(1, request.n)
    check_top_logprobs(request, service.config.scheduler.max_logprobs)
    turns = [plain_turn(message, f"messages.{i}") for i, message in enumerate(request.messages)]
    token_ids = render(service, engine, turns, request)
    token_ids = truncated(token_ids, request.truncate_prompt_tokens, engine.max_model_len)
    asked = asked_tokens(request)
    room = fit_context(len(token_ids), asked, engine.max_model_len, "messages")
    defaults = engine.default_sampling_params
    params = sampling_params(
        request,
        defaults,
        max_tokens=min(room, defaults.get("max_tokens", room)) if asked is None else asked,
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        detokenize=True,
    )
    echo = turns[-1]["content"] if request.echo and turns[-1]["role"] == ROLE else ""
    job = Job(
        id=job_id("chatcmpl", request.request_id or given_id),
        model=service.model_name,
        prompts=[Prompt(token_ids, params, echo)],
        n=request.n,
        priority=request.priority,
        cache_salt=request.cache_salt,
    )
    return request, job


def check_top_logprobs(request: ChatRequest, most: int) -> None:
    if request.top_logprobs is None:
        return
    if not request.logprobs:
        raise bad_request("`top_logprobs` needs `logprobs`: true.", "top_logprobs")
    if not -1 <= request.top_logprobs <= most:
        raise bad_request(f"`top_logprobs` must be in [0, {most}], not {request.top_logprobs}.", "top_logprobs")


def asked_tokens(request: ChatRequest) -> int | None:
    """`max_tokens` by either of its names."""
    if request.max_completion_tokens is None:
        return request.max_tokens
    if request.max_tokens not in (None, request.max_completion_tokens):
        message = "`max_tokens` and `max_completion_tokens` are the same and must not differ: leave one out."
        raise bad_request(message, "max_tokens")
    return request.max_completion_tokens


def plain_turn(message: Message, param: str) -> dict[str, str]:
    """A message as chat templates take it; "developer" is OpenAI's newer name for "system"."""
    for name in ("tool_calls", "annotations"):
        if getattr(message, name):
            raise bad_request(
                f"`{param}.{name}` is not supported: leave it out.", f"{param}.{name}", "unsupported_field"
            )
    turn: dict[str, str] = {"role": "system" if message.role == "developer" else message.role}
    turn["content"] = plain_text(message.content, message.role, f"{param}.content")
    if message.name is not None:
        turn["name"] = message.name
    return turn


def plain_text(content: Any, role: str, param: str) -> str:
    if isinstance(content, str):
        return content
    if content is None and role == ROLE:
        return ""
    if not isinstance(content, list):
        raise bad_request(
            f"`{param}` must be text or a list of text parts, not {shown(content)}.", param, "invalid_type"
        )
    return "\n".join(part_text(part, f"{param}.{i}") for i, part in enumerate(content))


def part_text(part: Any, param: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    if kind != "text":
        message = (
            f"`{param}` has type {shown(kind)}: this server reads only text parts, {{'type': 'text', 'text': ...}}."
        )
        raise bad_request(message, param, "unsupported_content")
    if not isinstance(part.get("text"), str) or part.keys() != {"type", "text"}:
        raise bad_request(f"`{param}` must have a string `text` and nothing else beside `type`.", param, "invalid_type")
    return part["text"]


def render(
    service: Service, engine: TextEngine, turns: Sequence[dict[str, str]], options: ChatTemplateOptions
) -> list[int]:
    return render_chat(
        engine.tokenizer,
        turns,
        add_generation_prompt=options.add_generation_prompt,
        continue_final_message=options.continue_final_message,
        chat_template=service.chat_template,
        chat_template_kwargs=options.chat_template_kwargs,
    )


async def answer(engine: TextEngine, job: Job, request: ChatRequest) -> dict[str, Any]:
    result = await collect(engine, job)
    shape = ChoiceShape(engine, job, request)
    body: dict[str, Any] = {
        "id": job.id,
        "object": OBJECT,
        "created": job.created,
        "model": job.model,
        "choices": [shape.whole(index, choice) for index, choice in enumerate(result.choices)],
        "usage": result.usage.as_dict(),
    }
    if request.prompt_logprobs is not None:
        prompt_logprobs = result.prompt_logprobs[0]
        body["prompt_logprobs"] = None if prompt_logprobs is None else shape.format.prompt(prompt_logprobs)
    if request.return_token_ids:
        body["prompt_token_ids"] = job.prompts[0].token_ids
    return body


class ChoiceShape:
    """Answers as the entries of `choices`, whole or delta by delta."""

    def __init__(self, engine: TextEngine, job: Job, request: ChatRequest):
        self.job, self.request = job, request
        self.format = LogprobFormat(engine.tokenizer, request.return_tokens_as_token_ids)
        self._started: set[int] = set()

    def whole(self, index: int, choice: Choice) -> dict[str, Any]:
        content = self.job.prompts[0].echo + "".join(choice.text)
        body: dict[str, Any] = {
            "index": index,
            "message": {"role": ROLE, "content": content, "refusal": None},
            "logprobs": self._logprobs(choice.logprobs, choice.token_ids),
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }
        if self.request.return_token_ids:
            body["token_ids"] = choice.token_ids
        return body

    def chunks(self, _: int, delta: CompletionDelta) -> Iterator[Chunk]:
        index, prompt, text = delta.index, self.job.prompts[0], delta.text
        if index not in self._started:
            more = {"prompt_token_ids": prompt.token_ids} if self.request.return_token_ids and not self._started else {}
            self._started.add(index)
            opening = {"role": ROLE, "content": ""}
            yield {"index": index, "delta": opening, "logprobs": None, "finish_reason": None}, more
            text = prompt.echo + text
        choice: dict[str, Any] = {
            "index": index,
            "delta": {"content": text} if text else {},
            "logprobs": self._logprobs(delta.logprobs or [], delta.token_ids),
            "finish_reason": delta.finish_reason,
        }
        if delta.finish_reason is not None:
            choice["stop_reason"] = delta.stop_reason
        if self.request.return_token_ids:
            choice["token_ids"] = delta.token_ids
        if text or choice["logprobs"] or delta.finish_reason is not None or self.request.return_token_ids:
            yield choice, {}

    def _logprobs(self, logprobs: list[TokenLogprobs], token_ids: list[int]) -> dict[str, Any] | None:
        if not self.request.logprobs or not logprobs:
            return None
        return self.format.chat(logprobs, token_ids, self.request.top_logprobs or 0)
