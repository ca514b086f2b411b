"""How a family says what its parameters are made of: its `tensor_parts(config)` gives {Path: (Part, ...)}."""

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

    def read(self, name: str, out: np.ndarray | None = None) -> np.ndarray:
        """The tensor, in whatever float dtype it is stored. A source that can reads it into `out`, and returns that, if
        it has the tensor's shape and dtype. Raises ValueError, naming it, if it cannot be read."""
        ...
