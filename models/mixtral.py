"""Sparse decoders that are otherwise Llama's: Mixtral (arXiv 2401.04088) and Qwen3-MoE (arXiv 2505.09388)."""

from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax

from kernels_pallas import Norm, array_of
from models import llama
from models.config import ModelConfig
from models.config_fields import Fields, decoder_fields, refuse_unless, required, same_windows
from models.expert_tensors import ExpertTensors
from models.experts_config import ExpertsConfig
from models.layers import Stream
from models.moe import SparseFeedForward
from models.parts import Part, Path, TensorSource


class SparseDecoderLayer(llama.DecoderLayer):
    feed_forward_type: ClassVar[type[nn.Module]] = SparseFeedForward

    def feed_forward(self, stream: Stream, num_tokens: jax.Array, following: Norm | None = None) -> Stream:
        x, y = self.mlp_norm(*stream)
        return x, self.mlp(array_of(y), num_tokens)[None]


class Mixtral(llama.Llama):
    """Llama with experts in the layers that config.experts.layers marks."""

    def decoder_layers(self) -> list[nn.Module]:
        c = self.config
        assert c.experts is not None
        kinds = {False: llama.DecoderLayer, True: SparseDecoderLayer}
        return [
            kinds[sparse](c, window, self.compute)
            for sparse, window in zip(c.experts.layers, c.sliding_windows, strict=True)
        ]


def hf_fields(architecture: str, config: Mapping[str, Any]) -> Fields:
    """ModelConfig's fields from config.json. Raises ValueError for what is not supported."""
    fields = decoder_fields(config)
    if architecture == "MixtralForCausalLM":
        refuse_unless(architecture, config, attention_bias=False)
        experts = ExpertsConfig(
            count=required(config, "num_experts" if "num_experts" in config else "num_local_experts"),
            chosen=required(config, "num_experts_per_tok"),
            intermediate_size=fields["intermediate_size"],
            layers=(True,) * fields["num_layers"],
        )
        return fields | {
            "sliding_windows": same_windows(architecture, config, config["sliding_window"]),
            "experts": experts,
        }
    dense, every = config["mlp_only_layers"] or [], required(config, "decoder_sparse_step")
    if every < 1:
        raise ValueError(f"config.json must set decoder_sparse_step to at least 1, not {every}")
    experts = ExpertsConfig(
        count=required(config, "num_local_experts" if "num_local_experts" in config else "num_experts"),
        chosen=required(config, "num_experts_per_tok"),
        intermediate_size=required(config, "moe_intermediate_size"),
        layers=tuple(i not in dense and (i + 1) % every == 0 for i in range(fields["num_layers"])),
        normalise=bool(config["norm_topk_prob"]),
    )
    window = config["sliding_window"] if config["use_sliding_window"] else None
    return fields | {
        "qkv_bias": bool(config["attention_bias"]),
        "out_bias": bool(config["attention_bias"]),
        "sliding_windows": same_windows(architecture, config, window),
        "experts": experts,
        "qk_norm": True,
    }


def tensor_parts(config: ModelConfig) -> dict[Path, tuple[Part, ...]]:
    """As models.llama's, with the router and the experts of sparse layers in the place of their feed-forward."""
    assert config.experts is not None
    parts = llama.tensor_parts(config)
    for layer, sparse in enumerate(config.experts.layers):
        if sparse:
            parts |= expert_parts(config, f"layers_{layer}", f"model.layers.{layer}.mlp", "gate")
    return parts


def expert_parts(config: ModelConfig, layer: str, mlp: str, router: str) -> dict[Path, tuple[Part, ...]]:
    """Of one sparse layer's feed-forward, in the names of models.expert_tensors."""
    experts = config.experts
    assert experts is not None
    parts: dict[Path, tuple[Part, ...]] = {}
    for kind, leaf in [("weight", "kernel"), ("bias", "bias")][: 1 + experts.bias]:
        parts[layer, "mlp", "router", leaf] = (Part(f"{mlp}.{router}.{kind}"),)
        parts[layer, "mlp", "gate_up", leaf] = tuple(
            Part(f"{mlp}.experts.{n}.{name}_proj.{kind}", experts.intermediate_size)
            for n in range(experts.count)
            for name in ("gate", "up")
        )
        parts[layer, "mlp", "down", leaf] = tuple(
            Part(f"{mlp}.experts.{n}.down_proj.{kind}", config.hidden_size) for n in range(experts.count)
        )
    return parts


def canonical_source(source: TensorSource, config: ModelConfig) -> TensorSource:
    """Experts under each one's own name, in whichever layout they are stored."""
    assert config.experts is not None
    return ExpertTensors(source, config.experts.count)
