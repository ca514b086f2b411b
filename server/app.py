"""The routes."""

import asyncio
from collections.abc import Callable
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from paged.engine_client import TextEngine
from paged.errors import EngineStoppedError, InvalidRequestError, QueueFullError, RequestFailedError
from server import chat, completions, tokens
from server.endpoint import Handler, JsonEndpoint
from server.errors import ApiError, unavailable
from server.gate import Gate
from server.metrics import package_version
from server.service import Service
from server.streaming import EventStream, stream_chunks

LARGE_BODY = 4 * 1024  # bytes; tokenizing more takes milliseconds, longer than a hop to a thread
EXPECTED = (ApiError, HTTPException, InvalidRequestError, QueueFullError, EngineStoppedError, RequestFailedError)


def build_app(service: Service) -> Starlette:
    def respond(exc: Exception) -> Response:
        error = service.refuse(exc)
        return JSONResponse(error.body, error.status, error.headers)

    async def on_error(request: Request, exc: Exception) -> Response:
        return respond(exc)

    status, generation = StatusRoutes(service), GenerationRoutes(service)

    def post(path: str, handler: Handler) -> Route:
        return Route(path, JsonEndpoint(service, handler), methods=["POST"])

    app = Starlette(
        routes=[
            post("/v1/completions", generation.complete),
            post("/v1/chat/completions", generation.chat),
            post("/tokenize", generation.tokenize),
            post("/detokenize", generation.detokenize),
            Route("/v1/models", status.models),
            Route("/v1/models/{id:path}", status.model),
            Route("/health", status.health),
            Route("/ping", status.health, methods=["GET", "POST"]),
            Route("/ready", status.ready),
            Route("/load", status.load),
            Route("/metrics", status.metrics),
            Route("/version", status.version),
        ],
        middleware=[Middleware(Gate, keys=service.args.keys, respond=respond)],
        exception_handlers=dict.fromkeys((*EXPECTED, Exception), on_error),
    )
    app.router.redirect_slashes = False
    return app


class GenerationRoutes:
    def __init__(self, service: Service):
        self.service = service

    async def complete(self, engine: TextEngine, body: bytes, headers: Headers) -> ASGIApp:
        request, job = await off_loop(
            body, completions.prepare, self.service, engine, body, headers.get("x-request-id")
        )
        id_header = {"X-Request-Id": job.id}
        if not request.stream:
            return JSONResponse(await completions.answer(engine, job, request), headers=id_header)
        shape = completions.ChoiceShape(engine, job, request)
        events = stream_chunks(engine, job, request, completions.OBJECT, shape.chunks)
        return EventStream(events, self.service.refuse, id_header)

    async def chat(self, engine: TextEngine, body: bytes, headers: Headers) -> ASGIApp:
        request, job = await off_loop(body, chat.prepare, self.service, engine, body, headers.get("x-request-id"))
        id_header = {"X-Request-Id": job.id}
        if not request.stream:
            return JSONResponse(await chat.answer(engine, job, request), headers=id_header)
        shape = chat.ChoiceShape(engine, job, request)
        events = stream_chunks(engine, job, request, chat.CHUNK_OBJECT, shape.chunks)
        return EventStream(events, self.service.refuse, id_header)

    async def tokenize(self, engine: TextEngine, body: bytes, headers: Headers) -> ASGIApp:
        return JSONResponse(await off_loop(body, tokens.tokenize, self.service, engine, body))

    async def detokenize(self, engine: TextEngine, body: bytes, headers: Headers) -> ASGIApp:
        return JSONResponse(await off_loop(body, tokens.detokenize, self.service, engine, body))


class StatusRoutes:
    def __init__(self, service: Service):
        self.service = service

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        self.service.check_model(request.path_params["id"])
        return JSONResponse(self._card())

    def _card(self) -> dict[str, Any]:
        return {
            "id": self.service.model_name,
            "object": "model",
            "created": self.service.created,
            "owned_by": "paged",
            "root": self.service.config.model.model,
            "parent": None,
            "max_model_len": self.service.engine.max_model_len,
        }

    async def health(self, request: Request) -> Response:
        """Is the process worth keeping? While the model is loading it is, and while it answers what it has."""
        await self.service.check_health()
        return JSONResponse({"status": self.service.phase})

    async def ready(self, request: Request) -> Response:
        """Should new requests come here?"""
        if self.service.phase != "ready":
            raise unavailable(f"The server is {self.service.phase}.", f"{self.service.phase}", retry_after=5)
        await self.service.check_health()
        return JSONResponse({"status": "ready"})

    async def load(self, request: Request) -> Response:
        """Requests that are being answered here, and what of them is in the engine."""
        status = await self.service.host.status()
        if status.health is None:
            raise unavailable("The model is still being loaded: try again soon.", "loading", retry_after=5)
        return JSONResponse(
            {
                "server_load": status.num_in_flight,
                "num_requests_running": status.health.num_running,
                "num_requests_waiting": status.health.num_waiting,
                "kv_cache_usage_perc": status.kv_cache_usage,
            }
        )

    async def metrics(self, request: Request) -> Response:
        page = await self.service.host.metrics_page()
        return Response(page, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def version(self, request: Request) -> Response:
        return JSONResponse({"version": package_version()})


async def off_loop[**P, R](body: bytes, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Calls a function whose time grows with the body: of a large one in a thread, so that streams go on."""
    if len(body) > LARGE_BODY:
        return await asyncio.to_thread(function, *args, **kwargs)
    return function(*args, **kwargs)
