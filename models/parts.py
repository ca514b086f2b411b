"""How a family says what its parameters are made of: its `tensor_parts(config)` gives {Path: (Part, ...)}."""

from typing import NamedTuple

Path = tuple[str, ...]  # of a parameter in the module's tree


class Part(NamedTuple):
    """A checkpoint's tensor, and how many rows of a fused parameter it fills; None: it is the whole."""

    name: str
    rows: int | None = None
