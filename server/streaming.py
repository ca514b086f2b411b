"""Server-sent events: the chunks of an answer while it is being generated."""

import json
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing
from typing import Any

from starlette.types import Receive, Scope, Send

from paged.engine_client import TextEngine
from paged.outputs import CompletionDelta
from server.errors import ApiError
from server.generation import Job, Usage, run
from server.protocol import GenerationRequest

DONE = b"data: [DONE]\n\n"
HEADERS = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}

Chunk = tuple[dict[str, Any], dict[str, Any]]  # (choice, further fields of the chunk)
ToChunks = Callable[[int, CompletionDelta], Iterable[Chunk]]


def dumps(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


class EventStream:
    """A response of events. It starts with the first event, so that a request that is refused before it gets a
    proper status; an error after that is an event of its own, and no [DONE] follows it."""

    def __init__(self, events: AsyncGenerator[bytes], refuse: Callable[[Exception], ApiError], headers: dict[str, str]):
        self.events = events
        self.refuse = refuse
        self.headers = [(k.lower().encode(), v.encode()) for k, v in (HEADERS | headers).items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self.events) as events:
            event = await anext(events)
            await send({"type": "http.response.start", "status": 200, "headers": self.headers})
            last = DONE
            try:
                await send({"type": "http.response.body", "body": event, "more_body": True})
                async for event in events:
                    await send({"type": "http.response.body", "body": event, "more_body": True})
            except Exception as e:
                last = b"data: " + dumps(self.refuse(e).body) + b"\n\n"
            await send({"type": "http.response.body", "body": last, "more_body": False})


class ChunkWriter:
    """JSON of the chunks of one answer, which begin alike."""

    def __init__(self, job: Job, object_name: str, null_usage: bool):
        head = dumps({"id": job.id, "object": object_name, "created": job.created, "model": job.model})
        self._head = b"data: " + head[:-1] + b',"choices":['
        self._tail = b',"usage":null}\n\n' if null_usage else b"}\n\n"

    def write(self, choice: dict[str, Any], more: dict[str, Any]) -> bytes:
        tail = b"," + dumps(more)[1:-1] + (b"}\n\n" if "usage" in more else self._tail) if more else self._tail
        return self._head + dumps(choice) + b"]" + tail

    def write_usage(self, usage: Usage) -> bytes:
        return self._head + b'],"usage":' + dumps(usage.as_dict()) + b"}\n\n"


async def stream_chunks(
    engine: TextEngine, job: Job, request: GenerationRequest, object_name: str, to_chunks: ToChunks
) -> AsyncGenerator[bytes]:
    """One item for what came together; `to_chunks(prompt, delta)` gives a delta its route's shape."""
    usage = Usage(job)
    writer = ChunkWriter(job, object_name, null_usage=request.include_usage)
    async with aclosing(run(engine, job)) as deltas:
        async for batch in deltas:
            usage.add(batch)
            so_far = {"usage": usage.as_dict()} if request.continuous_usage else {}
            events = [writer.write(choice, more | so_far) for p, delta in batch for choice, more in to_chunks(p, delta)]
            if events:
                yield b"".join(events)
    if request.include_usage:
        yield writer.write_usage(usage)
