"""Checkpoints in this engine's own form: parameters as the model holds them, written by Orbax, and all else it takes to
serve them. Nothing is renamed, fused or dequantized on load, and each device reads its own part of a sharded parameter.

A directory has a manifest, written last (format version, configuration, and the size of each file of weights),
`params/`, which is Orbax's, and generation_config.json and a tokenizer as on the Hugging Face hub.
"""

import dataclasses
import json
import os
import shutil
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import flax.linen as nn
import jax
import jax.numpy as jnp

from models.config import ModelConfig
from models.layers import Dtype
from models.registry import Params, from_stored, stored_shapes

MANIFEST = "paged_checkpoint.json"
VERSION = 1  # of the directory's layout and of the trees of parameters; one more with each change to either
_ORBAX_MARK = "_CHECKPOINT_METADATA"


class OrbaxSource:
    """The parameters in a directory that `write_checkpoint` made.

    Raises:
      ModuleNotFoundError: Orbax is not installed.
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
        _orbax()

    def load_params(self, model: nn.Module, dtype: Dtype, shardings: Any = None) -> Params:
        """The parameters of `model` in `dtype`: on its mesh or the default device, or as the pytree `shardings` says.

        Raises:
          ValueError: they are damaged, or not those of the model.
        """
        ocp = _orbax()
        if shardings is None:
            here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
            shardings = jax.tree.map(lambda s: s.sharding or here, stored_shapes(model))
        wanted = jax.tree.map(
            lambda s, sharding: jax.ShapeDtypeStruct(s.shape, jnp.promote_types(dtype, s.dtype), sharding=sharding),
            stored_shapes(model),
            shardings,
        )
        restore = ocp.args.PyTreeRestore(wanted, ocp.checkpoint_utils.construct_restore_args(wanted))
        try:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
                params = checkpointer.restore((self.directory / "params").absolute(), restore)
        except (ValueError, KeyError, OSError, RuntimeError) as error:
            raise ValueError(f"the weights in {self.directory} cannot be read: convert again ({error})") from error
        return jax.block_until_ready(from_stored(params, model))


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
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_compression=False)) as checkpointer:
            checkpointer.save(partial / "params", ocp.args.PyTreeSave(params))
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
    for name, size in expected.items():
        if found.get(name) != size:
            state = f"has {found[name]:,} bytes instead of {size:,}" if name in found else "is missing"
            raise ValueError(f"{directory} is not whole: {name} {state}; copy or convert it again")


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
            "reading or writing an Orbax checkpoint needs orbax: pip install orbax-checkpoint", name="orbax"
        ) from None
    return orbax.checkpoint
