"""One step program, compiled for chips that are not there, and what the compiler says about it."""

import json
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax

from paged.packing import StepShape
from paged.runner import Runner
from paged.sampler import Variant

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
      bytes, flops: of a run by XLA's cost analysis, attention kernels left out: they depend on the lengths. Where the
        sampler has two branches, the costlier is in it.
    """

    shape: StepShape
    variant: Variant
    lower_seconds: float
    compile_seconds: float
    temporary: int
    vmem: int
    bytes: float
    flops: float
    text: str

    @classmethod
    def compile(cls, runner: Runner, shape: StepShape, variant: Variant) -> "Program":
        """Raises jax.errors.JaxRuntimeError, with the compiler's words, if it does not compile."""
        begin = time.perf_counter()
        with jax.sharding.use_abstract_mesh(runner.model.compute.mesh.abstract_mesh):  # says which TPU it is for
            lowered = runner.lower_step(shape, variant)
        middle = time.perf_counter()
        compiled = lowered.compile()
        end = time.perf_counter()
        text: str = compiled.as_text() or ""
        cost: Any = compiled.cost_analysis()
        memory: Any = compiled.memory_analysis()
        declared = attention_costs(text)
        return cls(
            shape,
            variant,
            middle - begin,
            end - middle,
            temporary=memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes,
            vmem=max(map(int, VMEM_IN_USE.findall(text)), default=0),
            bytes=cost["bytes accessed"] - sum(c["bytes_accessed"] for c in declared),
            flops=cost["flops"] - sum(c["flops"] for c in declared),
            text=text,
        )


def attention_costs(text: str) -> list[dict[str, int]]:
    """What each attention kernel in a compiled module declares, over full block tables."""
    costs = []
    for line in text.splitlines():
        if re.match(r"\s*(ROOT )?%attend\w*[.\d]* = ", line) and (
            found := re.search(r'"cost_estimate":({[^}]*})', line)
        ):
            costs.append({name: int(value) for name, value in json.loads(found[1]).items()})
    return costs


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
