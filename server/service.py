"""The engine behind the routes, and where it is in its life: loading, ready, draining, or failed."""

import asyncio
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from paged.config import EngineConfig
from paged.engine_client import TextEngine
from server.args import ServerArgs, read_text
from server.engine_host import EngineHost, Host
from server.errors import ApiError, bad_request, to_api_error, unavailable

logger = logging.getLogger(__name__)


class Service:
    """One process's view of it.

    Args:
      host: where the engine is; none: in this process, once it is loaded.
    """

    def __init__(self, args: ServerArgs, config: EngineConfig, host: Host | None = None):
        self.args = args
        self.config = config
        self.model_name = args.served_model_name or config.model.model
        self.chat_template = None if args.chat_template is None else read_text("chat_template", args.chat_template)
        self.created = int(time.time())
        self.host: Host = host or EngineHost(self.model_name, config)
        self.phase: Literal["loading", "ready", "draining", "failed"] = "loading"
        self.num_in_flight = 0  # generation requests being answered

    async def load(self) -> None:
        """Loads the engine into this process. Raises what the engine's constructor raises."""
        assert isinstance(self.host, EngineHost), "the engine is in another process, which loads it"
        try:
            await self.host.load()
        except Exception:
            self.phase = "failed"
            raise
        self.phase = "ready"

    @property
    def engine(self) -> TextEngine:
        """The loaded engine; ApiError 503 until there is one."""
        if (engine := self.host.engine) is None:
            raise unavailable("The model is still being loaded: try again soon.", "loading", retry_after=5)
        return engine

    @contextmanager
    def admit(self) -> Iterator[TextEngine]:
        """The engine, for one request's time; ApiError 503 while it takes none."""
        engine = self.engine
        if self.phase not in ("loading", "ready"):  # a front end has its engine a moment before all are ready
            raise unavailable("The server is shutting down: send this to another one.", "draining", retry_after=1)
        self._count_in_flight(+1)
        try:
            yield engine
        finally:
            self._count_in_flight(-1)

    def _count_in_flight(self, change: int) -> None:
        self.num_in_flight += change
        self.host.report_in_flight(self.num_in_flight)

    async def drain(self) -> None:
        """Takes no more requests and waits, at most `drain_timeout` seconds, until the accepted ones are answered."""
        self.phase = "draining"
        deadline = time.monotonic() + self.args.drain_timeout
        while self.num_in_flight and time.monotonic() < deadline:
            await asyncio.sleep(0.02)

    async def check_health(self) -> None:
        """ApiError 503 if the engine is dead, or has work but has made no progress for too long."""
        health = (await self.host.status()).health
        if health is None:
            return
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
        self.host.count_error(error.status, error.code)
        return error

    def check_text(self, engine: TextEngine, param: str) -> None:
        if engine.tokenizer is None:
            raise bad_request("The server runs without a tokenizer: send `prompt` as a list of token ids.", param)
