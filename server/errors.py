"""What can go wrong over HTTP, in OpenAI's words: {"error": {"message", "type", "param", "code"}} and a status."""

import json
import math
from typing import Any

import pydantic
from starlette.exceptions import HTTPException

from paged.errors import EngineStoppedError, InvalidRequestError, QueueFullError, RequestFailedError

TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """Ends a request with `status` and OpenAI's error body.

    `param` names the field at fault (dotted, list positions as numbers); `code` is a stable word for programs,
    which also labels the metric of refused requests.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.code = code
        self.headers = headers or {}
        server_fault = "server_error" if status >= 500 else "invalid_request_error"
        error = {"message": message, "type": TYPES.get(status, server_fault), "param": param, "code": code}
        self.body = {"error": error}


def bad_request(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    return ApiError(400, message, param=param, code=code)


def unavailable(message: str, code: str, retry_after: float) -> ApiError:
    return ApiError(503, message, code=code, headers=_retry_after(retry_after))


def to_api_error(exc: BaseException) -> ApiError:
    """The answer to any exception; what nobody expected is a 500 that tells nothing of the inside."""
    match exc:
        case ApiError():
            return exc
        case InvalidRequestError():
            return bad_request(str(exc), exc.param)
        case QueueFullError():
            return ApiError(429, str(exc), code="queue_full", headers=_retry_after(exc.retry_after))
        case EngineStoppedError():
            return unavailable(str(exc), "engine_stopped", retry_after=1)
        case RequestFailedError():
            return ApiError(500, str(exc), code="request_failed")
        case HTTPException():
            return _from_http(exc)
    return ApiError(500, "The server failed on this request; its log says why.", code="internal_error")


def from_validation(exc: pydantic.ValidationError) -> ApiError:
    """The first complaint, as a sentence."""
    error = exc.errors(include_url=False, include_context=False)[0]
    param = ".".join(map(str, error["loc"])) or None
    where = f"`{param}`" if param else "The body"
    match error["type"]:
        case "extra_forbidden":
            return bad_request(f"Unknown field {where}: check its spelling or remove it.", param, "unknown_field")
        case "missing":
            return bad_request(f"{where} is missing: it is required.", param, "missing_field")
    expected = error["msg"].removeprefix("Input should be ")
    return bad_request(f"{where} must be {expected}, not {shown(error['input'])}.", param, "invalid_type")


def shown(value: Any) -> str:
    """A value of a request for an error message, at most 60 characters of it."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _from_http(exc: HTTPException) -> ApiError:
    headers = dict(exc.headers or {})
    if exc.status_code == 404:
        return ApiError(404, "There is no such route; /v1/chat/completions is one.", code="unknown_route")
    if exc.status_code == 405:
        allowed = headers.get("Allow", "another method")
        return ApiError(405, f"This route takes {allowed}.", code="method_not_allowed", headers=headers)
    return ApiError(exc.status_code, exc.detail, code="http_error", headers=headers)


def _retry_after(seconds: float) -> dict[str, str]:
    return {"Retry-After": str(max(1, math.ceil(seconds)))}
