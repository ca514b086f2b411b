"""Arrays out of files by plain reads into memory of their own.

A file that is mapped takes a page fault every few kilobytes, which is slower than a disk of today.
"""

import math
from pathlib import Path

import numpy as np

_READ = 64 << 20  # bytes in one read


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """np.empty at a multiple of 64 bytes: such an array becomes a CPU device's as it is, without a copy."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


def read_array(
    path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype, out: np.ndarray | None = None
) -> np.ndarray:
    """The array that stands in C order from byte `offset` on; in `out`, if that is one of its shape and dtype.

    Raises:
      EOFError: the file is too short.
    """
    fits = out is not None and out.shape == shape and out.dtype == dtype and out.flags.c_contiguous
    array = out if fits and out is not None else aligned_empty(shape, dtype)
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        rest = memoryview(array.reshape(-1).view(np.uint8))
        while rest:
            count = file.readinto(rest[:_READ])
            if not count:
                raise EOFError(f"{path} ends {len(rest):,} bytes too early")
            rest = rest[count:]
    return array
