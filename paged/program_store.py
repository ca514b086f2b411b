"""Compiled programs on disk, found again without tracing: a warm start loads them and runs no Python for any.

JAX's own compilation cache is looked up with the lowered program, and tracing and lowering a model takes longer than
loading what comes of it. Here the key is everything that a program is made from: the sources, the versions, the
compilers' flags, JAX's options, the devices and the sizes. Where JAX's is on, it is used instead: on CPUs a program
that came out of it cannot be stored again (jax 0.11.2: it loads, and fails when it is called).
"""

import hashlib
import logging
import os
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable

logger = logging.getLogger(__name__)
COMPILER_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
SOURCES = ("kernels_pallas", "models", "paged")


@dataclass(frozen=True)
class ProgramStore:
    """A folder of programs. What it holds is as trusted as the code itself: loading a program runs it.

    Attributes:
      directory: of one model, in steps of the same sizes, on one kind of machine; None: nothing is kept.
      devices: that the programs run on, in the order of their mesh.
    """

    directory: Path | None
    devices: tuple[jax.Device, ...]

    @classmethod
    def of(cls, cache_dir: str | None, devices: Sequence[jax.Device], *made_from: Any) -> "ProgramStore":
        """The store in `cache_dir` for programs that depend on the representations of `made_from`."""
        if not cache_dir or jax.config.jax_compilation_cache_dir:
            return cls(None, tuple(devices))
        digest = hashlib.sha256(source_digest())
        machine = (jax.__version__, jax.lib.__version__, devices[0].client.platform_version, devices)
        flags = [os.environ.get(name) for name in COMPILER_FLAGS], sorted(jax.config.values.items())
        digest.update(repr((machine, flags, made_from)).encode())
        return cls(Path(cache_dir).expanduser() / digest.hexdigest()[:32], tuple(devices))

    def has(self, name: str) -> bool:
        return self.directory is not None and (self.directory / name).exists()

    def load(self, name: str) -> Any:
        """The program of that name, ready to be called, or None."""
        if self.directory is None or not self.has(name):
            return None
        path = self.directory / name
        try:
            program, inputs, outputs = pickle.loads(path.read_bytes())
            return serialize_executable.deserialize_and_load(program, inputs, outputs, execution_devices=self.devices)
        except Exception as error:  # a damaged file or one of another build: compile again, and write it anew
            logger.warning("cannot use the compiled program %s: %s", path, error)
            return None

    def save(self, name: str, program: Any) -> None:
        if self.directory is None:
            return
        try:
            content = pickle.dumps(serialize_executable.serialize(program))
            self.directory.mkdir(parents=True, exist_ok=True)
            partial = self.directory / f".{name}.{os.getpid()}.{id(program)}"
            partial.write_bytes(content)
            partial.rename(self.directory / name)
        except (OSError, ValueError, NotImplementedError) as error:
            logger.warning("the compiled program %s is not kept: %s", name, error)


NO_STORE = ProgramStore(None, ())


def source_digest() -> bytes:
    """Of everything that is traced into a program."""
    root, digest = Path(__file__).parent.parent, hashlib.sha256()
    for package in SOURCES:
        for path in sorted((root / package).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.digest()
