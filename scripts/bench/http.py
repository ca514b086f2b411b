"""A streaming HTTP client that costs the measurement little: HTTP/1.1 on asyncio's streams, a connection a request."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

LINE_LIMIT = 1 << 24  # longest header or event that is read, bytes


class HttpError(Exception):
    """An answer that is not 200."""

    def __init__(self, status: int, body: str):
        super().__init__(f"HTTP {status}: {body[:500]}")
        self.status = status


class Client:
    """Requests to one server. url: http(s)://host:port, perhaps with a path that goes before every route."""

    def __init__(self, url: str, api_key: str | None = None):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"the URL must be like http://127.0.0.1:8000, not {url!r}")
        self._host, self._tls, self._path = parts.hostname, parts.scheme == "https", parts.path.rstrip("/")
        self._port = parts.port or (443 if self._tls else 80)
        self._headers = {"Host": parts.netloc.rpartition("@")[2], "Connection": "close"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"

    async def get_json(self, route: str) -> Any:
        body = b"".join([part async for part in self._exchange("GET", route, b"")])
        return json.loads(body)

    async def events(self, route: str, body: bytes) -> AsyncIterator[bytes]:
        """The data of a POST's server-sent events, as they arrive, up to [DONE]. body: a JSON document.

        Raises:
          HttpError: the status is not 200.
          ConnectionError: the stream ended before [DONE].
        """
        rest = b""
        async for part in self._exchange("POST", route, body):
            *events, rest = (rest + part).replace(b"\r\n", b"\n").split(b"\n\n")
            for event in events:
                data = event.removeprefix(b"data:").strip()
                if data == b"[DONE]":
                    return
                if event.startswith(b"data:"):
                    yield data
        raise ConnectionError("the stream ended without [DONE]")

    async def _exchange(self, method: str, route: str, body: bytes) -> AsyncIterator[bytes]:
        """The parts of the answer's body."""
        reader, writer = await asyncio.open_connection(self._host, self._port, ssl=self._tls or None, limit=LINE_LIMIT)
        try:
            headers = self._headers | {"Content-Length": str(len(body)), "Content-Type": "application/json"}
            head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
            writer.write(f"{method} {self._path}{route} HTTP/1.1\r\n{head}\r\n".encode() + body)
            status = int((await reader.readline()).split()[1])
            answer = {}
            while (line := (await reader.readline()).strip()) != b"":
                name, _, value = line.decode("latin-1").partition(":")
                answer[name.lower()] = value.strip()
            parts = _body(reader, answer)
            if status != 200:
                raise HttpError(status, b"".join([part async for part in parts]).decode(errors="replace"))
            async for part in parts:
                yield part
        except (IndexError, ValueError, asyncio.IncompleteReadError) as e:
            raise ConnectionError(f"not an HTTP answer: {e}") from e
        finally:
            writer.close()


async def _body(reader: asyncio.StreamReader, headers: dict[str, str]) -> AsyncIterator[bytes]:
    if headers.get("transfer-encoding", "").lower() == "chunked":
        async for part in _chunked(reader):
            yield part
    elif "content-length" in headers:
        yield await reader.readexactly(int(headers["content-length"]))
    else:
        while part := await reader.read(1 << 16):
            yield part


async def _chunked(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """One item for all the chunks that came together."""
    rest = b""
    while True:
        begin = 0
        parts: list[bytes] = []
        while (line_end := rest.find(b"\r\n", begin)) >= 0:
            size = int(rest[begin:line_end].split(b";")[0], 16)
            chunk_end = line_end + 2 + size
            if len(rest) < chunk_end + 2:
                break
            if size == 0:
                yield b"".join(parts)
                return
            parts.append(rest[line_end + 2 : chunk_end])
            begin = chunk_end + 2
        if parts:
            yield b"".join(parts)
        received = await reader.read(1 << 16)
        if not received:
            raise asyncio.IncompleteReadError(rest, None)
        rest = rest[begin:] + received
