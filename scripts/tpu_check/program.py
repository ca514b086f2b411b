"""One program, compiled for chips that are not there, and what the compiler says about it."""

import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax

from scripts.tpu_check.traffic import Module

INSTRUCTION = re.compile(r"%([\w.-]+) = \w+\[([\d,]+)\](\S*) ([a-z][\w-]*)\(")
VMEM_IN_USE = re.compile(r'"memory_space":"1","offset":"0","size":"(\d+)"')
MOVES = ("copy", "transpose", "all-gather", "all-to-all", "collective-permute", "convert")


@dataclass(frozen=True)
class Program:
    """Of one device.

    Attributes:
      lower_seconds, compile_seconds: to trace it in Python; to compile it.
      temporary: bytes beside the arguments and what is donated.
      vmem: bytes of vector memory in use at the fullest point.
      bytes: that a run moves to and from HBM, attention kernels left out: they depend on the lengths.
      flops: of a run by XLA's cost analysis, without attention, with the costlier one of a sampler's two branches.
    """

    lower_seconds: float
    compile_seconds: float
    temporary: int
    vmem: int
    bytes: float
    flops: float
    text: str

    @classmethod
    def compile(cls, lower: Callable[[], jax.stages.Lowered], mesh: jax.sharding.Mesh) -> "Program":
        """Raises jax.errors.JaxRuntimeError, with the compiler's words, if it does not compile."""
        begin = time.perf_counter()
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # says which TPU it is for
            lowered = lower()
        middle = time.perf_counter()
        compiled = lowered.compile()
        end = time.perf_counter()
        text: str = compiled.as_text() or ""
        cost: Any = compiled.cost_analysis()
        memory: Any = compiled.memory_analysis()
        attention = sum(attention_flops(text))
        return cls(
            middle - begin,
            end - middle,
            temporary=memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes,
            vmem=max(map(int, VMEM_IN_USE.findall(text)), default=0),
            bytes=Module(text).hbm_bytes,
            flops=cost["flops"] - attention,
            text=text,
        )


def attention_flops(text: str) -> list[int]:
    """What each attention kernel in a compiled module declares, over full block tables."""
    lines = [line for line in text.splitlines() if re.match(r"\s*(ROOT )?%attend\w*[.\d]* = ", line)]
    return [int(flops) for line in lines for flops in re.findall(r'"cost_estimate":{"flops":"(\d+)"', line)]


def hidden_copies(text: str, tree: Any) -> list[str]:
    """Instructions of a compiled module that copy, rearrange or gather in HBM an array of the shape of one in `tree`
    (weights, caches), whole or one device's part: there should be none."""
    arrays = jax.tree.leaves(tree)
    shapes = {tuple(s) for x in arrays for s in (x.shape, x.sharding.shard_shape(x.shape)) if len(s) > 1}
    known, fused = {_dimensions(shape) for shape in shapes}, set(re.findall(r" fusion\(.*calls=%([\w.-]+)", text))
    copies, computation = [], ""
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY")):
            computation = line.removeprefix("ENTRY ").split(" ")[0].removeprefix("%")
        elif computation not in fused and (found := INSTRUCTION.search(line)):
            name, dimensions, layout, operation = found.groups()
            moves = operation in MOVES or (operation == "fusion" and re.match("copy|transpose", name))
            in_vmem = "S(1)" in layout
            if moves and not in_vmem and _dimensions(map(int, dimensions.split(","))) in known:
                copies.append(f"{operation} to [{dimensions}]")
    return copies


def _dimensions(shape: Iterable[int]) -> tuple[int, ...]:
    """In any order, without those of 1."""
    return tuple(sorted(n for n in shape if n > 1))
