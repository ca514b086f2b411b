"""Compilation in other processes: tracing holds Python's lock, compiling one of LLVM's, and each process has its own.

A process is sent the model and told which of its programs are wanted. It leaves them in the program store, from
where the engine's own process loads them, as a warm start does. Those that it cannot make are compiled by the engine.
"""

import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from kernels_pallas import lowering
from models import make_mesh, param_shapes
from paged.compiler import Compiler
from paged.program_store import ProgramStore
from paged.runner import Runner
from paged.runner_shape import RunnerShape

logger = logging.getLogger(__name__)


class Recipe(NamedTuple):
    """What a process makes programs from, besides shapes; it runs on the first device alone."""

    jax_options: dict[str, Any]
    model: Any  # without its mesh, which cannot be sent
    directory: Path  # of the program store


def with_mesh(model: Any, mesh: Mesh | None) -> Any:
    return model.clone(compute=replace(model.compute, mesh=mesh))


class CompileProcess:
    """One such process, begun when it is first needed."""

    def __init__(self, model: Any, store: ProgramStore):
        assert store.directory is not None
        self._recipe = Recipe(dict(jax.config.values), with_mesh(model, None), store.directory)
        self._store = store
        self._process: Any = None  # a subprocess.Popen, once begun
        self._reader = Thread(target=self._read, daemon=True)
        self._awaited: dict[str, Future] = {}

    def compile(self, shape: RunnerShape, names: Iterable[str]) -> dict[str, Future]:
        """By name a program of Runner(model, ..., shape) as it will be, or None where the process cannot make it."""
        futures: dict[str, Future] = {name: Future() for name in names}
        if futures:
            self._awaited |= futures
            try:
                if self._process is None:
                    self._begin()
                self._send((shape, list(futures)))
            except OSError:  # there is no process, or no longer
                self._give_up(futures)
        return futures

    def close(self) -> None:
        self._awaited.clear()
        if self._process is not None:
            self._process.kill()
            self._reader.join()
            self._process.stdout.close()
            with suppress(OSError):  # what it did not read
                self._process.stdin.close()

    def _begin(self) -> None:
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)),
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # the device's memory is the engine's
        }
        command = [sys.executable, "-P", "-m", "paged.compile_process"]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment, process_group=0)
        self._reader.start()
        self._send(self._recipe)

    def _send(self, message: Any) -> None:
        pickle.dump(message, self._process.stdin)
        self._process.stdin.flush()

    def _read(self) -> None:
        for line in self._process.stdout:
            name = line.decode().rstrip("\n")
            if future := self._awaited.pop(name, None):
                future.set_result(self._store.load(name))
        self._process.wait()
        self._give_up(list(self._awaited))

    def _give_up(self, names: Iterable[str]) -> None:
        futures = [future for name in names if (future := self._awaited.pop(name, None))]
        for future in futures:
            future.set_result(None)
        if futures:
            logger.warning("a process that should compile %d programs cannot: they are compiled here", len(futures))


@contextmanager
def compile_processes(count: int, model: Any, store: ProgramStore) -> Iterator[Sequence[CompileProcess]]:
    with ExitStack() as stack:
        processes = [CompileProcess(model, store) for _ in range(count)]
        for process in processes:
            stack.callback(process.close)
        yield processes


def main() -> None:
    """What a process does: reads a Recipe, then shapes and names, and answers with each name once it has tried it."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed
    recipe: Recipe = pickle.load(sys.stdin.buffer)
    for option, value in recipe.jax_options.items():
        if jax.config.values[option] != value:
            jax.config.update(option, value)
    model = with_mesh(recipe.model, make_mesh(1))
    params = param_shapes(model)
    store = ProgramStore(recipe.directory, (jax.devices()[0],))
    with lowering(model.compute.attention_backend), Compiler(store) as compiler:
        for shape, names in _messages():
            lowerings = Runner(model, params, shape).lowerings()
            for name in names:
                answer = partial(print, name, file=answers, flush=True)
                try:
                    compiler.start({name: lowerings[name]}, shape)
                    compiler.when_tried(name, answer)
                except Exception:  # the engine will find out itself, and say so
                    answer()


def _messages() -> Iterator[tuple[RunnerShape, list[str]]]:
    """Behind the last the engine is gone, and so is this process, whatever it does."""
    messages: SimpleQueue = SimpleQueue()

    def receive() -> None:
        with suppress(EOFError):
            while True:
                messages.put(pickle.load(sys.stdin.buffer))
        os._exit(0)

    Thread(target=receive, daemon=True).start()
    while True:
        yield messages.get()


if __name__ == "__main__":
    main()
