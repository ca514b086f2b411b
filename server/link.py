"""Between the engine's process and a front end: a socket pair, and pickled lists of messages on it, each a name and its
arguments. What gathered for a front end while it was being written to goes as one list: the tokens of a step are one
message, those of the steps that a busy front end missed are one write."""

import asyncio
import contextlib
import itertools
import logging
import pickle
import queue
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from paged.engine_client import Command, EngineClient, EngineInfo, Health
from paged.errors import EngineStoppedError, InvalidRequestError, QueueFullError, RequestFailedError
from paged.outputs import StepOutput
from server.engine_host import EngineHost, Status
from server.errors import ApiError

if TYPE_CHECKING:
    from paged.async_engine import EngineThread

logger = logging.getLogger(__name__)
GONE = (EOFError, OSError)  # what a connection raises once the other side has closed it, or died
REFUSALS = (InvalidRequestError, QueueFullError, EngineStoppedError, RequestFailedError)
LOST = "the engine's process has ended"
ANSWER_SECONDS = 5.0  # that the engine's process gets to say how it is


class FrontLink:
    """The engine's end: a port of the engine's thread."""

    def __init__(self, connection: Connection, host: EngineHost):
        self._connection, self._host = connection, host
        self._thread: EngineThread | None = None
        self._outbox: queue.SimpleQueue[tuple[Any, ...] | None] = queue.SimpleQueue()
        self.listening, self.ready, self.drained = threading.Event(), threading.Event(), threading.Event()
        for work in (self._send_all, self._receive_all):
            threading.Thread(target=work, name="front end", daemon=True).start()

    def attach(self, thread: "EngineThread") -> None:
        """To the engine, once it is loaded; again does nothing."""
        if self._thread is not None:
            return
        self._thread = thread
        self.send("loaded", self._host.packed_info)  # see EngineLink._unpack
        thread.connect(self)

    def send(self, *message: Any) -> None:
        self._outbox.put(message)

    def deliver(self, outputs: list[StepOutput]) -> None:
        self.send("outputs", outputs)

    def refuse(self, key: int, error: Exception) -> None:
        if not isinstance(error, REFUSALS):  # which might not survive the journey
            logger.error("a request could not be added", exc_info=error)
            error = RequestFailedError(f"{type(error).__name__}: {error}")
        self.send("refusal", key, error)

    def end(self, reason: str) -> None:
        self.send("end", reason)

    def _send_all(self) -> None:
        while True:
            messages = [self._outbox.get()]
            while not self._outbox.empty():
                messages.append(self._outbox.get())
            try:
                self._connection.send([message for message in messages if message is not None])
            except GONE:
                return
            if None in messages:
                return

    def _receive_all(self) -> None:
        try:
            while True:
                for name, *args in self._connection.recv():
                    getattr(self, f"_on_{name}")(*args)
        except GONE:
            pass
        finally:  # whatever it left behind has nobody to be answered to
            self._host.in_flight.pop(self, None)
            if self._thread is not None:
                self._thread.disconnect(self)
            self._outbox.put(None)
            self._connection.close()

    def _on_command(self, command: Command) -> None:
        if self._thread is not None:
            self._thread.submit(self, command)

    def _on_ask(self, number: int, what: str) -> None:
        answer = self._host.status_now() if what == "status" else self._host.metrics.page()
        self.send("answer", number, answer)

    def _on_error(self, status: int, code: str) -> None:
        self._host.count_error(status, code)

    def _on_in_flight(self, count: int) -> None:
        self._host.in_flight[self] = count

    def _on_now(self, event: str) -> None:
        """`event` is "listening", "ready" or "drained"."""
        getattr(self, event).set()


class EngineLink:
    """A front end's end, a Host. Everything but the receiving thread is in its event loop.

    Args:
      importing: the thread that imports what the engine's tokenizer needs.

    Attributes:
      loaded: set when there is an engine; opened: when every front end has one.
      drain, stop: set when the front end shall do so; `stop` also if the engine's process is gone, which is `lost`.
    """

    def __init__(self, connection: Connection, importing: threading.Thread | None):
        self._connection, self._loop, self._importing = connection, asyncio.get_running_loop(), importing
        self.engine: EngineClient | None = None
        self.lost = False
        self.loaded, self.opened = asyncio.Event(), asyncio.Event()
        self.drain, self.stop = asyncio.Event(), asyncio.Event()
        self._numbers = itertools.count()
        self._answers: dict[int, asyncio.Future[Any]] = {}
        threading.Thread(target=self._receive_all, name="engine", daemon=True).start()

    async def status(self) -> Status:
        if self.lost:
            return Status(Health(False, 0.0, 0, 0, LOST), 0.0, 0)
        return await self._ask("status")

    async def metrics_page(self) -> bytes:
        return await self._ask("metrics")

    def count_error(self, status: int, code: str) -> None:
        self.send("error", status, code)

    def report_in_flight(self, count: int) -> None:
        self.send("in_flight", count)

    def send(self, *message: Any) -> None:
        with contextlib.suppress(*GONE):  # the receiving thread sees it too
            self._connection.send([message])

    async def _ask(self, what: str) -> Any:
        number = next(self._numbers)
        answer = self._answers[number] = self._loop.create_future()
        self.send("ask", number, what)
        try:
            return await asyncio.wait_for(answer, ANSWER_SECONDS)
        except TimeoutError:
            raise ApiError(503, "The engine's process does not answer.", code="engine_stuck") from None
        finally:
            del self._answers[number]

    def _receive_all(self) -> None:
        take: Callable[..., None] = self._take
        try:
            while True:
                messages = [self._unpack(*message) for message in self._connection.recv()]
                self._loop.call_soon_threadsafe(take, messages)
        except GONE:
            pass
        finally:
            with contextlib.suppress(RuntimeError):  # the loop has ended before
                self._loop.call_soon_threadsafe(self._on_lost)

    def _unpack(self, name: str, *args: Any) -> tuple[Any, ...]:
        """To unpickle a tokenizer imports transformers, whose modules need each other in circles: if a second thread
        does so meanwhile, both may get halves of it. So it comes pickled once more, and waits for the other thread."""
        if name != "loaded":
            return name, *args
        if self._importing is not None:
            self._importing.join()
        return name, pickle.loads(*args)

    def _take(self, messages: list[tuple[Any, ...]]) -> None:
        for name, *args in messages:
            getattr(self, f"_on_{name}")(*args)

    def _on_loaded(self, info: EngineInfo) -> None:
        self.engine = EngineClient(info, lambda command: self.send("command", command))
        self.loaded.set()

    def _on_outputs(self, outputs: list[StepOutput]) -> None:
        assert self.engine is not None
        self.engine.on_outputs(outputs)

    def _on_refusal(self, key: int, error: Exception) -> None:
        assert self.engine is not None
        self.engine.on_refusal(key, error)

    def _on_end(self, reason: str) -> None:
        assert self.engine is not None
        self.engine.on_end(reason)

    def _on_answer(self, number: int, value: Any) -> None:
        if (answer := self._answers.get(number)) is not None and not answer.done():
            answer.set_result(value)

    def _on_open(self) -> None:
        self.opened.set()

    def _on_drain(self) -> None:
        self.drain.set()

    def _on_stop(self) -> None:
        self.stop.set()

    def _on_lost(self) -> None:
        self.lost = True
        if self.engine is not None:
            self.engine.on_end(LOST)
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(ApiError(503, f"The engine has stopped: {LOST}.", code="engine_dead"))
        self.stop.set()
