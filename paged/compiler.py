"""Ahead-of-time compilation: every program before the first request, none after."""

import gc
import logging
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Protocol

import jax

from paged.program_store import NO_STORE, ProgramStore
from paged.runner_shape import RunnerShape

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


class OtherProcess(Protocol):
    """See compile_process."""

    def compile(self, shape: RunnerShape, names: Collection[str]) -> Mapping[str, Future]: ...


class Compiler:
    """Gives programs by name: from the store where it has them; the others are traced one after the other (Python) and
    compiled side by side (C++), some of them by other processes. What a name means never changes: a program is compiled
    once."""

    def __init__(self, store: ProgramStore = NO_STORE, others: Sequence[OtherProcess] = ()) -> None:
        self._store = store
        self._others = others
        self._programs: dict[str, Future] = {}
        self._traced: dict[str, jax.stages.Lowered] = {}
        self._elsewhere: dict[str, Lowering] = {}
        self._compiled = 0
        self._pool = ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1))
        self._begin = time.monotonic()

    def __enter__(self) -> "Compiler":
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def prepare(self, programs: Mapping[str, Lowering], shape: RunnerShape) -> None:
        """For programs that are started later: other processes compile them. Where there are none they are only traced,
        as until then what is being compiled should have the machine to itself."""
        missing = self._missing(programs)
        if self._others:
            self._share(missing, shape, own=0)
        else:
            with without_garbage_collection():
                self._traced |= {name: lower() for name, lower in missing.items()}

    def start(self, programs: Mapping[str, Lowering], shape: RunnerShape) -> None:
        """Compiles the programs of a runner of this shape. Returns when those that are compiled here are traced."""
        self._share(self._missing(programs), shape, own=1)
        self._start_here(programs)

    def _missing(self, programs: Mapping[str, Lowering]) -> dict[str, Lowering]:
        """Those that are neither started, traced nor stored."""
        known = self._programs.keys() | self._traced.keys()
        return {name: lower for name, lower in programs.items() if name not in known and not self._store.has(name)}

    def _share(self, programs: Mapping[str, Lowering], shape: RunnerShape, own: int) -> None:
        """Deals programs out to the other processes, and `own` shares, the first, to nobody."""
        shares = len(self._others) + own
        for i, process in enumerate(self._others, start=own):
            names = list(programs)[i::shares]
            self._programs |= process.compile(shape, names)
            self._elsewhere |= {name: programs[name] for name in names}

    def _start_here(self, programs: Mapping[str, Lowering]) -> None:
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

    def when_tried(self, name: str, call: Callable[[], None]) -> None:
        """Calls, from any thread, when there is a program that was started, or an error."""
        self._programs[name].add_done_callback(lambda program: call())

    def get(self, names: Iterable[str]) -> dict[str, Any]:
        """Waits for programs that were started. Those that should have come from elsewhere and did not are compiled
        here."""
        names = list(names)
        for name in names:
            if name in self._elsewhere and self._programs[name].result() is None:
                del self._programs[name]
        self._start_here({name: self._elsewhere.pop(name) for name in names if name not in self._programs})
        return {name: self._programs[name].result() for name in names}

    def _compile(self, name: str, lowered: jax.stages.Lowered) -> Any:
        program = lowered.compile()
        self._store.save(name, program)
        return program

    def log(self) -> None:
        seconds = time.monotonic() - self._begin
        total, compiled = len(self._programs), self._compiled + len(self._elsewhere)
        logger.info("%d programs in %.1f s, %d of them compiled", total, seconds, compiled)
