"""How often ptxas is asked for its version."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from jax.experimental.mosaic.gpu import fragmented_array

QUESTION = "_get_ptxas_isa_version"


@contextmanager
def asked_once() -> Iterator[None]:
    """Within, once. jax 0.11.2 starts a process for it each time that a kernel makes a number of a boolean, which every
    condition does: 20 ms each, two dozen times a step's program."""
    extension = getattr(fragmented_array.mgpu_lib, "_mosaic_gpu_ext", None)
    ask = getattr(extension, QUESTION, None)
    if ask is None:  # another jax
        yield
        return
    setattr(extension, QUESTION, cache(ask))
    try:
        yield
    finally:
        setattr(extension, QUESTION, ask)
