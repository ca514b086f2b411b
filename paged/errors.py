"""What can go wrong with a request, by whose fault it is."""


class InvalidRequestError(ValueError):
    """The caller's mistake. `param` names the offending field, for OpenAI's error body (HTTP 400)."""

    def __init__(self, message: str, param: str | None = None):
        super().__init__(message)
        self.param = param


class QueueFullError(RuntimeError):
    """The waiting queue is at its limit; nothing was done for this request (HTTP 429).

    `retry_after` is an estimate, in seconds, of when the queue will have room.
    """

    def __init__(self, message: str, retry_after: float = 1.0):
        super().__init__(message)
        self.retry_after = retry_after


class EngineStoppedError(RuntimeError):
    """The engine is draining or has shut down and takes no new requests (HTTP 503)."""


class RequestFailedError(RuntimeError):
    """An exception in a step ended this request; the engine goes on (HTTP 500)."""
