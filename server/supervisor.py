"""The front-end processes, as the engine's process keeps them: started, restarted, drained and stopped."""

import asyncio
import logging
import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess

from paged.config import EngineConfig
from server.args import ServerArgs
from server.engine_host import EngineHost
from server.front_end import CLOSE_SECONDS, run_front_end
from server.link import FrontLink

logger = logging.getLogger("server")
MOST = 4  # unless asked for more


class Supervisor:
    """Processes that share one listening socket.

    failed: set to what is wrong when one could not start; it is then time to stop.
    """

    def __init__(self, args: ServerArgs, config: EngineConfig, host: EngineHost, listener: socket.socket):
        self._args, self._config, self._host, self._listener = args, config, host, listener
        self._processes: dict[FrontLink, BaseProcess] = {}
        self._stopping = False
        self.failed: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def start(self) -> None:
        """Returns when all of them listen, or one cannot."""
        for _ in range(self._args.api_server_count or min(MOST, max(1, (os.cpu_count() or 1) // 4))):
            self._start_one()
        await self._until(lambda: all(link.listening.is_set() for link in self._processes), None)

    def _start_one(self) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would inherit XLA's locks
        ours, theirs = context.Pipe()
        is_loaded = self._host.engine is not None
        process = context.Process(
            target=run_front_end, args=(theirs, self._listener, self._args, self._config, is_loaded), daemon=True
        )
        process.start()
        theirs.close()
        link = FrontLink(ours, self._host)
        self._processes[link] = process
        asyncio.get_running_loop().add_reader(process.sentinel, self._on_end, link)
        if is_loaded and self._host.engine is not None:
            link.attach(self._host.engine.thread)
            link.send("open")

    async def open(self) -> None:
        """Once the engine is loaded: when the last of them can serve, all say that they are ready."""
        assert self._host.engine is not None
        for link in self._processes:
            link.attach(self._host.engine.thread)
        await self._until(lambda: all(link.ready.is_set() for link in self._processes), None)
        for link in self._processes:
            link.send("open")

    def _on_end(self, link: FrontLink) -> None:
        """Another takes its place, unless it died before it could serve: then so would the other."""
        process = self._processes.pop(link)
        asyncio.get_running_loop().remove_reader(process.sentinel)
        process.join()
        if self._stopping:
            return
        served = link.listening.is_set() and (self._host.engine is None or link.ready.is_set())
        if served:
            logger.error("a front end died (exit code %s): its requests are lost, another starts", process.exitcode)
            self._start_one()
        elif not self.failed.done():
            self.failed.set_result(f"a front end died as it started (exit code {process.exitcode})")

    async def drain(self) -> None:
        """Answers what has been accepted, within the drain timeout."""
        self._stopping = True
        for link in self._processes:
            link.send("drain")
        seconds = self._args.drain_timeout + CLOSE_SECONDS
        await self._until(lambda: all(link.drained.is_set() for link in self._processes), seconds)

    async def stop(self) -> None:
        self._stopping = True
        for link in self._processes:
            link.send("stop")
        await self._until(lambda: not self._processes, 2 * CLOSE_SECONDS)
        self.kill()

    def kill(self) -> None:
        self._stopping = True
        for process in self._processes.values():
            process.kill()

    async def _until(self, condition: Callable[[], bool], seconds: float | None) -> None:
        end = None if seconds is None else time.monotonic() + seconds
        while not condition() and not self.failed.done() and (end is None or time.monotonic() < end):
            await asyncio.sleep(0.01)
