"""Reads a directory's safetensors, one file or several with an index, one tensor at a time."""

import json
import math
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from models.raw_arrays import read_array

INDEX = "model.safetensors.index.json"
_DTYPES = {"F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
           "BF16": np.dtype(ml_dtypes.bfloat16), "U8": np.dtype(np.uint8)}  # fmt: skip


class SafetensorsSource:
    """The tensors of a directory's *.safetensors. Files are opened, and so memory-mapped, when first read from.

    Raises:
      ValueError: there is no safetensors file, the index names one that is not there, or one is damaged.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self._files: dict[str, Any] = {}
        self._headers: dict[Path, tuple[int, dict[str, Any]]] = {}
        self._file_of = self._from_index() if (directory / INDEX).exists() else self._from_files()

    @property
    def names(self) -> list[str]:
        return list(self._file_of)

    def read(self, name: str, out: np.ndarray | None = None) -> np.ndarray:
        """The tensor; in `out`, if that fits."""
        path, offset, dtype, shape = self._find(name)
        return _read(name, path, offset, dtype, shape, out)

    def read_row(self, name: str, index: int, of: int, out: np.ndarray | None = None) -> np.ndarray:
        """tensor[index], without reading the others. Raises ValueError if the tensor has not `of` rows."""
        path, offset, dtype, shape = self._find(name)
        if not shape or shape[0] != of:
            raise ValueError(f"tensor {name} has shape {list(shape)}, but the model needs {of} rows")
        size = math.prod(shape[1:]) * dtype.itemsize
        return _read(name, path, offset + index * size, dtype, shape[1:], out)

    def _find(self, name: str) -> tuple[Path, int, np.dtype, tuple[int, ...]]:
        """The tensor's file, where in it the tensor begins, its dtype and shape."""
        path = self.directory / self._file_of[name]
        try:
            self._open(self._file_of[name]).get_slice(name)  # the library checks the file
        except (SafetensorError, OSError) as error:
            raise ValueError(f"cannot read tensor {name} of {path}: {error}") from error
        if path not in self._headers:
            self._headers[path] = _header(path)
        start, header = self._headers[path]
        info = header[name]
        if info["dtype"] not in _DTYPES:
            supported = ", ".join(_DTYPES)
            raise ValueError(f"tensor {name} is stored as {info['dtype']}, which is not supported; {supported} are")
        return path, start + info["data_offsets"][0], _DTYPES[info["dtype"]], tuple(info["shape"])

    def _from_index(self) -> dict[str, str]:
        weight_map: dict[str, str] = json.loads((self.directory / INDEX).read_text())["weight_map"]
        for tensor, file in weight_map.items():
            if not (self.directory / file).exists():
                raise ValueError(
                    f"{self.directory / file}, which has tensor {tensor}, is missing: download the model again"
                )
        return weight_map

    def _from_files(self) -> dict[str, str]:
        files = sorted(self.directory.glob("*.safetensors"))
        preferred = [f for f in files if f.name == "model.safetensors"] or files
        if not preferred:
            pickles = sorted(file.name for kind in ("*.bin", "*.pt", "*.pth") for file in self.directory.glob(kind))
            instead = f", only {pickles[0]}: pickles can run code and are not read" if pickles else " file"
            raise ValueError(f"{self.directory} has no *.safetensors{instead}")
        if len(preferred) > 1:
            raise ValueError(
                f"{self.directory} has {len(files)} safetensors files but no {INDEX} that says what is where"
            )
        return dict.fromkeys(self._open(preferred[0].name).keys(), preferred[0].name)

    def _open(self, file: str) -> Any:
        if file not in self._files:
            try:
                self._files[file] = safe_open(self.directory / file, framework="numpy")
            except SafetensorError as error:
                raise ValueError(
                    f"{self.directory / file} is damaged{_first_cut_tensor(self.directory / file)}: {error}"
                ) from error
        return self._files[file]


def _read(
    name: str, path: Path, offset: int, dtype: np.dtype, shape: tuple[int, ...], out: np.ndarray | None
) -> np.ndarray:
    try:
        return read_array(path, offset, shape, dtype, out)
    except (EOFError, OSError) as error:
        raise ValueError(f"cannot read tensor {name}: {error}") from error


def _header(path: Path) -> tuple[int, dict[str, Any]]:
    """Where the tensors' bytes begin, and what the file says of each."""
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        return 8 + size, json.loads(file.read(size))


def _first_cut_tensor(path: Path) -> str:
    """Which tensor a truncated file breaks off in, as far as its header can tell."""
    try:
        start, header = _header(path)
    except (struct.error, ValueError, MemoryError, OverflowError):
        return " (no readable header)"
    ends = {name: info["data_offsets"][1] for name, info in header.items() if name != "__metadata__"}
    size = path.stat().st_size
    cut = [name for name, end in sorted(ends.items(), key=lambda item: item[1]) if start + end > size]
    return f": it breaks off in tensor {cut[0]}, download it again" if cut else ""
