"""gpt-oss (arXiv 2508.10925): sparse layers alone, a window in every other one, a learned sink in each head's softmax,
biases throughout and a clamped SwiGLU."""

from collections.abc import Mapping
from typing import Any

from models import mixtral
from models.config import ModelConfig
from models.config_fields import Fields, decoder_fields, layer_windows, refuse_unless, required
from models.expert_tensors import ExpertTensors
from models.experts_config import ExpertsConfig
from models.mixtral import Mixtral
from models.parts import Part, Path, TensorSource

__all__ = ["Mixtral", "canonical_source", "hf_fields", "tensor_parts"]

ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "original_max_position_embeddings": 4096,
    "truncate": False,
}


def hf_fields(architecture: str, config: Mapping[str, Any]) -> Fields:
    """ModelConfig's fields from config.json. Raises ValueError for what is not supported."""
    chosen = required(config, "num_experts_per_tok")
    refuse_unless(architecture, config, hidden_act="silu", experts_per_token=chosen)
    if config.get("rope_parameters") is None:
        config = {**config, "rope_parameters": ROPE}
    fields = decoder_fields(config, quantizations=("mxfp4",))
    num_layers, bias = fields["num_layers"], bool(config["attention_bias"])
    layer_types = config.get("layer_types") or [
        "full_attention" if layer % 2 else "sliding_attention" for layer in range(num_layers)
    ]
    experts = ExpertsConfig(
        count=required(config, "num_experts" if "num_experts" in config else "num_local_experts"),
        chosen=chosen,
        intermediate_size=fields["intermediate_size"],
        layers=(True,) * num_layers,
        scoring="softmax_over_chosen",
        bias=True,
        swiglu_limit=float(config["swiglu_limit"]),
        swiglu_alpha=float(config["swiglu_alpha"]),
    )
    return fields | {
        "qkv_bias": bias,
        "out_bias": bias,
        "attention_sinks": True,
        "sliding_windows": layer_windows(config["sliding_window"], layer_types),
        "experts": experts,
    }


def tensor_parts(config: ModelConfig) -> dict[Path, tuple[Part, ...]]:
    """As models.mixtral's, with another name for the router, and the sinks."""
    parts = mixtral.tensor_parts(config)
    for layer in range(config.num_layers):
        path, prefix = f"layers_{layer}", f"model.layers.{layer}"
        parts |= mixtral.expert_parts(config, path, f"{prefix}.mlp", "router")
        parts[path, "attention", "sinks"] = (Part(f"{prefix}.self_attn.sinks"),)
    return parts


def canonical_source(source: TensorSource, config: ModelConfig) -> TensorSource:
    """Experts under each one's own name, dequantized."""
    assert config.experts is not None
    return ExpertTensors(source, config.experts.count, gpt_oss=True)
