"""Ahead-of-time compilation: every program before the first request, none after."""

import logging
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

from paged.program_store import ProgramStore

logger = logging.getLogger(__name__)
BACKEND_COMPILE = "/jax/core/compile/backend_compile_duration"


class CompileCounter:
    """Counts programs compiled in this process, by whomever, since it was made."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def _on_event(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        self.count += event == BACKEND_COMPILE

    def close(self) -> None:
        jax.monitoring.unregister_event_duration_listener(self._on_event)


def compile_all(
    programs: Mapping[str, Callable[[], jax.stages.Lowered]], what: str, store: ProgramStore
) -> dict[str, Any]:
    """Programs by name, from the store where it has them; the others are traced one after the other (Python) and
    compiled side by side (C++)."""
    begin = time.monotonic()
    with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as pool:
        stored = dict(zip(programs, pool.map(store.load, programs), strict=True))
        futures = {
            name: pool.submit(_compile, name, lower(), store) for name, lower in programs.items() if not stored[name]
        }
        compiled = {name: futures[name].result() if name in futures else stored[name] for name in programs}
    seconds = time.monotonic() - begin
    logger.info("%d %s in %.1f s, %d of them compiled", len(compiled), what, seconds, len(futures))
    return compiled


def _compile(name: str, lowered: jax.stages.Lowered, store: ProgramStore) -> Any:
    program = lowered.compile()
    store.save(name, program)
    return program
