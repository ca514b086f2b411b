"""The first thing a request meets: without one of the server's keys, nothing but the probes is open."""

import hashlib
import hmac
from collections.abc import Callable, Iterable

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import ApiError

OPEN_PATHS = frozenset({"/health", "/ready"})


class Gate:
    """Denies by default: a path is behind the keys unless it is named above, whether it exists or not."""

    def __init__(self, app: ASGIApp, keys: Iterable[str], respond: Callable[[Exception], Response]):
        self.app = app
        self.digests = [_digest(key.encode()) for key in keys]
        self.respond = respond

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS or not self.digests or self._has_key(scope):
            await self.app(scope, receive, send)
            return
        sent = "authorization" in Headers(scope=scope)
        message = (
            "The API key is wrong." if sent else "An API key is needed: send the header `Authorization: Bearer KEY`."
        )
        headers = {"WWW-Authenticate": "Bearer"}
        await self.respond(ApiError(401, message, code="invalid_api_key", headers=headers))(scope, receive, send)

    def _has_key(self, scope: Scope) -> bool:
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        sent = _digest(key.strip().encode("latin-1"))
        matches = [hmac.compare_digest(sent, digest) for digest in self.digests]
        return scheme.lower() == "bearer" and any(matches)


def _digest(key: bytes) -> bytes:
    """Of one length, so that comparing takes the same time for every key."""
    return hashlib.sha256(key).digest()
