"""The prompts of one request, run side by side in the engine, and their results put together."""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from paged.engine_client import TextEngine
from paged.errors import EngineStoppedError, RequestFailedError
from paged.outputs import CompletionDelta, TokenLogprobs
from paged.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class Prompt:
    """`echo` is put in front of the answer; empty unless the request asked for it."""

    token_ids: list[int]
    params: SamplingParams
    echo: str = ""


@dataclass(frozen=True, slots=True)
class Job:
    """A request, ready to run. Choice p * n + i is the i-th completion of prompt p."""

    id: str
    model: str
    prompts: list[Prompt]
    n: int
    priority: int = 0
    cache_salt: str | None = None
    echo_only: bool = False  # max_tokens 0: the engine must generate a token, which is dropped
    created: int = field(default_factory=lambda: int(time.time()))


Deltas = AsyncGenerator[list[tuple[int, CompletionDelta]]]  # (prompt, delta)


async def run(engine: TextEngine, job: Job) -> Deltas:
    """What the engine makes of a job, a step or more at a time.

    Closing it aborts what still runs. All prompts are submitted before the first item, so a refusal of any of
    them (InvalidRequestError, QueueFullError, EngineStoppedError) comes first and leaves none of them running.
    A completion that the engine ends before its time raises RequestFailedError or EngineStoppedError.
    """
    unique = uuid.uuid4().hex[:8]  # the id may be the client's, who may use it twice
    streams = [
        engine.generate(
            prompt.token_ids, prompt.params, f"{job.id}-{unique}-{p}", priority=job.priority, cache_salt=job.cache_salt
        )
        for p, prompt in enumerate(job.prompts)
    ]
    async with aclosing(_numbered(streams[0]) if len(streams) == 1 else _merged(streams)) as deltas:
        async for batch in deltas:
            for _, delta in batch:
                _check_outcome(delta)
            batch = _joined(batch) if len(batch) > 1 else batch
            yield [(p, _without_token(delta)) for p, delta in batch] if job.echo_only else batch


def _check_outcome(delta: CompletionDelta) -> None:
    if delta.finish_reason == "error":
        raise RequestFailedError(delta.error or "The engine failed on this request; the server's log says why.")
    if delta.finish_reason == "abort":
        raise EngineStoppedError("The server stopped before this request was finished; send it again.")


def _joined(batch: list[tuple[int, CompletionDelta]]) -> list[tuple[int, CompletionDelta]]:
    """One delta for each completion, also when several steps came together."""
    joined: dict[tuple[int, int], CompletionDelta] = {}
    for p, delta in batch:
        before = joined.get((p, delta.index))
        joined[p, delta.index] = delta if before is None else _concatenated(before, delta)
    return [(p, delta) for (p, _), delta in joined.items()]


def _concatenated(a: CompletionDelta, b: CompletionDelta) -> CompletionDelta:
    return replace(
        b,
        text=a.text + b.text,
        token_ids=a.token_ids + b.token_ids,
        logprobs=None if a.logprobs is None and b.logprobs is None else (a.logprobs or []) + (b.logprobs or []),
        prompt_logprobs=b.prompt_logprobs if a.prompt_logprobs is None else a.prompt_logprobs,
    )


def _without_token(delta: CompletionDelta) -> CompletionDelta:
    return replace(delta, text="", token_ids=[], logprobs=None, finish_reason="length", stop_reason=None)


async def _numbered(stream: AsyncGenerator[list[CompletionDelta]]) -> Deltas:
    async with aclosing(stream) as deltas:
        async for batch in deltas:
            yield [(0, delta) for delta in batch]


async def _merged(streams: Sequence[AsyncGenerator[list[CompletionDelta]]]) -> Deltas:
    """The streams' items as they come. A reader that lags holds the streams back, where deltas merge."""
    items: asyncio.Queue[list[tuple[int, CompletionDelta]] | Exception | None] = asyncio.Queue(maxsize=1)

    async def pump(p: int, stream: AsyncGenerator[list[CompletionDelta]]) -> None:
        try:
            async with aclosing(stream) as deltas:
                async for batch in deltas:
                    await items.put([(p, delta) for delta in batch])
            await items.put(None)
        except Exception as e:
            await items.put(e)

    tasks = [asyncio.create_task(pump(p, stream)) for p, stream in enumerate(streams)]
    try:
        running = len(tasks)
        while running:
            item = await items.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@dataclass(slots=True)
class Choice:
    """One completion, put together from its deltas."""

    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass(slots=True)
class Result:
    choices: list[Choice]
    prompt_logprobs: list[list[TokenLogprobs | None] | None]  # of each prompt
    usage: "Usage"


async def collect(engine: TextEngine, job: Job) -> Result:
    choices = [Choice() for _ in range(len(job.prompts) * job.n)]
    result = Result(choices, [None] * len(job.prompts), Usage(job))
    async with aclosing(run(engine, job)) as deltas:
        async for batch in deltas:
            result.usage.add(batch)
            for p, delta in batch:
                choice = choices[p * job.n + delta.index]
                choice.text.append(delta.text)
                choice.token_ids += delta.token_ids
                choice.logprobs += delta.logprobs or []
                choice.finish_reason = delta.finish_reason or choice.finish_reason
                choice.stop_reason = choice.stop_reason if delta.stop_reason is None else delta.stop_reason
                if delta.prompt_logprobs is not None:
                    result.prompt_logprobs[p] = delta.prompt_logprobs
    return result


class Usage:
    """Counts tokens as OpenAI does: a prompt once, whatever n is."""

    def __init__(self, job: Job):
        self.prompt_tokens = sum(len(prompt.token_ids) for prompt in job.prompts)
        self.completion_tokens = 0
        self._cached = [0] * len(job.prompts)

    def add(self, batch: list[tuple[int, CompletionDelta]]) -> None:
        for p, delta in batch:
            self.completion_tokens += len(delta.token_ids)
            if delta.index == 0:
                self._cached[p] = max(self._cached[p], delta.num_cached_tokens)

    def as_dict(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached)},
        }
