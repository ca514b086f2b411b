"""python -m server: an OpenAI-compatible endpoint over the engine.

The engine runs in this process. HTTP, JSON and the making of text are in others, its front ends, so that they never
hold up a step.
"""

import asyncio
import gc
import logging
import os
import signal
import socket
import sys
from typing import TYPE_CHECKING, Any

from paged.config import CacheArgs, EngineConfig, ModelArgs, RunnerArgs, SchedulerArgs
from server.args import ServerArgs
from server.engine_host import EngineHost
from server.front_end import BACKLOG, CLOSE_SECONDS, set_up_logging
from server.supervisor import Supervisor

if TYPE_CHECKING:
    from paged.startup import Parts

logger = logging.getLogger("server")
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


async def serve(args: ServerArgs, config: EngineConfig, listener: socket.socket, parts: "Parts | None" = None) -> int:
    """Serves until a signal, or until the engine cannot be loaded; returns the exit status.

    Its front ends listen from the start: while the engine loads, and while requests are being finished after a signal,
    there is somebody to ask about health and readiness, and to send new requests away with a 503.
    """
    host = EngineHost(args.served_model_name or config.model.model, config, parts)
    supervisor = Supervisor(args, config, host, listener)
    stop = asyncio.Event()
    for number in STOP_SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, on_signal, stop, supervisor)
    loading = asyncio.create_task(host.load())
    try:
        await supervisor.start()
        logger.info("listening on %s:%d, loading %s", *listener.getsockname()[:2], config.model.model)
        status = await run(host, supervisor, loading, stop, listener)
        if status == 0:
            in_flight = host.status_now().num_in_flight
            logger.info("draining: %d requests to answer, in at most %g s", in_flight, args.drain_timeout)
            await supervisor.drain()
        stopped = await host.shutdown(CLOSE_SECONDS)  # ends what is left with an error, which is still sent
        await supervisor.stop()
    finally:
        supervisor.kill()  # those that are left; what multiprocessing would send them, they ignore
    if not stopped or not loading.done():
        exit_now(status)
    logger.info("stopped")
    return status


async def run(
    host: EngineHost, supervisor: Supervisor, loading: asyncio.Task[None], stop: asyncio.Event, listener: socket.socket
) -> int:
    """Until there is a reason to end; returns the exit status."""
    ends: set[asyncio.Future[Any]] = {asyncio.create_task(stop.wait()), supervisor.failed}
    await asyncio.wait({loading, *ends}, return_when=asyncio.FIRST_COMPLETED)
    if loading.done():
        if (error := loading.exception()) is not None:
            logger.error("the engine could not be loaded: %s: %s", type(error).__name__, error)
            logger.debug("it was raised here", exc_info=error)
            return 1
        gc.freeze()  # what start-up has left is no garbage: collections between steps need not look at it
        await supervisor.open()
        host_name, port = listener.getsockname()[:2]
        logger.info("ready on http://%s:%d", f"[{host_name}]" if ":" in host_name else host_name, port)
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    if supervisor.failed.done():
        logger.error("stopping: %s", supervisor.failed.result())
        return 1
    return 0


def on_signal(stop: asyncio.Event, supervisor: Supervisor) -> None:
    if stop.is_set():
        logger.warning("second signal: exiting at once")
        supervisor.kill()
        exit_now(1)
    stop.set()


def exit_now(status: int) -> None:
    """Without waiting for threads: one may be loading, compiling or stuck."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def listen(host: str, port: int) -> socket.socket:
    """Exits with a message if the address cannot be had: before anything is loaded."""
    try:
        return socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=BACKLOG
        )
    except OSError as e:
        sys.exit(f"cannot listen on {host}:{port}: {e.strerror}; choose another --host or --port")


def main() -> None:
    from paged.cli import parse_args  # slow to import, and front ends import this file

    server, model, cache, scheduler, runner = parse_args(
        "python -m server",
        "Serves a language model over OpenAI's HTTP API.",
        ServerArgs,
        ModelArgs,
        CacheArgs,
        SchedulerArgs,
        RunnerArgs,
    )
    set_up_logging(server.log_level)
    listener = listen(server.host, server.port)
    config = EngineConfig(model=model, cache=cache, scheduler=scheduler, runner=runner)
    sys.exit(asyncio.run(serve(server, config, listener)))


if __name__ == "__main__":
    main()
