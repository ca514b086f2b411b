"""Ahead-of-time compilation: every program before the first request, none after."""

import logging
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

logger = logging.getLogger(__name__)
BACKEND_COMPILE = "/jax/core/compile/backend_compile_duration"


def enable_persistent_cache(directory: str | None) -> None:
    """Keeps compiled programs on disk, unless the process has already chosen a place for them."""
    if directory and not jax.config.jax_compilation_cache_dir:
        path = Path(directory).expanduser()
        path.mkdir(parents=True, exist_ok=True)
        jax.config.update("jax_compilation_cache_dir", str(path))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


class CompileCounter:
    """Counts programs compiled in this process, by whomever, since it was made."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def _on_event(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        self.count += event == BACKEND_COMPILE

    def close(self) -> None:
        jax.monitoring.unregister_event_duration_listener(self._on_event)


def compile_all[Key](programs: Mapping[Key, Callable[[], jax.stages.Lowered]], what: str) -> dict[Key, Any]:
    """Traces one after the other (Python), compiles side by side (C++)."""
    begin = time.monotonic()
    with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as pool:
        futures = {key: pool.submit(lower().compile) for key, lower in programs.items()}
        compiled = {key: future.result() for key, future in futures.items()}
    logger.info("compiled %d %s in %.1f s", len(compiled), what, time.monotonic() - begin)
    return compiled
