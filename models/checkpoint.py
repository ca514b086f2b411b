"""Opens a model by name: what it is (configuration, tokenizer, generation defaults) at once, its weights when asked."""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import numpy as np

from models.config import ModelConfig
from models.config_fields import token_ids
from models.default_model import DEFAULT_MODEL, default_model_path
from models.gguf_reader import GGUFSource
from models.hub import download
from models.layers import Dtype
from models.orbax_checkpoint import OrbaxSource, is_orbax
from models.params import checked_parts, load_params, random_params
from models.parts import TensorSource
from models.registry import HEAD, Params, canonical_source, embedding_name
from models.safetensors_reader import SafetensorsSource
from models.tokenizer import FastTokenizer, load_tokenizer, tokenizer_from_gguf

logger = logging.getLogger(__name__)

LoadFormat = Literal["auto", "safetensors", "gguf", "orbax", "dummy"]


@dataclass(frozen=True)
class Checkpoint:
    """A model that was found.

    Attributes:
      config: what to build; its eos_token_ids include those of generation_config.json.
      generation_config: generation_config.json as it is (temperature, top_p, ...); {} where there is none.
      source: the weights; None makes them random.
    """

    config: ModelConfig
    generation_config: dict[str, Any]
    source: TensorSource | None
    _load_tokenizer: Callable[[], FastTokenizer] | None

    @cached_property
    def tokenizer(self) -> FastTokenizer | None:
        """The fast tokenizer with its chat template, read on first use; None if it was skipped or there is none."""
        return self._load_tokenizer() if self._load_tokenizer else None

    def check(self, model: nn.Module) -> None:
        """Raises ValueError if the checkpoint has not the tensors of `model`, by their names. Reads none."""
        if self.source is not None:
            checked_parts(model, self.source)

    def load_params(self, model: nn.Module, dtype: Dtype, *, seed: int = 0, progress: bool = True) -> Params:
        """The parameters of `model` (of `build_model(self.config, ...)`) on the default device.

        Raises:
          ValueError: the weights do not fit the configuration; names the tensor.
        """
        if self.source is None:
            return random_params(model, dtype, seed)
        return load_params(model, self.source, dtype, progress=progress)


def open_checkpoint(
    model: str,
    *,
    tokenizer: str | None = None,
    revision: str | None = None,
    load_format: LoadFormat = "auto",
    skip_tokenizer: bool = False,
) -> Checkpoint:
    """Finds `model`: the default model's name, a .gguf file, a directory (Hugging Face's, or of scripts.convert), or a
    hub id.

    Args:
      tokenizer: directory or hub id of another tokenizer than the model's own.
      revision: branch, tag or commit of a hub id.
      load_format: "dummy" makes random weights and needs no file but config.json; "auto" takes what is there.
      skip_tokenizer: leave `tokenizer` None.

    Raises:
      ValueError: there is no such model, it is not supported, or parts of it are missing.
      RuntimeError: the default model could not be fetched.
    """
    path = _locate(model, revision, load_format)
    opened = _open_gguf(path, load_format) if path.is_file() else _open_directory(path, load_format)
    if skip_tokenizer:
        return replace(opened, _load_tokenizer=None)
    if tokenizer is not None:
        return replace(opened, _load_tokenizer=lambda: load_tokenizer(_locate_tokenizer(tokenizer)))
    if opened._load_tokenizer is None and load_format != "dummy":
        raise ValueError(f"{path} has no tokenizer: name one with tokenizer=<hub id or directory>, or skip it")
    return opened


def _locate(model: str, revision: str | None, load_format: LoadFormat) -> Path:
    if model == DEFAULT_MODEL:
        return default_model_path()
    path = Path(model).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"model {model} is a file but not a .gguf: name the directory that has its config.json")
        return path
    if path.is_dir():
        return path
    if path.suffix == ".gguf" or model.startswith((".", "/", "~")):
        raise ValueError(f"model {model} does not exist")
    return download(model, revision=revision, weights=load_format != "dummy")


def _locate_tokenizer(tokenizer: str) -> Path:
    path = Path(tokenizer).expanduser()
    return path if path.is_dir() else download(tokenizer, weights=False)


def _open_gguf(path: Path, load_format: LoadFormat) -> Checkpoint:
    if load_format in ("safetensors", "orbax"):
        raise ValueError(f"{path} is a GGUF file, but load_format is {load_format!r}")
    source = GGUFSource(path)
    weights = None if load_format == "dummy" else source
    return Checkpoint(source.config, {}, weights, lambda: tokenizer_from_gguf(source.header))


def _open_directory(path: Path, load_format: LoadFormat) -> Checkpoint:
    if load_format == "orbax" or (load_format in ("auto", "dummy") and is_orbax(path)):
        source = OrbaxSource(path)
        weights = None if load_format == "dummy" else source
        return Checkpoint(source.config, _generation_config(path), weights, _tokenizer_of(path))
    ggufs = sorted(path.glob("*.gguf"))
    if load_format == "gguf" or (ggufs and not (path / "config.json").exists()):
        if len(ggufs) != 1:
            raise ValueError(f"{path} has {len(ggufs)} .gguf files: name one of them")
        return _open_gguf(ggufs[0], load_format)
    config = ModelConfig.from_hf(_read_json(path / "config.json"))
    stored = None if load_format == "dummy" else SafetensorsSource(path)
    if stored is not None and config.tie_word_embeddings and _has_a_head(stored, config):
        logger.warning("%s ties its head to its embedding in config.json, but has another one, which is used", path)
        config = replace(config, tie_word_embeddings=False)
    generation_config = _generation_config(path)
    eos = (*config.eos_token_ids, *token_ids(generation_config.get("eos_token_id")))
    return Checkpoint(
        replace(config, eos_token_ids=tuple(dict.fromkeys(eos))),
        generation_config,
        stored,
        _tokenizer_of(path),
    )


def _has_a_head(source: TensorSource, config: ModelConfig) -> bool:
    """Of its own: a tensor with other numbers than the embedding's. transformers 5 does not tie that either."""
    named, embedding = canonical_source(source, config), embedding_name(config)
    both_stored = HEAD in named.names and embedding in named.names
    return both_stored and not np.array_equal(named.read(HEAD), named.read(embedding))


def _generation_config(path: Path) -> dict[str, Any]:
    file = path / "generation_config.json"
    return _read_json(file) if file.exists() else {}


def _tokenizer_of(path: Path) -> Callable[[], FastTokenizer] | None:
    has_tokenizer = any((path / name).exists() for name in ("tokenizer.json", "tokenizer_config.json"))
    return (lambda: load_tokenizer(path)) if has_tokenizer else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path.parent} is not a model: it has no {path.name}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
