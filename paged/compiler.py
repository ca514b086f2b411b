"""Ahead-of-time compilation: every program before the first request, none after."""

import gc
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import jax

from paged.program_store import NO_STORE, ProgramStore

logger = logging.getLogger(__name__)
BACKEND_COMPILE = "/jax/core/compile/backend_compile_duration"
Lowering = Callable[[], jax.stages.Lowered]


class CompileCounter:
    """Counts programs compiled in this process, by whomever, since it was made."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def _on_event(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        self.count += event == BACKEND_COMPILE

    def close(self) -> None:
        jax.monitoring.unregister_event_duration_listener(self._on_event)


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Tracing makes millions of objects and next to no cycles: looking for these takes a fifth of its time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Compiler:
    """Gives programs by name: from the store where it has them; the others are traced one after the other (Python) and
    compiled side by side (C++). What a name means never changes: a program is compiled once."""

    def __init__(self, store: ProgramStore = NO_STORE) -> None:
        self._store = store
        self._programs: dict[str, Future] = {}
        self._traced: dict[str, jax.stages.Lowered] = {}
        self._compiled = 0
        self._pool = ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1))
        self._begin = time.monotonic()

    def __enter__(self) -> "Compiler":
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def trace(self, programs: Mapping[str, Lowering]) -> None:
        """Traces programs that are started later: until then what is being compiled has the machine to itself."""
        with without_garbage_collection():
            for name, lower in programs.items():
                if name not in self._programs and not self._store.has(name):
                    self._traced[name] = lower()

    def start(self, programs: Mapping[str, Lowering]) -> None:
        """Returns when they are traced, and does not wait for the rest."""
        new = {name: lower for name, lower in programs.items() if name not in self._programs}
        loading = {name: self._pool.submit(self._store.load, name) for name in new if self._store.has(name)}
        with without_garbage_collection():
            for name, lower in new.items():
                if name in loading and loading[name].result():
                    self._programs[name] = loading[name]
                else:
                    lowered = self._traced.pop(name) if name in self._traced else lower()
                    self._programs[name] = self._pool.submit(self._compile, name, lowered)
                    self._compiled += 1

    def get(self, names: Iterable[str]) -> dict[str, Any]:
        """Waits for programs that were started."""
        return {name: self._programs[name].result() for name in names}

    def _compile(self, name: str, lowered: jax.stages.Lowered) -> Any:
        program = lowered.compile()
        self._store.save(name, program)
        return program

    def log(self) -> None:
        seconds = time.monotonic() - self._begin
        logger.info("%d programs in %.1f s, %d of them compiled", len(self._programs), seconds, self._compiled)
