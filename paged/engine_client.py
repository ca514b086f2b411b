"""The engine as seen from where requests come in: async streams of text. The engine itself runs in another thread or
another process; what goes to it are commands, what comes from it are tokens, and neither needs jax."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Any, Protocol

from paged.errors import EngineStoppedError, RequestFailedError
from paged.output_processor import OutputProcessor
from paged.outputs import CompletionDelta, StepOutput, TokenDelta
from paged.sampling_params import SamplingParams


@dataclass(frozen=True)
class EngineInfo:
    """What a client has to know of an engine that is loaded."""

    tokenizer: Any  # a transformers tokenizer; None without
    vocab_size: int
    max_model_len: int
    max_num_seqs: int
    num_blocks: int
    default_sampling_params: dict[str, Any]


@dataclass(frozen=True)
class Health:
    alive: bool  # the engine's thread runs
    last_step_age: float  # seconds since it last made progress while it had work; 0 when idle
    num_running: int
    num_waiting: int
    error: str | None = None  # what ended the thread


@dataclass(frozen=True, slots=True)
class AddRequest:
    """Queues a request, whose n completions are `key` and the following ones in what comes back."""

    key: int
    request_id: str
    prompt: list[int]
    params: SamplingParams
    priority: int
    cache_salt: str | None
    arrival_time: float


@dataclass(frozen=True, slots=True)
class FinishCompletion:
    """A stop string was found in the text of a completion."""

    key: int  # the request's
    index: int
    stop_string: str


@dataclass(frozen=True, slots=True)
class AbortRequest:
    key: int


Command = AddRequest | FinishCompletion | AbortRequest


class TextEngine(Protocol):
    """What makes text of requests: an EngineClient, or an AsyncEngine in its own process."""

    @property
    def tokenizer(self) -> Any: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def max_model_len(self) -> int: ...
    @property
    def default_sampling_params(self) -> dict[str, Any]: ...

    def generate(
        self,
        prompt: list[int],
        params: SamplingParams,
        request_id: str,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> AsyncGenerator[list[CompletionDelta]]: ...


class Stream:
    """One request's tokens on their way to its reader. What a slow reader has not taken yet becomes one item."""

    def __init__(self) -> None:
        self.items: list[tuple[Completion, list[int] | TokenDelta | Exception]] = []
        self.ready = asyncio.Event()

    def put(self, completion: "Completion", item: TokenDelta | Exception) -> None:
        completion.pending = None
        self.items.append((completion, item))
        self.ready.set()

    async def take(self) -> list[tuple["Completion", list[int] | TokenDelta | Exception]]:
        await self.ready.wait()
        self.ready.clear()
        items, self.items = self.items, []
        for completion, _ in items:
            completion.pending = None
        return items


class Completion:
    """pending: the last item of its stream, if that is a list of this completion's tokens."""

    __slots__ = ("pending", "processor", "stream")

    def __init__(self, stream: Stream, processor: OutputProcessor):
        self.stream, self.processor = stream, processor
        self.pending: list[int] | None = None


class EngineClient:
    """The requests of one event loop, in which everything here is called.

    Args:
      submit: takes a command to the engine, without waiting for it.
    """

    def __init__(self, info: EngineInfo, submit: Callable[[Command], None]):
        self.info, self._submit = info, submit
        self.tokenizer = info.tokenizer
        self.vocab_size, self.max_model_len = info.vocab_size, info.max_model_len
        self.default_sampling_params = info.default_sampling_params
        self._completions: dict[int, Completion] = {}
        self._next_key = 0
        self._ended: str | None = None  # why there is no engine any more

    async def generate(
        self,
        prompt: list[int],
        params: SamplingParams,
        request_id: str,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> AsyncGenerator[list[CompletionDelta]]:
        """Yields what was added since the last time, over all n completions, until each has its finish_reason.
        Closing or cancelling the iterator aborts the request.

        Raises:
          InvalidRequestError, QueueFullError, EngineStoppedError: it was not accepted; before anything is yielded.
          RequestFailedError: a step failed.
        """
        if self._ended is not None:
            raise EngineStoppedError(self._ended)
        stream, key = Stream(), self._next_key
        self._next_key += params.n
        for index in range(params.n):
            processor = OutputProcessor(request_id, index, params, self.tokenizer, prompt)
            self._completions[key + index] = Completion(stream, processor)
        unfinished = params.n
        try:
            self._submit(AddRequest(key, request_id, prompt, params, priority, cache_salt, time.monotonic()))
            while unfinished:
                deltas: list[CompletionDelta] = []
                for completion, item in await stream.take():
                    if isinstance(item, Exception):
                        if deltas:  # first what came before the error
                            yield deltas
                        raise item
                    if (delta := self._present(key, completion.processor, item)) is not None:
                        deltas.append(delta)
                        unfinished -= delta.finish_reason is not None
                if deltas:
                    yield deltas
        finally:
            for index in range(params.n):
                self._completions.pop(key + index, None)
            if unfinished:
                self._submit(AbortRequest(key))

    def _present(self, key: int, processor: OutputProcessor, item: list[int] | TokenDelta) -> CompletionDelta | None:
        """None of a completion that ended on a stop string while it had more tokens under way."""
        if processor.stop_string is not None:
            return None
        if isinstance(item, list):
            delta = processor.extend(item)
        elif item.error is not None:
            raise RequestFailedError(item.error)
        else:
            delta = processor.process(item)
        if processor.stop_string is not None:
            self._submit(FinishCompletion(key, processor.index, processor.stop_string))
        return delta

    @property
    def num_unfinished(self) -> int:
        return len(self._completions)

    def on_outputs(self, outputs: list[StepOutput]) -> None:
        """What steps made of this client's requests, named by their keys."""
        completions = self._completions
        for output in outputs:
            for key, token_id in zip(output.tags, output.token_ids, strict=True):
                if (completion := completions.get(key)) is None:
                    continue
                if completion.pending is None:
                    completion.pending = [token_id]
                    completion.stream.items.append((completion, completion.pending))
                    completion.stream.ready.set()
                else:
                    completion.pending.append(token_id)
            for key, delta in output.deltas:
                if (completion := completions.get(key)) is not None:
                    completion.stream.put(completion, delta)

    def on_refusal(self, key: int, error: Exception) -> None:
        if (completion := self._completions.get(key)) is not None:
            completion.stream.put(completion, error)

    def on_end(self, reason: str) -> None:
        """The engine has ended, and with it every request."""
        self._ended = reason
        for completion in self._completions.values():
            completion.stream.put(completion, EngineStoppedError(reason))
