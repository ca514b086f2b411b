"""Phi-3 (arXiv 2404.14219) and Phi-4: Llama whose checkpoints are fused already, with a rotary embedding of part of
each head and, in the variants for long texts, LongRoPE (arXiv 2402.13753)."""

import math
from collections.abc import Mapping
from typing import Any

from models.config import ModelConfig, RopeScaling
from models.config_fields import Fields, decoder_fields, refuse_unless
from models.llama import Llama
from models.llama import tensor_parts as llama_parts
from models.parts import Part, Path

__all__ = ["Llama", "hf_fields", "tensor_parts"]

FUSED = {("attention", "qkv", "kernel"): "self_attn.qkv_proj", ("mlp", "gate_up", "kernel"): "mlp.gate_up_proj"}


def hf_fields(architecture: str, config: Mapping[str, Any]) -> Fields:
    """ModelConfig's fields from config.json. Raises ValueError for what is not supported."""
    refuse_unless(architecture, config, hidden_act="silu", attention_bias=False)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    is_longrope = (rope.get("rope_type") or rope.get("type")) in ("longrope", "su")
    plain = {"rope_theta": rope.get("rope_theta") or config.get("rope_theta")} if is_longrope else rope
    fields = decoder_fields({**config, "rope_parameters": plain, "rope_scaling": None})
    partial = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor", 1.0)
    fields["rotary_dim"] = int(fields["head_dim"] * partial)
    fields["sliding_windows"] = (config.get("sliding_window"),) * fields["num_layers"]
    return fields | _longrope(rope, config) if is_longrope else fields


def _longrope(rope: Mapping[str, Any], config: Mapping[str, Any]) -> Fields:
    """The context that the short factors were made for: past it, all keys would have to be computed again."""
    context = rope.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    if not context or not rope.get("short_factor"):
        raise ValueError("rope type 'longrope' needs original_max_position_embeddings and short_factor in config.json")
    factor = rope.get("factor") or config["max_position_embeddings"] / context
    magnitude = rope.get("attention_factor") or math.sqrt(1 + math.log(max(factor, 1)) / math.log(context))
    scaling = RopeScaling(kind="factors", factors=tuple(rope["short_factor"]), attention_factor=magnitude)
    return {"rope_scaling": scaling, "max_position_embeddings": min(context, config["max_position_embeddings"])}


def tensor_parts(config: ModelConfig) -> dict[Path, tuple[Part, ...]]:
    """Llama's, but for what is fused."""
    parts = llama_parts(config)
    for layer in range(config.num_layers):
        for path, name in FUSED.items():
            parts[(f"layers_{layer}", *path)] = (Part(f"model.layers.{layer}.{name}.weight"),)
    return parts
