"""What the server can be told beside what the engine takes: flags of `python -m server`."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from paged.config import option, require
from paged.errors import InvalidRequestError


@dataclass(frozen=True, kw_only=True)
class ServerArgs:
    _argument_group_name: ClassVar[str] = "server"

    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 for every interface")
    port: int = option(8000, "port to listen on; 0 picks a free one")
    api_server_count: int | None = option(None, "processes for HTTP and text; none: 1 to 4, by processors")
    served_model_name: str | None = option(None, "name that requests call the model by; none: --model's value")
    chat_template: str | None = option(None, "file with the Jinja chat template; none: the model's own")
    api_key: tuple[str, ...] = option((), "keys that open every route but /health, /ready; none: open to all")
    api_key_file: str | None = option(None, "file of more such keys, one a line")
    max_choices: int = option(1024, "most completions (prompts times n) that one request may ask for")
    max_body_bytes: int = option(32 * 1024 * 1024, "longest request body; a longer one is refused (413)")
    max_step_age: float = option(60.0, "seconds without progress on waiting work until /health is 503")
    drain_timeout: float = option(30.0, "seconds that running requests get to finish after SIGTERM")
    log_level: Literal["debug", "info", "warning", "error"] = option("info", "least severe messages to log")

    def __post_init__(self) -> None:
        require(0 <= self.port <= 65535, "port", "must be in [0, 65535]")
        require(self.api_server_count is None or self.api_server_count >= 1, "api_server_count", "must be at least 1")
        require(self.served_model_name != "", "served_model_name", "must not be empty")
        require(self.max_choices >= 1, "max_choices", "must be at least 1")
        require(self.max_body_bytes >= 1, "max_body_bytes", "must be at least 1")
        require(self.max_step_age > 0, "max_step_age", "must be positive")
        require(self.drain_timeout >= 0, "drain_timeout", "must not be negative")
        require(all(self.api_key), "api_key", "must not be empty")
        for name in ("chat_template", "api_key_file"):
            path = getattr(self, name)
            require(path is None or Path(path).is_file(), name, f"must name a file; there is none at {path}")
        if self.api_key_file is not None:
            require(bool(read_keys(self.api_key_file)), "api_key_file", "has no key in it")

    @property
    def keys(self) -> tuple[str, ...]:
        """Every key that opens the server; empty if it needs none."""
        return self.api_key + (read_keys(self.api_key_file) if self.api_key_file is not None else ())


def read_text(param: str, path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise InvalidRequestError(f"{param} cannot be read: {e}", param=param) from None


def read_keys(path: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in read_text("api_key_file", path).splitlines() if line.strip())
