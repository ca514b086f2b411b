"""What every POST route has in common: a JSON body in, an answer out, and no work for a client that has gone."""

import asyncio
from collections.abc import Awaitable, Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from paged.engine_client import TextEngine
from server.errors import ApiError
from server.service import Service

Handler = Callable[[TextEngine, bytes, Headers], Awaitable[ASGIApp]]


class ClientGoneError(Exception):
    """The client hung up before its body was complete; there is nobody to answer."""


class JsonEndpoint:
    """Reads the body, has `handler` make the response, and sends it.

    A client that hangs up at any time cancels both, which closes the engine's iterators and so frees the blocks.
    """

    def __init__(self, service: Service, handler: Handler):
        self.service = service
        self.handler = handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        with self.service.admit() as engine:
            check_content_type(headers)
            try:
                body = await read_body(headers, receive, self.service.args.max_body_bytes)
            except ClientGoneError:
                return

            async def respond() -> None:
                response = await self.handler(engine, body, headers)
                await response(scope, receive, send)

            await run_while_connected(respond(), receive)


def check_content_type(headers: Headers) -> None:
    """Also keeps web pages of other origins out: a browser sends JSON only after asking, and nobody answers yes."""
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        message = "The body must be JSON, with the header `Content-Type: application/json`."
        raise ApiError(415, message, code="unsupported_media_type")


async def read_body(headers: Headers, receive: Receive, limit: int) -> bytes:
    """ApiError 413 as soon as the body is known to be longer than `limit`, before it is held in memory."""
    too_large = ApiError(
        413,
        f"The body is longer than {limit} bytes, the most that this server reads: send less at once.",
        code="body_too_large",
        headers={"Connection": "close"},
    )
    announced = headers.get("content-length", "0")
    if announced.isdigit() and int(announced) > limit:
        raise too_large
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > limit:
            raise too_large
        if not message.get("more_body", False):
            return b"".join(parts)


async def run_while_connected(work: Awaitable[None], receive: Receive) -> None:
    """Awaits `work`, or cancels it when the client hangs up."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(hang_up(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        watching.cancel()
        working.cancel()  # does nothing to finished work
        await asyncio.gather(working, watching, return_exceptions=True)
    if not working.cancelled():
        working.result()


async def hang_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
