"""The engine for a server: it runs in a thread of its own, and each request is an async iterator of deltas."""

import asyncio
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from models import ModelConfig
from paged.config import EngineConfig
from paged.engine import Engine
from paged.errors import EngineStoppedError, RequestFailedError
from paged.outputs import CompletionDelta
from paged.sampling_params import SamplingParams
from paged.stats import StatsListener

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Health:
    alive: bool  # the engine's thread runs
    last_step_age: float  # seconds since it last made progress while it had work; 0 when idle
    num_running: int
    num_waiting: int
    error: str | None = None  # what ended the thread


class Stream:
    """One request's deltas on their way from the engine's thread to its reader's event loop. What a slow reader has
    not taken yet is merged into one item."""

    def __init__(self, loop: asyncio.AbstractEventLoop, num_completions: int):
        self.loop, self.unfinished = loop, num_completions
        self.accepted = False
        self._items: deque[CompletionDelta | BaseException] = deque()
        self._ready = asyncio.Event()

    def put(self, item: CompletionDelta | BaseException) -> None:
        """In the engine's thread; the reader sees it after `wake`."""
        self._items.append(item)

    def wake(self) -> None:
        """In the reader's loop."""
        self._ready.set()

    async def get(self) -> list[CompletionDelta]:
        await self._ready.wait()
        self._ready.clear()
        deltas: list[CompletionDelta] = []
        while self._items:
            item = self._items.popleft()
            if isinstance(item, CompletionDelta):
                deltas.append(item)
            elif not deltas:
                raise item
            else:  # first what came before the error
                self._items.appendleft(item)
                self._ready.set()
                break
        return deltas


class AsyncEngine:
    """Loads and compiles when constructed; then serves any number of event loops and threads.

    Only the engine's thread touches the engine: others leave commands in its inbox, which it empties between steps.
    """

    def __init__(self, config: EngineConfig, listeners: Sequence[StatsListener] = ()):
        self._engine = Engine(config, listeners)
        self.config, self.ledger = config, self._engine.ledger
        self.tokenizer: Any = self._engine.tokenizer
        self.model_config: ModelConfig = self._engine.checkpoint.config
        self.max_model_len: int = self._engine.max_model_len
        self.max_num_seqs: int = self._engine.scheduler.max_num_seqs
        self.default_sampling_params: dict[str, Any] = self._engine.default_sampling_params
        self.served_model_name: str = config.model.model
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._streams: dict[str, Stream] = {}
        self._draining = self._stopped = self._closed = False
        self._closing = threading.Lock()
        self._error: BaseException | None = None
        self._busy_since: float | None = None  # start of the step under way; None when idle
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # ---- any thread -----------------------------------------------------------------------------------------

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
        if self._draining or not self._thread.is_alive():
            raise self._refusal()
        stream = Stream(asyncio.get_running_loop(), params.n)
        arrival = time.monotonic()

        def add() -> None:
            try:
                if self._stopped:
                    raise self._refusal()
                self._engine.add_request(
                    request_id, prompt, params, priority=priority, cache_salt=cache_salt, arrival_time=arrival
                )
                self._streams[request_id] = stream
            except Exception as error:
                stream.put(error)
                stream.loop.call_soon_threadsafe(stream.wake)

        with self._closing:
            if self._closed:
                raise self._refusal()
            self._inbox.put(add)
        unfinished = params.n
        try:
            while unfinished:
                deltas = await stream.get()
                unfinished -= sum(delta.finish_reason is not None for delta in deltas)
                if deltas:
                    yield deltas
        finally:
            if unfinished:
                self._inbox.put(lambda: self._abort(request_id, stream))

    def _refusal(self) -> EngineStoppedError:
        return EngineStoppedError("the engine is shutting down" if self._error is None else f"it died: {self._error}")

    def health(self) -> Health:
        busy_since, engine = self._busy_since, self._engine
        return Health(
            alive=self._error is None and self._thread.is_alive(),
            last_step_age=0.0 if busy_since is None else time.monotonic() - busy_since,
            num_running=engine.scheduler.num_running,
            num_waiting=engine.scheduler.num_waiting,
            error=None if self._error is None else f"{type(self._error).__name__}: {self._error}",
        )

    async def drain(self, timeout: float) -> bool:
        """Takes no new requests and waits for the running ones, at most `timeout` seconds; False if some are left."""
        self._draining = True
        end = time.monotonic() + timeout
        while self._streams and self._thread.is_alive():
            if time.monotonic() >= end:
                return False
            await asyncio.sleep(0.02)
        return True

    def shutdown(self) -> None:
        """Ends the thread after the current step; unfinished requests end with EngineStoppedError."""
        self._draining = True
        self._inbox.put(None)
        self._thread.join()

    # ---- the engine's thread --------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stopped:
                self._take_commands()
                if not self._stopped and self._engine.has_unfinished_requests():
                    self._busy_since = time.monotonic()
                    self._publish(self._engine.step())
        except BaseException as error:
            logger.critical("the engine's thread died", exc_info=error)
            self._error = error
        finally:
            self._stopped = True
            with self._closing:
                self._closed = True  # whatever comes later is refused by the caller's thread
            self._take_commands()
            self._end_streams()
            self._engine.close()

    def _take_commands(self) -> None:
        """Runs what is in the inbox; waits for something when there is nothing else to do."""
        while True:
            idle = not self._stopped and not self._engine.has_unfinished_requests()
            if idle:
                self._busy_since = None
            try:
                command = self._inbox.get(block=idle)
            except queue.Empty:
                return
            if command is None:
                self._stopped = True
            else:
                command()

    def _publish(self, deltas: list[CompletionDelta]) -> None:
        """Hands a step's deltas over, with one wake-up for each event loop."""
        wakes: dict[asyncio.AbstractEventLoop, list[Stream]] = {}
        for delta in deltas:
            stream = self._streams.get(delta.request_id)
            if stream is None:
                continue
            if delta.finish_reason is not None:
                stream.unfinished -= 1
                if stream.unfinished == 0:
                    del self._streams[delta.request_id]
            stream.put(delta if delta.error is None else RequestFailedError(delta.error))
            wakes.setdefault(stream.loop, []).append(stream)
        for loop, streams in wakes.items():
            wake(loop, streams)

    def _abort(self, request_id: str, stream: Stream) -> None:
        """Unless the id has gone on to another request."""
        if self._streams.get(request_id) is stream:
            del self._streams[request_id]
            self._engine.abort(request_id)

    def _end_streams(self) -> None:
        reason = "the engine was shut down" if self._error is None else f"the engine died: {self._error}"
        for stream in self._streams.values():
            stream.put(EngineStoppedError(reason))
            wake(stream.loop, [stream])
        self._streams.clear()


def wake(loop: asyncio.AbstractEventLoop, streams: list[Stream]) -> None:
    def wake_all() -> None:
        for stream in streams:
            stream.wake()

    try:
        loop.call_soon_threadsafe(wake_all)
    except RuntimeError:
        logger.debug("a reader's event loop was closed before its request ended")
