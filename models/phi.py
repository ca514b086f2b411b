"""Phi-3 (arXiv 2404.14219) and Phi-4: Llama whose checkpoints are fused already, with a rotary embedding of part of
each head and, in the variants for long texts, LongRoPE."""

from collections.abc import Mapping
from typing import Any

from models.config import ModelConfig
from models.config_fields import Fields, decoder_fields, refuse_unless, rope_parameters, same_windows
from models.llama import Llama
from models.llama import tensor_parts as llama_parts
from models.parts import Part, Path

__all__ = ["Llama", "hf_fields", "tensor_parts"]

FUSED = {("attention", "qkv", "kernel"): "self_attn.qkv_proj", ("mlp", "gate_up", "kernel"): "mlp.gate_up_proj"}
ROPE_TYPES = {"default": "default", "longrope": "longrope", "su": "longrope", "yarn": "longrope"}  # old names


def hf_fields(architecture: str, config: Mapping[str, Any]) -> Fields:
    """ModelConfig's fields from config.json. Raises ValueError for what is not supported."""
    refuse_unless(architecture, config, attention_bias=False)
    rope = rope_parameters(config)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ROPE_TYPES:
        raise ValueError(f"rope type {kind!r} is not supported; {architecture} supports: default, longrope")
    fields = decoder_fields({**config, "rope_scaling": {**rope, "rope_type": ROPE_TYPES[kind]}}, partial_rotary=True)
    return fields | {"sliding_windows": same_windows(architecture, config, config["sliding_window"])}


def tensor_parts(config: ModelConfig) -> dict[Path, tuple[Part, ...]]:
    """Llama's, but for what is fused."""
    parts = llama_parts(config)
    for layer in range(config.num_layers):
        for path, name in FUSED.items():
            parts[(f"layers_{layer}", *path)] = (Part(f"model.layers.{layer}.{name}.weight"),)
    return parts
