"""Checkpoints in this engine's own form: parameters as the model holds them, written by Orbax, and all else it takes to
serve them. Nothing is renamed, joined or dequantized on load.

A directory has a manifest, written last (format version, configuration, and the size of each file of weights),
`params/`, which is Orbax's, and generation_config.json and a tokenizer as on the Hugging Face hub. In `params/` each
parameter is a zarr array (version 2) of one chunk that nothing compresses, so a file of the array's bytes and no more:
Orbax restores it, and a start reads it without Orbax, as fast as the disk gives it.
"""

import dataclasses
import json
import math
import os
import shutil
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

import ml_dtypes
import numpy as np

from models.config import ModelConfig
from models.raw_arrays import read_array
from models.registry import Params

MANIFEST = "paged_checkpoint.json"
VERSION = 3  # of the directory's layout, the configuration and the trees of parameters; one more with each change
_ORBAX_MARK = "_CHECKPOINT_METADATA"
_DTYPES = {"<f4": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
_PLAIN = {"zarr_format": 2, "order": "C", "compressor": None, "filters": None, "dimension_separator": "."}


class _Array(NamedTuple):
    file: Path
    shape: tuple[int, ...]
    dtype: np.dtype


class OrbaxSource:
    """The parameters in a directory that `write_checkpoint` made, by their paths in the model, joined with dots.

    Raises:
      ValueError: the directory is another program's, of another version, or not whole.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        if not (directory / MANIFEST).is_file():
            raise ValueError(f"{directory} was not written by scripts.convert, or not to its end: it has no {MANIFEST}")
        try:
            manifest = json.loads((directory / MANIFEST).read_text())
            version, files, config = manifest["version"], dict(manifest["files"]), dict(manifest["config"])
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{directory / MANIFEST} is damaged: convert the model again") from error
        if version != VERSION:
            raise ValueError(
                f"{directory} has format version {version}, and this engine reads {VERSION}: convert the model again"
            )
        _check_sizes(directory, files)
        try:
            self.config: ModelConfig = _from_json(ModelConfig, config)
        except (TypeError, KeyError) as error:
            raise ValueError(f"{directory} has a configuration of another version ({error}): convert again") from error
        self._arrays = _arrays(directory / "params")

    @property
    def names(self) -> list[str]:
        return list(self._arrays)

    def read(self, name: str, out: np.ndarray | None = None) -> np.ndarray:
        """The parameter; in `out`, if that fits. Raises ValueError if it cannot be read."""
        array = self._arrays[name]
        try:
            return read_array(array.file, 0, array.shape, array.dtype, out)
        except (EOFError, OSError) as error:
            raise ValueError(f"cannot read parameter {name}: {error}") from error


def is_orbax(directory: Path) -> bool:
    """Whether it is ours, or at least Orbax's, in which case OrbaxSource says what is wrong with it."""
    marks = (MANIFEST, _ORBAX_MARK, f"*/{_ORBAX_MARK}")
    return any(any(directory.glob(mark)) for mark in marks)


def write_checkpoint(
    target: Path,
    config: ModelConfig,
    params: Params,
    *,
    generation_config: Mapping[str, Any],
    tokenizer: Any = None,
) -> None:
    """Writes a directory that OrbaxSource reads. It has another name until it is whole.

    Raises:
      FileExistsError: there is something at `target`.
    """
    ocp = _orbax()
    if target.exists():
        raise FileExistsError(f"{target} exists: name a directory that does not")
    partial = target.absolute().with_name(f".{target.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False)) as checkpointer:
            checkpointer.save(partial / "params", ocp.args.PyTreeSave(params))
        _arrays(partial / "params")  # what Orbax wrote can be read
        if generation_config:
            (partial / "generation_config.json").write_text(json.dumps(generation_config, indent=2) + "\n")
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        manifest = {
            "version": VERSION,
            "config": dataclasses.asdict(config),
            "files": _sizes(partial),
        }
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _sizes(directory: Path) -> dict[str, int]:
    files = (path for path in sorted((directory / "params").rglob("*")) if path.is_file())
    return {str(path.relative_to(directory)): path.stat().st_size for path in files}


def _check_sizes(directory: Path, expected: Mapping[str, int]) -> None:
    found = _sizes(directory)
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            wrong = "is missing"
        elif name not in expected:
            wrong = "does not belong to it"
        elif found[name] != expected[name]:
            wrong = f"has {found[name]:,} bytes instead of {expected[name]:,}"
        else:
            continue
        raise ValueError(f"{directory} is not as it was written: {name} {wrong}; copy or convert it again")


def _arrays(params: Path) -> dict[str, _Array]:
    """The arrays of a tree {"params": ...} that Orbax wrote without OCDBT, by name without the "params.".

    Raises:
      ValueError: one is not a single chunk as it is in memory.
    """
    return {path.parent.name.removeprefix("params."): _array(path) for path in sorted(params.glob("*/.zarray"))}


def _array(path: Path) -> _Array:
    """Of a `.zarray` file, which describes the zarr array in its directory."""
    try:
        meta = json.loads(path.read_text())
        shape, chunks, dtype = tuple(meta["shape"]), tuple(meta["chunks"]), meta["dtype"]
        plain = {key: meta[key] for key in _PLAIN}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is damaged: convert the model again") from error
    if plain != _PLAIN or not shape or chunks != shape or dtype not in _DTYPES:
        raise ValueError(f"{path.parent} is not a single chunk of plain float32 or bfloat16: convert the model again")
    array = _Array(path.with_name(".".join("0" for _ in shape)), shape, _DTYPES[dtype])
    size = math.prod(shape) * array.dtype.itemsize
    if not array.file.is_file() or array.file.stat().st_size != size:
        raise ValueError(f"{array.file} should have {size:,} bytes: convert the model again")
    return array


def _from_json(kind: Any, value: Any) -> Any:
    """What dataclasses.asdict and json made of a value of type `kind`: tuples were lists, dataclasses dicts."""
    if value is None:
        return None
    if get_origin(kind) is types.UnionType:
        [kind] = [k for k in get_args(kind) if k is not types.NoneType]
    if dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind)
        return kind(**{name: _from_json(hints[name], item) for name, item in value.items()})  # type: ignore[operator]
    if get_origin(kind) is tuple:
        return tuple(_from_json(get_args(kind)[0], item) for item in value)
    return value


def _orbax() -> Any:
    try:
        import orbax.checkpoint
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "writing an Orbax checkpoint needs orbax: pip install orbax-checkpoint", name="orbax"
        ) from None
    return orbax.checkpoint
