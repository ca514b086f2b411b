"""The engine in a thread of its own: commands in, tokens out; and async streams for event loops of its process."""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from functools import partial
from typing import Any, Protocol

from paged.config import EngineConfig
from paged.engine import Engine
from paged.engine_client import (
    AbortRequest,
    AddRequest,
    Command,
    EngineClient,
    FinishCompletion,
    Health,
)
from paged.errors import EngineStoppedError
from paged.outputs import CompletionDelta, StepOutput
from paged.sampling_params import SamplingParams
from paged.startup import Parts
from paged.stats import StatsListener

logger = logging.getLogger(__name__)


class Port(Protocol):
    """Where a client's tokens go. Nothing here may block: it is the engine's thread that calls."""

    def deliver(self, outputs: list[StepOutput]) -> None:
        """Tags are the client's own keys."""

    def refuse(self, key: int, error: Exception) -> None:
        """A request was not accepted."""

    def end(self, reason: str) -> None:
        """Nothing comes any more."""


class EngineThread:
    """Loads and compiles when constructed, then runs.

    Only this thread touches the engine: others leave commands in its inbox, which it empties between steps.
    """

    def __init__(self, config: EngineConfig, listeners: Sequence[StatsListener] = (), parts: Parts | None = None):
        self.engine = Engine(config, listeners, parts)
        self.info = self.engine.info
        self._inbox: queue.SimpleQueue[tuple[Port, Command] | Port | None] = queue.SimpleQueue()
        self._ports: set[Port] = set()
        self._stopped = self._closed = False
        self._closing = threading.Lock()
        self._error: BaseException | None = None
        self._busy_since: float | None = None  # start of the step under way; None when idle
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # ---- any thread -----------------------------------------------------------------------------------------

    def connect(self, port: Port) -> None:
        with self._closing:
            if not self._closed:
                self._ports.add(port)
                return
        port.end(self._reason)

    def disconnect(self, port: Port) -> None:
        """Aborts what the port's client left."""
        with self._closing:
            self._ports.discard(port)
        self._inbox.put(port)

    def submit(self, port: Port, command: Command) -> None:
        with self._closing:
            if not self._closed:
                self._inbox.put((port, command))
                return
        if isinstance(command, AddRequest):
            port.refuse(command.key, EngineStoppedError(self._reason))

    def health(self) -> Health:
        busy_since, scheduler = self._busy_since, self.engine.scheduler
        return Health(
            alive=self._error is None and self._thread.is_alive(),
            last_step_age=0.0 if busy_since is None else time.monotonic() - busy_since,
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            error=None if self._error is None else f"{type(self._error).__name__}: {self._error}",
        )

    def shutdown(self) -> None:
        """Ends the thread after the current step; unfinished requests end with EngineStoppedError."""
        self._inbox.put(None)
        self.join()

    def join(self) -> None:
        self._thread.join()

    # ---- the engine's thread --------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stopped:
                self._take_commands()
                if not self._stopped and self.engine.has_unfinished_requests():
                    self._busy_since = time.monotonic()
                    publish(self.engine.step_outputs())
        except BaseException as error:
            logger.critical("the engine's thread died", exc_info=error)
            self._error = error
        finally:
            self._stopped = True
            with self._closing:
                self._closed = True  # whatever comes later is refused by the caller's thread
                ports = list(self._ports)
            for port in ports:
                port.end(self._reason)
            self.engine.close()

    @property
    def _reason(self) -> str:
        return "the engine was shut down" if self._error is None else f"the engine died: {self._error}"

    def _take_commands(self) -> None:
        """Runs what is in the inbox; waits for something when there is nothing else to do."""
        while True:
            idle = not self._stopped and not self.engine.has_unfinished_requests()
            if idle:
                self._busy_since = None
            try:
                command = self._inbox.get(block=idle)
            except queue.Empty:
                return
            if command is None:
                self._stopped = True
            elif isinstance(command, tuple):
                self._obey(*command)
            else:
                self._abort_all(command)

    def _obey(self, port: Port, command: Command) -> None:
        request_id = f"{id(port):x}-{command.key}"
        match command:
            case AddRequest():
                try:
                    self.engine.add_request(
                        request_id,
                        command.prompt,
                        command.params,
                        priority=command.priority,
                        cache_salt=command.cache_salt,
                        arrival_time=command.arrival_time,
                        tags=[(port, command.key + index) for index in range(command.params.n)],
                    )
                except Exception as error:
                    port.refuse(command.key, error)
            case FinishCompletion():
                self.engine.finish(request_id, command.index, "stop", command.stop_string)
            case AbortRequest():
                self.engine.abort(request_id)

    def _abort_all(self, port: Port) -> None:
        for request_id, tag in self.engine.unfinished_requests():
            if tag[0] is port:
                self.engine.abort(request_id)


def publish(outputs: list[StepOutput]) -> None:
    """Hands steps' outputs over, each port its own and all at once. Tags are (port, key)."""
    by_port: dict[Port, list[StepOutput]] = {}
    for output in outputs:
        parts: dict[Port, StepOutput] = {}
        for (port, key), token_id in zip(output.tags, output.token_ids, strict=True):
            if (part := parts.get(port)) is None:
                part = parts[port] = StepOutput()
            part.tags.append(key)
            part.token_ids.append(token_id)
        for (port, key), delta in output.deltas:
            parts.setdefault(port, StepOutput()).deltas.append((key, delta))
        for port, part in parts.items():
            by_port.setdefault(port, []).append(part)
    for port, port_outputs in by_port.items():
        port.deliver(port_outputs)


class LoopPort:
    """To a client in this process, by way of its event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self.loop = loop
        self.client: EngineClient | None = None

    def deliver(self, outputs: list[StepOutput]) -> None:
        self._call(EngineClient.on_outputs, outputs)

    def refuse(self, key: int, error: Exception) -> None:
        self._call(EngineClient.on_refusal, key, error)

    def end(self, reason: str) -> None:
        self._call(EngineClient.on_end, reason)

    def _call(self, method: Callable[..., None], *args: Any) -> None:
        try:
            self.loop.call_soon_threadsafe(method, self.client, *args)
        except RuntimeError:
            logger.debug("a reader's event loop was closed before its requests ended")


class AsyncEngine:
    """Loads and compiles when constructed; then serves any number of event loops and threads of this process."""

    def __init__(self, config: EngineConfig, listeners: Sequence[StatsListener] = (), parts: Parts | None = None):
        self.config = config
        self.thread = EngineThread(config, listeners, parts)
        self.info = info = self.thread.info
        self.tokenizer, self.vocab_size, self.max_model_len = info.tokenizer, info.vocab_size, info.max_model_len
        self.max_num_seqs, self.default_sampling_params = info.max_num_seqs, info.default_sampling_params
        self._ports: dict[asyncio.AbstractEventLoop, LoopPort] = {}
        self._connecting = threading.Lock()
        self._draining = False

    @property
    def _engine(self) -> Engine:
        return self.thread.engine

    def generate(
        self,
        prompt: list[int],
        params: SamplingParams,
        request_id: str,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> AsyncGenerator[list[CompletionDelta]]:
        """As EngineClient.generate, in the running event loop."""
        if self._draining:
            raise EngineStoppedError("the engine is shutting down")
        return self._client().generate(prompt, params, request_id, priority=priority, cache_salt=cache_salt)

    def health(self) -> Health:
        return self.thread.health()

    async def drain(self, timeout: float) -> bool:
        """Takes no new requests and waits for the running ones, at most `timeout` seconds; False if some are left."""
        self._draining = True
        end = time.monotonic() + timeout
        while self._num_unfinished and self.health().alive:
            if time.monotonic() >= end:
                return False
            await asyncio.sleep(0.02)
        return True

    def shutdown(self) -> None:
        """Ends the thread after the current step; unfinished requests end with EngineStoppedError."""
        self._draining = True
        self.thread.shutdown()

    @property
    def _num_unfinished(self) -> int:
        return sum(port.client.num_unfinished for port in self._ports.values() if port.client is not None)

    def _client(self) -> EngineClient:
        """The running loop's."""
        loop = asyncio.get_running_loop()
        with self._connecting:
            if loop not in self._ports:
                for closed in [other for other in self._ports if other.is_closed()]:
                    self.thread.disconnect(self._ports.pop(closed))
                port = self._ports[loop] = LoopPort(loop)
                port.client = EngineClient(self.info, partial(self.thread.submit, port))
                self.thread.connect(port)
            client = self._ports[loop].client
        assert client is not None
        return client
