"""What a line of the output says: OpenAI's batch form for OpenAI's lines, a short form for plain ones.

A plain line's result:
    {"line": 3, "digest": "...", "id": 3, "text": "...", "finish_reason": "stop", "stop_reason": null,
     "prompt_tokens": 12, "cached_tokens": 0, "completion_tokens": 40, "error": null}
with "outputs" (a list of text, finish_reason, stop_reason, completion_tokens) instead of its own if n > 1, with
"token_ids" if return_token_ids or there is no text, and with "logprobs" and "prompt_logprobs" if asked for: for each
token a list of {"token_id", "token", "logprob", "rank"}, the chosen one first. A failed line has "error": {"message",
"param", "code"} and no more.
"""

import time
from dataclasses import dataclass, field
from typing import Any

from paged.outputs import CompletionDelta, CompletionOutput, Logprob, TokenLogprobs
from scripts.batch.lines import CHAT, Job

MIN_LOGPROB = -9999.0  # JSON has no infinity; OpenAI's API says this instead
STATUS_OF_CODE = {"request_failed": 500, "internal_error": 500}


@dataclass(slots=True)
class Answer:
    """Everything that the engine gave for one prompt."""

    prompt_tokens: int
    outputs: list[CompletionOutput]
    cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    _texts: dict[int, list[str]] = field(default_factory=dict)

    @classmethod
    def empty(cls, prompt_tokens: int, n: int) -> "Answer":
        return cls(prompt_tokens, [CompletionOutput(index, "", []) for index in range(n)])

    def add(self, delta: CompletionDelta) -> None:
        output = self.outputs[delta.index]
        self._texts.setdefault(delta.index, []).append(delta.text)
        output.token_ids += delta.token_ids
        if delta.logprobs is not None:
            output.logprobs = (output.logprobs or []) + delta.logprobs
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = delta.prompt_logprobs
        if delta.finish_reason is not None:
            output.finish_reason, output.stop_reason = delta.finish_reason, delta.stop_reason
            output.text = "".join(self._texts.pop(delta.index))
        if delta.index == 0:
            self.cached_tokens = delta.num_cached_tokens

    @property
    def completion_tokens(self) -> int:
        return sum(len(output.token_ids) for output in self.outputs)


def plain_result(job: Job, answer: Answer, has_text: bool) -> dict[str, Any]:
    with_ids = job.options.get("return_token_ids", False) or not has_text
    outputs = [_plain_output(output, with_ids) for output in answer.outputs]
    result: dict[str, Any] = {"id": job.id} | (outputs[0] if len(outputs) == 1 else {"outputs": outputs})
    result |= {"prompt_tokens": answer.prompt_tokens, "cached_tokens": answer.cached_tokens}
    result["completion_tokens"] = answer.completion_tokens
    if answer.prompt_logprobs is not None:
        result["prompt_logprobs"] = [None if lp is None else _plain_logprobs(lp) for lp in answer.prompt_logprobs]
    return result | {"error": None}


def openai_result(job: Job, request_id: str, model: str, answers: list[Answer]) -> dict[str, Any]:
    """OpenAI's batch output line around the body that the route would have answered."""
    is_chat = job.url == CHAT
    prompt_tokens = sum(a.prompt_tokens for a in answers)
    completion_tokens = sum(a.completion_tokens for a in answers)
    outputs = [output for answer in answers for output in answer.outputs]
    body = {
        "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{request_id}",
        "object": "chat.completion" if is_chat else "text_completion",
        "created": int(time.time()),
        "model": model,
        "choices": [_choice(index, output, is_chat, job) for index, output in enumerate(outputs)],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(a.cached_tokens for a in answers)},
        },
    }
    return _envelope(job.id, request_id, 200, body)


def failed_result(
    value: dict[str, Any] | None, id: str | int, request_id: str, error: dict[str, Any]
) -> dict[str, Any]:
    """The result of a line that failed. `value` is the line's JSON, None if it has none; `error` has message, param
    and code."""
    if value is None:
        return {"id": id, "custom_id": None, "response": None, "error": error}
    if "url" not in value and "body" not in value and "method" not in value:
        return {"id": id, "error": error}
    status = STATUS_OF_CODE.get(error["code"], 400)
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return _envelope(value.get("custom_id"), request_id, status, {"error": {"type": kind} | error})


def _envelope(custom_id: Any, request_id: str, status: int, body: dict[str, Any]) -> dict[str, Any]:
    response = {"status_code": status, "request_id": request_id, "body": body}
    return {"id": f"batch_req_{request_id}", "custom_id": custom_id, "response": response, "error": None}


def _plain_output(output: CompletionOutput, with_ids: bool) -> dict[str, Any]:
    result: dict[str, Any] = {"text": output.text}
    if with_ids:
        result["token_ids"] = output.token_ids
    result |= {"finish_reason": output.finish_reason, "stop_reason": output.stop_reason}
    result["completion_tokens"] = len(output.token_ids)
    if output.logprobs is not None:
        result["logprobs"] = [_plain_logprobs(lp) for lp in output.logprobs]
    return result


def _plain_logprobs(candidates: TokenLogprobs) -> list[dict[str, Any]]:
    return [
        {"token_id": t, "token": c.decoded_token, "logprob": max(c.logprob, MIN_LOGPROB), "rank": c.rank}
        for t, c in candidates.items()
    ]


def _choice(index: int, output: CompletionOutput, is_chat: bool, job: Job) -> dict[str, Any]:
    top = job.sampling.get("logprobs") or 0
    if is_chat:
        logprobs = None if output.logprobs is None else {"content": [_chat_logprob(lp, top) for lp in output.logprobs]}
        message = {"role": "assistant", "content": output.text}
        choice: dict[str, Any] = {"index": index, "message": message, "logprobs": logprobs}
    else:
        legacy = None if output.logprobs is None else _completion_logprobs(output.logprobs, top)
        choice = {"index": index, "text": output.text, "logprobs": legacy}
    choice |= {"finish_reason": output.finish_reason, "stop_reason": output.stop_reason}
    return choice | ({"token_ids": output.token_ids} if job.options.get("return_token_ids") else {})


def _chat_logprob(candidates: TokenLogprobs, top: int) -> dict[str, Any]:
    def entry(candidate: Logprob) -> dict[str, Any]:
        text = candidate.decoded_token
        return {"token": text, "logprob": max(candidate.logprob, MIN_LOGPROB), "bytes": _bytes(text)}

    ranked = {c.rank: c for c in candidates.values() if c.rank is not None and c.rank <= top}
    chosen = next(iter(candidates.values()))
    return entry(chosen) | {"top_logprobs": [entry(ranked[rank]) for rank in sorted(ranked)]}


def _completion_logprobs(tokens: list[TokenLogprobs], top: int) -> dict[str, Any]:
    """The older route's four parallel lists."""
    chosen = [next(iter(candidates.values())) for candidates in tokens]
    texts = [c.decoded_token or "" for c in chosen]
    offsets = [0]
    for text in texts[:-1]:
        offsets.append(offsets[-1] + len(text))
    return {
        "tokens": texts,
        "token_logprobs": [max(c.logprob, MIN_LOGPROB) for c in chosen],
        "top_logprobs": [
            {c.decoded_token: max(c.logprob, MIN_LOGPROB) for c in candidates.values()} for candidates in tokens
        ]
        if top
        else None,
        "text_offset": offsets,
    }


def _bytes(text: str | None) -> list[int] | None:
    return None if text is None else list(text.encode())
