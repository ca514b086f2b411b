"""The engine behind the routes, and where it is in its life: loading, ready, draining, or failed."""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from paged.async_engine import AsyncEngine
from paged.config import EngineConfig
from server.args import ServerArgs, read_text
from server.errors import ApiError, bad_request, to_api_error, unavailable
from server.metrics import EngineMetrics

logger = logging.getLogger(__name__)


class Service:
    def __init__(self, args: ServerArgs, config: EngineConfig):
        self.args = args
        self.config = config
        self.model_name = args.served_model_name or config.model.model
        self.chat_template = None if args.chat_template is None else read_text("chat_template", args.chat_template)
        self.created = int(time.time())
        self.metrics = EngineMetrics(self.model_name, config)
        self.phase: Literal["loading", "ready", "draining", "failed"] = "loading"
        self.num_in_flight = 0  # generation requests being answered
        self._engine: AsyncEngine | None = None

    async def load(self) -> None:
        """Loads the engine in a thread of its own, which does not keep the process alive if it is told to exit.

        Raises what the engine's constructor raises.
        """
        loop = asyncio.get_running_loop()
        loaded: asyncio.Future[AsyncEngine] = loop.create_future()

        def work() -> None:
            try:
                engine = AsyncEngine(self.config, [self.metrics])
            except BaseException as e:
                loop.call_soon_threadsafe(_unless_cancelled, loaded.set_exception, e)
            else:
                loop.call_soon_threadsafe(_unless_cancelled, loaded.set_result, engine)

        def _unless_cancelled(settle: Callable[[Any], None], value: Any) -> None:
            if not loaded.cancelled():
                settle(value)

        threading.Thread(target=work, name="load", daemon=True).start()
        try:
            self._engine = await loaded
        except Exception:
            self.phase = "failed"
            raise
        self.metrics.watch(self._engine)
        if self.phase == "loading":  # not told to stop meanwhile
            self.phase = "ready"

    @property
    def engine(self) -> AsyncEngine:
        """The loaded engine; ApiError 503 until there is one."""
        if self._engine is None:
            raise unavailable("The model is still being loaded: try again soon.", "loading", retry_after=5)
        return self._engine

    @contextmanager
    def admit(self) -> Iterator[AsyncEngine]:
        """The engine, for one request's time; ApiError 503 while it takes none."""
        engine = self.engine
        if self.phase != "ready":
            raise unavailable("The server is shutting down: send this to another one.", "draining", retry_after=1)
        self.num_in_flight += 1
        try:
            yield engine
        finally:
            self.num_in_flight -= 1

    async def drain(self) -> None:
        """Takes no more requests and waits, at most `drain_timeout` seconds, until the accepted ones are answered."""
        self.phase = "draining"
        if self._engine is None:
            return
        deadline = time.monotonic() + self.args.drain_timeout
        await self._engine.drain(self.args.drain_timeout)
        while self.num_in_flight and time.monotonic() < deadline:
            await asyncio.sleep(0.02)

    async def shutdown(self, timeout: float) -> bool:
        """Stops the engine; False if that, or its loading, would take longer than `timeout` seconds."""
        if self._engine is None:
            return self.phase == "failed"
        done = asyncio.Event()
        loop = asyncio.get_running_loop()

        def work(engine: AsyncEngine) -> None:
            engine.shutdown()
            loop.call_soon_threadsafe(done.set)

        threading.Thread(target=work, args=(self._engine,), name="shutdown", daemon=True).start()
        try:
            await asyncio.wait_for(done.wait(), timeout)
        except TimeoutError:
            return False
        return True

    def check_health(self) -> None:
        """ApiError 503 if the engine is dead, or has work but has made no progress for too long."""
        if self._engine is None:
            return
        health = self._engine.health()
        if not health.alive:
            raise ApiError(503, f"The engine has stopped: {health.error or 'no reason is known'}.", code="engine_dead")
        if health.last_step_age > self.args.max_step_age:
            raise ApiError(
                503,
                f"The engine has made no progress for {health.last_step_age:.0f} seconds, with {health.num_running} "
                f"requests running and {health.num_waiting} waiting.",
                code="engine_stuck",
            )

    def check_model(self, name: str | None) -> None:
        """A request may leave the model out: there is only one."""
        if name is not None and name != self.model_name:
            message = f"The model `{name}` does not exist; this server has `{self.model_name}`."
            raise ApiError(404, message, param="model", code="model_not_found")

    def check_choices(self, num_prompts: int, n: int) -> None:
        if num_prompts * n > self.args.max_choices:
            message = (
                f"The request asks for {num_prompts} x {n} completions; at most {self.args.max_choices} are allowed."
            )
            raise bad_request(message, "n")

    def refuse(self, exc: Exception) -> ApiError:
        """Turns any exception into the error that the client gets; counted, and logged if the fault is ours."""
        error = to_api_error(exc)
        if error.code == "internal_error":
            logger.error("a request failed unexpectedly", exc_info=exc)
        self.metrics.count_error(error)
        return error

    def check_text(self, engine: AsyncEngine, param: str) -> None:
        if engine.tokenizer is None:
            raise bad_request("The server runs without a tokenizer: send `prompt` as a list of token ids.", param)
