"""Reads GGUF files: the header, and tensors under their Hugging Face names, dequantized one at a time."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from models.config import ModelConfig, RopeScaling

_TOP_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA_LAYER_NAMES = _LAYER_NAMES | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_ROPE_FACTORS = "rope_freqs.weight"


class GGUFSource:
    """One GGUF file, memory-mapped.

    Raises:
      ModuleNotFoundError: the gguf package is not installed.
      ValueError: the file is not a whole GGUF file, or holds a model that is not supported.
    """

    def __init__(self, path: Path):
        try:
            import gguf
        except ModuleNotFoundError:
            raise ModuleNotFoundError(
                "reading a .gguf file needs the gguf package: pip install gguf (or 'paged[gguf]')", name="gguf"
            ) from None
        try:
            self._reader = _reader(gguf, path)
        except (ValueError, IndexError, KeyError) as error:
            raise ValueError(f"{path} is not a whole GGUF file, download it again: {error}") from error
        self.path = path
        self._is_gemma = self.header.get("general.architecture") == "gemma3"
        layer_names = _GEMMA_LAYER_NAMES if self._is_gemma else _LAYER_NAMES
        self._tensors = {_hf_name(t.name, layer_names): t for t in self._reader.tensors if t.name != _ROPE_FACTORS}

    @cached_property
    def header(self) -> Mapping[str, Any]:
        """Key -> value; arrays are lists."""
        return {key: field.contents() for key, field in self._reader.fields.items()}

    @cached_property
    def config(self) -> ModelConfig:
        config = ModelConfig.from_gguf(self.header, [t.name for t in self._reader.tensors])
        for tensor in self._reader.tensors:
            if tensor.name == _ROPE_FACTORS:
                factors = tuple(float(f) for f in tensor.data)
                config = replace(config, rope_scaling=RopeScaling(kind="factors", factors=factors))
        return config

    @property
    def names(self) -> list[str]:
        return list(self._tensors)

    def read(self, name: str, out: np.ndarray | None = None) -> np.ndarray:
        """float32, as Hugging Face has it: the rows of Llama's queries and keys are put back from interleaved pairs to
        halves, and the 1 that Gemma's norms add to their weights is taken out of them."""
        import gguf

        tensor = self._tensors[name]
        try:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            raise ValueError(f"tensor {name} is stored as {tensor.tensor_type.name}, which is not supported") from None
        values = values.reshape(tuple(int(n) for n in reversed(tensor.shape)))
        if self.header["general.architecture"] == "llama" and ".q_proj." in name:
            return _halves(values, self.config.num_heads)
        if self.header["general.architecture"] == "llama" and ".k_proj." in name:
            return _halves(values, self.config.num_kv_heads)
        if self._is_gemma and name.endswith("norm.weight"):
            return values - 1
        return values


def _reader(gguf: ModuleType, path: Path) -> Any:
    """A GGUFReader that takes its hundreds of thousands of small slices of a plain array over the mapped file: those
    of numpy's memmap class make opening a file three times as slow."""

    class Reader(gguf.GGUFReader):  # type: ignore[name-defined]
        @property
        def data(self) -> np.ndarray:
            return self._plain

        @data.setter
        def data(self, mapped: np.memmap) -> None:
            self._plain = mapped.view(np.ndarray)

    return Reader(path)


def _hf_name(name: str, layer_names: Mapping[str, str]) -> str:
    """ "blk.3.attn_q.weight" -> "model.layers.3.self_attn.q_proj.weight"; what is unknown stays as it is."""
    stem, _, kind = name.rpartition(".")
    if stem in _TOP_NAMES:
        return f"{_TOP_NAMES[stem]}.{kind}"
    match stem.split("."):
        case ["blk", layer, part] if part in layer_names:
            return f"model.layers.{layer}.{layer_names[part]}.{kind}"
    return name


def _halves(values: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of each head from (0, D/2, 1, D/2 + 1, ...) order to 0..D-1."""
    rows = values.shape[0] // num_heads
    pairs = values.reshape(num_heads, rows // 2, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)
