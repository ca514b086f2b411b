"""Gemma 2 (arXiv 2408.00118) and Gemma 3 (arXiv 2503.19786), text only.

What sets them apart from Llama: windows in most layers, norms before and after each half of a layer that multiply by
1 + weight, embeddings scaled by sqrt(E), a gated GELU, soft caps (Gemma 2), and two rotary bases and query/key norms
(Gemma 3). Letters: T tokens, E hidden width, H query heads, K key/value heads, D head size, V vocabulary, R rows.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from kernels_pallas import AttentionBatch, Norm, sum_parts
from models import llama
from models.config import ModelConfig
from models.config_fields import (
    Fields,
    decoder_fields,
    gguf_decoder_fields,
    layer_windows,
    refuse_unless,
    required,
    rope,
)
from models.layers import AddNorm, Compute, Layer, RMSNorm, Stream, rotary_tables
from models.parts import Part, Path, TensorSource
from models.renamed_tensors import RenamedTensors

Cache = Any
Rotary = tuple[jax.Array, jax.Array]
OTHER_NORMS = ("attention_norm", "mlp_norm")  # Llama's
MULTIMODAL = "Gemma3ForConditionalGeneration"
OF_IMAGES = ("vision_tower.", "multi_modal_projector.")
NORMS = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")


class Attention(llama.Attention):
    norm_offset: ClassVar[float] = 1.0


class DecoderLayer(Layer):
    config: ModelConfig
    window: int | None
    compute: Compute

    def setup(self) -> None:
        c = self.config
        norms = {"epsilon": c.rms_norm_eps, "compute": self.compute, "offset": 1.0}
        self.input_layernorm = AddNorm(c.hidden_size, **norms)
        self.attention = Attention(c, self.window, self.compute)
        self.post_attention_layernorm = RMSNorm(**norms)
        self.pre_feedforward_layernorm = AddNorm(c.hidden_size, **norms)
        self.mlp = llama.FeedForward(c, self.compute)
        self.post_feedforward_layernorm = RMSNorm(**norms)

    def attend(self, stream: Stream, rotary: Rotary, cache: Cache, batch: AttentionBatch) -> tuple[Stream, Cache]:
        x, y = self.input_layernorm(*stream)
        (_, parts), cache = self.attention(y, rotary, cache, batch)
        return (x, self.post_attention_layernorm(sum_parts(parts, x.dtype))[None]), cache

    def feed_forward(self, stream: Stream, num_tokens: jax.Array, following: Norm | None = None) -> Stream:
        x, y = self.pre_feedforward_layernorm(*stream)
        _, parts = self.mlp(y)
        return x, self.post_feedforward_layernorm(sum_parts(parts, x.dtype))[None]


class Gemma(llama.Llama):
    """The decoder: Llama's around other layers, with scaled embeddings and two rotary bases."""

    decoder_layer: ClassVar[type[Layer]] = DecoderLayer
    norm_offset: ClassVar[float] = 1.0

    def embedded(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        return self.embed(tokens) * jnp.asarray(self.config.hidden_size**0.5, self.compute.dtype)

    def rotary(self, positions: jax.Array) -> list[Rotary]:
        c = self.config
        everywhere = nearby = rotary_tables(positions, c)
        if c.local_rope_theta is not None:
            nearby = rotary_tables(positions, replace(c, rope_theta=c.local_rope_theta, rope_scaling=None))
        return [everywhere if window is None else nearby for window in c.sliding_windows]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[R, E] -> float32[R, V]."""
        logits, cap = super().logits(hidden), self.config.logits_soft_cap
        return logits if cap is None else cap * jnp.tanh(logits / cap)


def hf_fields(architecture: str, config: Mapping[str, Any]) -> Fields:
    """ModelConfig's fields from config.json. Raises ValueError for what is not supported."""
    config = {**config, "use_bidirectional_attention": bool(config.get("use_bidirectional_attention"))}
    refuse_unless(architecture, config, use_bidirectional_attention=False)
    is_gemma3 = architecture != "Gemma2ForCausalLM"
    if architecture == MULTIMODAL:
        refuse_unless(architecture, config, final_logit_softcapping=None)  # as with the other one below
    if is_gemma3:
        refuse_unless(architecture, config, attn_logit_softcapping=None)  # transformers knows it, and caps nothing
        config, local_theta = _gemma3_rope(config)
    fields = decoder_fields(config, activation_key="hidden_activation")
    period = required(config, "sliding_window_pattern") if is_gemma3 else 2
    layer_types = config.get("layer_types") or _layer_types(fields["num_layers"], period)
    bias = bool(config["attention_bias"])
    return fields | {
        "qkv_bias": bias,
        "out_bias": bias,
        "qk_norm": is_gemma3,
        "local_rope_theta": local_theta if is_gemma3 else None,
        "sliding_windows": layer_windows(required(config, "sliding_window"), layer_types),
        "attention_scale": float(config["query_pre_attn_scalar"]) ** -0.5,
        "attention_soft_cap": config["attn_logit_softcapping"],
        "logits_soft_cap": config["final_logit_softcapping"],
    }


def _gemma3_rope(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], float]:
    """`config` with the rope of its full_attention layers alone, and theta of the others.

    Older files have rope_theta, rope_scaling and rope_local_base_freq, newer ones rope_parameters by layer type.
    """
    by_type = config.get("rope_parameters") or {}
    if set(by_type) - {"full_attention", "sliding_attention"}:
        raise ValueError("config.json must divide rope_parameters into full_attention and sliding_attention")
    scaling = config.get("rope_scaling") or {}
    if "type" in scaling and "rope_type" not in scaling:
        raise ValueError(
            "config.json must call the type of Gemma 3's rope_scaling rope_type: transformers ignores 'type'"
        )
    full = {**(by_type.get("full_attention") or {}), **scaling}
    refuse_unless("Gemma 3", full, truncate=True)  # transformers reads it one level higher
    local = by_type.get("sliding_attention") or {}
    local_theta, local_scaling = rope(local, {**config, "rope_theta": config["rope_local_base_freq"]})
    if local_scaling is not None:
        raise ValueError("rope scaling of sliding_attention layers is not supported")
    left_out = {"rope_scaling": None, "original_max_position_embeddings": None}
    return {**config, "rope_parameters": full, **left_out}, local_theta


def _layer_types(num_layers: int, period: int) -> list[str]:
    """Every period-th layer sees all."""
    return ["full_attention" if (layer + 1) % period == 0 else "sliding_attention" for layer in range(num_layers)]


def gguf_fields(header: Mapping[str, Any], tensor_names: Collection[str]) -> Fields:
    """Gemma 3's fields from a GGUF header, which has neither the local base nor the pattern of the layers."""
    fields = gguf_decoder_fields(header, tensor_names)
    is_27b = fields["num_layers"] == 62  # scales its queries by E / H instead of D
    scalar = fields["hidden_size"] / fields["num_heads"] if is_27b else fields["head_dim"]
    window = header.get("gemma3.attention.sliding_window", 1024)
    return fields | {
        "activation": "gelu_tanh",
        "rope_theta": header.get("gemma3.rope.freq_base", 1_000_000.0),
        "local_rope_theta": header.get("gemma3.rope.freq_base_swa", 10_000.0),
        "qk_norm": True,
        "sliding_windows": layer_windows(window, _layer_types(fields["num_layers"], 6)),
        "attention_scale": scalar**-0.5,
        "logits_soft_cap": header.get("gemma3.final_logit_softcapping"),
    }


def tensor_parts(config: ModelConfig) -> dict[Path, tuple[Part, ...]]:
    """Llama's, but for the norms of a layer."""
    parts = {path: part for path, part in llama.tensor_parts(config).items() if path[1] not in OTHER_NORMS}
    for layer in range(config.num_layers):
        for norm in NORMS:
            parts[f"layers_{layer}", norm, "scale"] = (Part(f"model.layers.{layer}.{norm}.weight"),)
    return parts


def canonical_source(source: TensorSource, config: ModelConfig) -> TensorSource:
    """Of a multimodal model what makes text, as transformers 4 ("language_model.model.") or 5 ("model.language_model.")
    names it."""
    if config.architecture != MULTIMODAL:
        return source
    stored_as = {}
    for name in source.names:
        inner = name.removeprefix("model.").removeprefix("language_model.").removeprefix("model.")
        if not inner.startswith(OF_IMAGES):
            stored_as[inner if inner == "lm_head.weight" else f"model.{inner}"] = name
    return RenamedTensors(source, stored_as)
