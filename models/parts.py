"""How a family says what its parameters are made of: its `tensor_parts(config)` gives {Path: (Part, ...)}."""

import math
from collections.abc import Collection
from typing import NamedTuple, Protocol

import numpy as np

Path = tuple[str, ...]  # of a parameter in the module's tree


class Part(NamedTuple):
    """A checkpoint's tensor, and how many rows of a fused parameter it fills; None: it is the whole."""

    name: str
    rows: int | None = None


class TensorSource(Protocol):
    """A checkpoint's tensors by their Hugging Face names, read one at a time."""

    @property
    def names(self) -> Collection[str]: ...

    def read(self, name: str) -> np.ndarray:
        """The tensor, in whatever float dtype it is stored. Raises ValueError, naming it, if it cannot be read."""
        ...


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """np.empty at a multiple of 64 bytes: such an array becomes a CPU device's as it is, without a copy."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)
