"""Reads a directory's safetensors, one file or several with an index, one tensor at a time."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from models.parts import aligned_empty

INDEX = "model.safetensors.index.json"
_DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16),
           "U8": np.dtype(np.uint8)}  # fmt: skip
_READ = 64 << 20  # bytes in one read


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

    def read(self, name: str) -> np.ndarray:
        """The tensor, by plain reads: those of a file mapped into memory take a page fault every few kilobytes."""
        self._get(name, lambda file: file.get_slice(name))  # the library checks the file
        path = self.directory / self._file_of[name]
        if path not in self._headers:
            self._headers[path] = _header(path)
        start, header = self._headers[path]
        dtype, shape = _DTYPES.get(header[name]["dtype"]), tuple(header[name]["shape"])
        if dtype is None:
            return self._get(name, lambda file: file.get_tensor(name))
        tensor = aligned_empty(shape, dtype)
        with path.open("rb", buffering=0) as file:
            file.seek(start + header[name]["data_offsets"][0])
            rest = memoryview(tensor.reshape(-1).view(np.uint8))
            while rest:
                rest = rest[file.readinto(rest[:_READ]) or _ended(path, name) :]
        return tensor

    def read_row(self, name: str, index: int, of: int) -> np.ndarray:
        """tensor[index], without reading the others. Raises ValueError if the tensor has not `of` rows."""

        def row(file: Any) -> np.ndarray:
            tensor = file.get_slice(name)
            if (shape := tensor.get_shape())[0] != of:
                raise ValueError(f"tensor {name} has shape {shape}, but the model needs {of} rows")
            return tensor[index]

        return self._get(name, row)

    def _get(self, name: str, get: Callable[[Any], np.ndarray]) -> np.ndarray:
        try:
            return get(self._open(self._file_of[name]))
        except (SafetensorError, TypeError, OSError) as error:
            raise ValueError(f"cannot read tensor {name} of {self.directory / self._file_of[name]}: {error}") from error

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


def _header(path: Path) -> tuple[int, dict[str, Any]]:
    """Where the tensors' bytes begin, and what the file says of each."""
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        return 8 + size, json.loads(file.read(size))


def _ended(path: Path, name: str) -> int:
    raise ValueError(f"cannot read tensor {name} of {path}: the file ended early")


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
