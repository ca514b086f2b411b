"""Bytes that a compiled TPU module moves to and from a chip's memory (HBM), read from the module's text.

XLA's own count is of all memories alike: a weight that is brought to vector memory ahead of its product is in it three
times (read, written, read again), and so is an activation that never leaves the chip; and it takes the costlier branch
of each conditional. Here an array counts where its layout says that it lies in HBM, without the padding of tiles, and
of two branches the cheaper counts, which is the one that runs when no request asks for the other.
"""

import math
import re
from functools import cached_property
from typing import NamedTuple

_INSTRUCTION = re.compile(r"\s*(ROOT )?%([\w.-]+) = (.*?) ([a-z][a-z0-9-]*)\((.*)")
_ARRAY = re.compile(r"(?:pred|[a-z]+(\d+)\w*)\[([\d,]*)\](\{[^}]*\})?")  # bf16[64,128]{1,0:T(8,128)(2,1)S(1)}
_ELSEWHERE = re.compile(r"S\([1-9]")  # S(1) is vector memory; without S an array lies in HBM
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier"}
_READ_IN_PART = {"gather", "dynamic-slice", "slice"}  # of their first operand, as much as they return
_IN_PLACE = {"dynamic-update-slice": 1, "scatter": 2}  # write this operand into the first


class Array(NamedTuple):
    size: int  # bytes
    in_hbm: bool


class Instruction(NamedTuple):
    arrays: tuple[Array, ...]  # of the result
    operation: str
    operands: list[str]
    attributes: str

    @property
    def size(self) -> int:
        return sum(array.size for array in self.arrays)

    @property
    def in_hbm(self) -> int:
        """Bytes of the result that are there."""
        return sum(array.size for array in self.arrays if array.in_hbm)

    def called(self, attribute: str) -> list[str]:
        found = re.search(attribute + r"=\{?((?:%[\w.-]+(?:, )?)+)", self.attributes)
        return re.findall(r"%([\w.-]+)", found[1]) if found else []


class Module:
    """A compiled module's computations: instructions by name, and which of them are results."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.results: dict[str, Instruction] = {}
        self.entry, computation, current = "", "", {}
        for line in text.splitlines():
            if line.startswith(("%", "ENTRY")):
                name = line.removeprefix("ENTRY ").split(" ")[0].removeprefix("%")
                current = self.computations[name] = {}
                self.entry = name if line.startswith("ENTRY") else self.entry
                computation = name
            elif found := _INSTRUCTION.match(line):
                is_result, name, kind, operation, rest = found.groups()
                operands, _, attributes = rest.partition(")")
                arrays = tuple(
                    Array(int(bits or 8) * math.prod(map(int, filter(None, sizes.split(",")))) // 8, not elsewhere)
                    for bits, sizes, layout in _ARRAY.findall(kind)
                    for elsewhere in [_ELSEWHERE.search(layout)]
                )
                names = [operands] if operation == "parameter" else re.findall(r"%([\w.-]+)", operands)
                current[name] = Instruction(arrays, operation, names, attributes)
                if is_result:
                    self.results[computation] = current[name]

    @cached_property
    def hbm_bytes(self) -> int:
        """Of a run, attention kernels left out; other kernels as they declare. A loop counts once."""
        return self._of_computation(self.entry)

    def _of_computation(self, name: str) -> int:
        computation = self.computations[name]
        return sum(self._of(i, computation) for name, i in computation.items() if not name.startswith("attend"))

    def _of(self, i: Instruction, computation: dict[str, Instruction]) -> int:
        operation = i.operation
        if operation in _FREE or operation.endswith(("-done", "-update")):
            return 0
        if "cross_program_prefetch_index" in i.attributes:  # the end of the run before has done it
            return 0
        if operation in ("copy-start", "slice-start"):  # the first two arrays: from and to, in either order
            return min(array.size for array in i.arrays[:2]) * sum(array.in_hbm for array in i.arrays[:2])
        if operation == "conditional":
            return min(map(self._of_computation, i.called("branch_computations")))
        if operation in ("while", "call", "call-start"):
            return sum(map(self._of_computation, i.called("body" if operation == "while" else "to_apply")))
        if operation == "custom-call":
            declared = re.search(r'"bytes_accessed":"(\d+)"', i.attributes)
            return int(declared[1]) if declared else 0
        operands = [computation[name] for name in i.operands]
        read = sum(self._read(i, n, operand) for n, operand in enumerate(operands) if operand.in_hbm)
        return read + self._written(i, computation)

    def _read(self, i: Instruction, n: int, operand: Instruction) -> int:
        """What `i` reads of its operand n."""
        if i.operation == "fusion":
            [name] = i.called("calls")
            inside = self.computations[name]
            [parameter] = [k for k, p in inside.items() if p.operation == "parameter" and p.operands == [str(n)]]
            return min(operand.in_hbm, self._read_within(inside, parameter, operand))
        if i.operation in _READ_IN_PART and n == 0:
            return min(operand.in_hbm, i.size)
        if i.operation in _IN_PLACE and n == 0:
            return 0
        return operand.in_hbm

    def _read_within(self, inside: dict[str, Instruction], name: str, operand: Instruction) -> int:
        """What the instructions of a fusion read of `name`, an array that the fusion is given."""
        read = 0
        for user_name, user in inside.items():
            for n, used in enumerate(user.operands):
                if used == name:
                    is_same = self._is_bitcast(user)
                    read += self._read_within(inside, user_name, operand) if is_same else self._read(user, n, operand)
        return read

    def _is_bitcast(self, i: Instruction) -> bool:
        """Or a fusion of nothing else."""
        inside = [x.operation for name in i.called("calls") for x in self.computations[name].values()]
        return i.operation == "bitcast" or (bool(inside) and set(inside) <= {"bitcast", "parameter"})

    def _written(self, i: Instruction, computation: dict[str, Instruction]) -> int:
        if i.operation == "fusion":
            [name] = i.called("calls")
            inside = self.computations[name]
            result = self.results[name]
            roots = [inside[name] for name in result.operands] if result.operation == "tuple" else [result]
            return sum(
                self._size_written(root, inside, array.size)
                for root, array in zip(roots, i.arrays, strict=True)
                if array.in_hbm
            )
        return self._size_written(i, computation, i.in_hbm) if i.in_hbm else 0

    def _size_written(self, i: Instruction, computation: dict[str, Instruction], whole: int) -> int:
        while i.operation == "bitcast":
            i = computation[i.operands[0]]
        return computation[i.operands[_IN_PLACE[i.operation]]].size if i.operation in _IN_PLACE else whole
