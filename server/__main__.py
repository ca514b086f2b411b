"""python -m server: an OpenAI-compatible endpoint over the engine."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator

import uvicorn

from paged.cli import parse_args
from paged.config import CacheArgs, EngineConfig, ModelArgs, RunnerArgs, SchedulerArgs
from server.app import build_app
from server.args import ServerArgs
from server.service import Service

logger = logging.getLogger("server")
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
CLOSE_SECONDS = 5  # for connections and the engine to close, once the requests are answered


class HttpServer(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves the signals to `serve`, which drains first."""
        yield


async def serve(args: ServerArgs, config: EngineConfig, listener: socket.socket) -> int:
    """Serves until a signal, or until the engine cannot be loaded; returns the exit status.

    It listens from the start: while the engine loads, and while requests are being finished after a signal, there
    is somebody to ask about health and readiness, and to send new requests away with a 503.
    """
    service = Service(args, config)
    http = HttpServer(
        uvicorn.Config(
            build_app(service),
            lifespan="off",
            log_config=None,
            server_header=False,
            timeout_graceful_shutdown=CLOSE_SECONDS,
        )
    )
    stop = asyncio.Event()
    for number in STOP_SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, on_signal, stop)
    logger.info("listening on %s:%d, loading %s", *listener.getsockname()[:2], config.model.model)
    serving = asyncio.create_task(http.serve(sockets=[listener]))
    loading = asyncio.create_task(service.load())
    stopping = asyncio.create_task(stop.wait())

    await asyncio.wait({serving, loading, stopping}, return_when=asyncio.FIRST_COMPLETED)
    status = 1 if loading.done() and not announce(loading, listener) else 0
    if status == 0:
        await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        logger.info("draining: %d requests to answer, in at most %g s", service.num_in_flight, args.drain_timeout)
        await service.drain()
    stopped = await service.shutdown(CLOSE_SECONDS)  # ends what is left with an error, which is still sent
    http.should_exit = True
    await serving
    if not stopped:
        exit_now(status)
    logger.info("stopped")
    return status


def announce(loading: asyncio.Task[None], listener: socket.socket) -> bool:
    """Says how loading ended; False if it failed."""
    error = loading.exception()
    if error is None:
        host, port = listener.getsockname()[:2]
        logger.info("ready on http://%s:%d", f"[{host}]" if ":" in host else host, port)
        return True
    logger.error("the engine could not be loaded: %s: %s", type(error).__name__, error)
    logger.debug("it was raised here", exc_info=error)
    return False


def on_signal(stop: asyncio.Event) -> None:
    if stop.is_set():
        logger.warning("second signal: exiting at once")
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
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=2048
        )
    except OSError as e:
        sys.exit(f"cannot listen on {host}:{port}: {e.strerror}; choose another --host or --port")


def set_up_logging(level: str) -> None:
    """`level` is for this project's words; libraries only warn."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for name in ("server", "paged", "models", "uvicorn.access"):
        logging.getLogger(name).setLevel(level.upper())


def main() -> None:
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
