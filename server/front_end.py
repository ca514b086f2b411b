"""A front end: a process that answers HTTP on the server's socket and leaves the computing to the engine's process."""

import asyncio
import contextlib
import gc
import logging
import signal
import socket
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection

import uvicorn

from paged.config import EngineConfig
from paged.no_pytorch import import_transformers_alone
from server.app import build_app
from server.args import ServerArgs
from server.link import EngineLink
from server.service import Service

logger = logging.getLogger("server")
BACKLOG = 2048  # connections that wait to be accepted
ACCEPTED_AT_ONCE = 4  # so that a burst of connections is shared among the front ends
CLOSE_SECONDS = 5  # for connections and the engine to close, once the requests are answered


class HttpServer(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves the signals to the engine's process."""
        yield


def run_front_end(
    connection: Connection, listener: socket.socket, args: ServerArgs, config: EngineConfig, is_loaded: bool
) -> None:
    """The whole life of the process. It ends when the engine's process says so, or has ended.

    Args:
      is_loaded: the engine is loaded already, so nobody shall be told that it is not.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # a terminal sends them to everyone
    set_up_logging(args.log_level)
    asyncio.run(serve_http(connection, listener, args, config, is_loaded))


async def serve_http(
    connection: Connection, listener: socket.socket, args: ServerArgs, config: EngineConfig, is_loaded: bool
) -> None:
    importing = None
    if not config.model.skip_tokenizer_init:
        importing = threading.Thread(target=import_tokenizers, daemon=True)  # keeps no process that is told to end
        importing.start()
    link = EngineLink(connection, importing)
    service = Service(args, config, link)
    following = asyncio.create_task(follow(link, service))
    while is_loaded and service.phase == "loading" and not link.lost:
        await asyncio.sleep(0.005)
    http = HttpServer(
        uvicorn.Config(
            build_app(service),
            lifespan="off",
            log_config=None,
            server_header=False,
            backlog=ACCEPTED_AT_ONCE,
            timeout_graceful_shutdown=CLOSE_SECONDS,
        )
    )
    serving = asyncio.create_task(http.serve(sockets=[listener]))
    while not http.started and not serving.done():
        await asyncio.sleep(0.005)
    listener.listen(BACKLOG)  # uvicorn has set it to what it accepts at once
    link.send("now", "listening")
    await asyncio.wait({serving, asyncio.create_task(link.stop.wait())}, return_when=asyncio.FIRST_COMPLETED)
    if link.lost:
        logger.error("the engine's process has ended: this front end follows in %d s", CLOSE_SECONDS)
        await asyncio.sleep(CLOSE_SECONDS)
    http.should_exit = True
    await serving
    following.cancel()


def import_tokenizers() -> None:
    """What the tokenizer that comes from the engine needs, which takes seconds, while the engine loads."""
    import_transformers_alone()
    from transformers import PreTrainedTokenizerFast  # noqa: F401


async def follow(link: EngineLink, service: Service) -> None:
    """Ready when the engine is, draining when told."""
    drain = asyncio.create_task(link.drain.wait())
    for event, said in ((link.loaded, "ready"), (link.opened, None)):
        await asyncio.wait({asyncio.create_task(event.wait()), drain}, return_when=asyncio.FIRST_COMPLETED)
        if said and not drain.done():
            link.send("now", said)
    if not drain.done():
        gc.freeze()  # what start-up has left is no garbage: to look through it takes 30 ms, and all answers wait
        service.phase = "ready"
    await drain
    await service.drain()
    link.send("now", "drained")


def set_up_logging(level: str) -> None:
    """`level` is for this project's words; libraries only warn."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for name in ("server", "paged", "models", "uvicorn.access"):
        logging.getLogger(name).setLevel(level.upper())
