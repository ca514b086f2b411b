"""The engine's side of the server: the engine, the one metrics page, and who is being answered."""

import asyncio
import pickle
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from paged.config import EngineConfig
from paged.engine_client import Health, TextEngine
from server.metrics import EngineMetrics

if TYPE_CHECKING:  # brings jax with it
    from paged.async_engine import AsyncEngine
    from paged.startup import Parts


@dataclass(frozen=True)
class Status:
    health: Health | None  # None until the engine is loaded
    kv_cache_usage: float
    num_in_flight: int  # generation requests that are being answered, by all front ends


class Host(Protocol):
    """What the routes need of the engine, wherever it is: in this process (EngineHost) or in another (EngineLink)."""

    @property
    def engine(self) -> TextEngine | None: ...
    async def status(self) -> Status: ...
    async def metrics_page(self) -> bytes: ...
    def count_error(self, status: int, code: str) -> None: ...
    def report_in_flight(self, count: int) -> None: ...


class EngineHost:
    """A Host for routes of its own process, and what the links of front-end processes talk to.

    Args:
      parts: what the engine runs on, instead of what it would load.
    """

    def __init__(self, model_name: str, config: EngineConfig, parts: "Parts | None" = None):
        self.config, self._parts = config, parts
        self.metrics = EngineMetrics(model_name, config)
        self.engine: AsyncEngine | None = None
        self.in_flight: dict[Any, int] = {}  # by front end

    async def load(self) -> None:
        """In a thread, which does not keep the process alive if it is told to exit. Raises what the engine raises."""
        self.engine = await in_daemon_thread("load", self._load)
        self.metrics.watch(self.engine)

    def _load(self) -> "AsyncEngine":
        from paged.async_engine import AsyncEngine

        return AsyncEngine(self.config, [self.metrics], self._parts)

    @cached_property
    def packed_info(self) -> bytes:
        """The loaded engine's EngineInfo, pickled once for all front ends: 0.1 s with a large tokenizer."""
        assert self.engine is not None
        return pickle.dumps(self.engine.info)

    async def shutdown(self, timeout: float) -> bool:
        """Stops the engine; False if that takes longer than `timeout` seconds."""
        if self.engine is None:
            return True
        try:
            await asyncio.wait_for(in_daemon_thread("shutdown", self.engine.shutdown), timeout)
        except TimeoutError:
            return False
        return True

    def status_now(self) -> Status:
        health = None if self.engine is None else self.engine.health()
        return Status(health, self.metrics.kv_cache_usage, sum(self.in_flight.copy().values()))

    async def status(self) -> Status:
        return self.status_now()

    async def metrics_page(self) -> bytes:
        return self.metrics.page()

    def count_error(self, status: int, code: str) -> None:
        self.metrics.count_error(status, code)

    def report_in_flight(self, count: int) -> None:
        self.in_flight[None] = count


async def in_daemon_thread[R](name: str, function: Callable[[], R]) -> R:
    """As asyncio.to_thread, but nobody waits for the thread when the process ends."""
    loop = asyncio.get_running_loop()
    result: asyncio.Future[R] = loop.create_future()

    def settle(method: Callable[[Any], None], value: Any) -> None:
        if not result.cancelled():
            method(value)

    def work() -> None:
        try:
            value = function()
        except BaseException as e:
            loop.call_soon_threadsafe(settle, result.set_exception, e)
        else:
            loop.call_soon_threadsafe(settle, result.set_result, value)

    threading.Thread(target=work, name=name, daemon=True).start()
    return await result
