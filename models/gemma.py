"""Gemma 2 (arXiv 2408.00118) and Gemma 3 (arXiv 2503.19786), text only.

What sets them apart from Llama: windows in most layers, norms before and after each half of a layer that multiply by
1 + weight, embeddings scaled by sqrt(E), a gated GELU, soft caps (Gemma 2), and two rotary bases and query/key norms
(Gemma 3). Letters: T tokens, E hidden width, H query heads, K key/value heads, D head size, V vocabulary, R rows.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels_pallas import AttentionBatch, QKNorm, qkv_attention
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
from models.layers import Compute, Embedding, Linear, NormScale, RMSNorm, rotary_tables
from models.parts import Part, Path
from models.sharding import attend

Cache = Any
Rotary = tuple[jax.Array, jax.Array]
Norm = partial(RMSNorm, offset=1.0)
NORMS = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")


class Attention(nn.Module):
    config: ModelConfig
    window: int | None
    compute: Compute

    @nn.compact
    def __call__(self, x: jax.Array, rotary: Rotary, cache: Cache, batch: AttentionBatch) -> tuple[jax.Array, Cache]:
        c = self.config
        H, K, D = c.num_heads, self.compute.kv_heads(c), c.head_dim
        qkv = Linear((H + 2 * K) * D, self.compute, name="qkv")(x).reshape(-1, H + 2 * K, D)
        norms = None
        if c.qk_norm:
            q_norm, k_norm = (NormScale(D, self.compute.dtype, name=name)() for name in ("q_norm", "k_norm"))
            norms = QKNorm(q_norm, k_norm, c.rms_norm_eps, offset=1.0)
        out, cache = attend(
            qkv_attention,
            self.compute.mesh,
            (qkv,),
            (rotary, norms),
            cache,
            batch,
            num_heads=H // self.compute.shards,
            scale=c.attention_scale or D**-0.5,
            window=self.window,
            soft_cap=c.attention_soft_cap,
            backend=self.compute.attention_backend,
        )
        return Linear(c.hidden_size, self.compute, name="out")(out.reshape(-1, H * D)), cache


class FeedForward(llama.FeedForward):
    """GeGLU."""

    def activation(self, gate: jax.Array) -> jax.Array:
        return nn.gelu(gate, approximate=True)


class DecoderLayer(nn.Module):
    config: ModelConfig
    window: int | None
    compute: Compute

    @nn.compact
    def __call__(self, x: jax.Array, rotary: Rotary, cache: Cache, batch: AttentionBatch) -> tuple[jax.Array, Cache]:
        c = self.config
        norms = [Norm(c.rms_norm_eps, self.compute.dtype, name=name) for name in NORMS]
        attention = Attention(c, self.window, self.compute, name="attention")
        y, cache = attention(norms[0](x), rotary, cache, batch)
        x = x + norms[1](y)
        y = FeedForward(c, self.compute, name="mlp")(norms[2](x))
        return x + norms[3](y), cache


class Gemma(llama.Llama):
    """The decoder: Llama's around other layers, with scaled embeddings and two rotary bases."""

    decoder_layer: ClassVar[type[nn.Module]] = DecoderLayer

    def setup(self) -> None:
        c = self.config
        self.embed = Embedding(c.vocab_size, c.hidden_size, self.compute)
        self.layers = self.decoder_layers()
        self.norm = Norm(c.rms_norm_eps, self.compute.dtype)

    def __call__(
        self, tokens: jax.Array, positions: jax.Array, caches: tuple[Cache, ...], batch: AttentionBatch
    ) -> tuple[jax.Array, tuple[Cache, ...]]:
        """int32[T] tokens and positions -> hidden states [T, E] after the final norm, and the caches."""
        c = self.config
        x = self.embed(tokens) * jnp.asarray(c.hidden_size**0.5, self.compute.dtype)
        everywhere = nearby = rotary_tables(positions, c)
        if c.local_rope_theta is not None:
            nearby = rotary_tables(positions, replace(c, rope_theta=c.local_rope_theta, rope_scaling=None))
        written = []
        for layer, window, cache in zip(self.layers, c.sliding_windows, caches, strict=True):
            x, cache = layer(x, everywhere if window is None else nearby, cache, batch)
            written.append(cache)
        return self.norm(x), tuple(written)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[R, E] -> float32[R, V]."""
        logits, cap = self.embed.logits(hidden), self.config.logits_soft_cap
        return logits if cap is None else cap * jnp.tanh(logits / cap)


def hf_fields(architecture: str, config: Mapping[str, Any]) -> Fields:
    """ModelConfig's fields from config.json. Raises ValueError for what is not supported."""
    refuse_unless(
        architecture,
        {**config, "use_bidirectional_attention": bool(config.get("use_bidirectional_attention"))},
        hidden_activation="gelu_pytorch_tanh",
        attention_bias=False,
        use_bidirectional_attention=False,
        tie_word_embeddings=True,
    )
    is_gemma3 = architecture == "Gemma3ForCausalLM"
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    config = {"head_dim": 256, "max_position_embeddings": 131_072 if is_gemma3 else 8192, **config}
    fields = decoder_fields({**config, "rope_parameters": None, "rope_scaling": None})
    if is_gemma3:
        fields |= _gemma3_rope(parameters, config)
    else:
        fields["rope_theta"], fields["rope_scaling"] = rope(parameters, config)
    period = config.get("sliding_window_pattern", 6) if is_gemma3 else 2
    layer_types = config.get("layer_types") or _layer_types(fields["num_layers"], period)
    caps = (None, None) if is_gemma3 else (50.0, 30.0)
    return fields | {
        "tie_word_embeddings": True,
        "qk_norm": is_gemma3,
        "sliding_windows": layer_windows(required({"sliding_window": 4096, **config}, "sliding_window"), layer_types),
        "attention_scale": float(config.get("query_pre_attn_scalar", 256)) ** -0.5,
        "attention_soft_cap": config.get("attn_logit_softcapping", caps[0]),
        "logits_soft_cap": config.get("final_logit_softcapping", caps[1]),
    }


def _gemma3_rope(parameters: Mapping[str, Any], config: Mapping[str, Any]) -> Fields:
    """Older files have rope_theta, rope_scaling and rope_local_base_freq, newer ones parameters by layer type."""
    by_type = "full_attention" in parameters or "sliding_attention" in parameters
    full = (parameters.get("full_attention") or {}) if by_type else parameters
    local = (parameters.get("sliding_attention") or {}) if by_type else {}
    theta, scaling = rope(full, {"rope_theta": 1_000_000.0, **config})
    local_theta, local_scaling = rope(local, {"rope_theta": config.get("rope_local_base_freq", 10_000.0)})
    if local_scaling is not None:
        raise ValueError("rope scaling of sliding_attention layers is not supported")
    return {"rope_theta": theta, "rope_scaling": scaling, "local_rope_theta": local_theta}


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
        "rope_theta": header.get("gemma3.rope.freq_base", 1_000_000.0),
        "local_rope_theta": header.get("gemma3.rope.freq_base_swa", 10_000.0),
        "qk_norm": True,
        "sliding_windows": layer_windows(window, _layer_types(fields["num_layers"], 6)),
        "attention_scale": scalar**-0.5,
        "logits_soft_cap": header.get("gemma3.final_logit_softcapping"),
    }


def tensor_parts(config: ModelConfig) -> dict[Path, tuple[Part, ...]]:
    """For each parameter's path, the checkpoint's tensors (Hugging Face names) it is made of, joined along axis 0."""
    parts: dict[Path, tuple[Part, ...]] = {
        ("embed", "embedding"): (Part("model.embed_tokens.weight"),),
        ("norm", "scale"): (Part("model.norm.weight"),),
    }
    rows = {
        "q": config.num_heads * config.head_dim,
        "k": config.num_kv_heads * config.head_dim,
        "v": config.num_kv_heads * config.head_dim,
    }
    for layer in range(config.num_layers):
        path, prefix = f"layers_{layer}", f"model.layers.{layer}"
        for norm in NORMS:
            parts[path, norm, "scale"] = (Part(f"{prefix}.{norm}.weight"),)
        for norm in ("q_norm", "k_norm") if config.qk_norm else ():
            parts[path, "attention", norm, "scale"] = (Part(f"{prefix}.self_attn.{norm}.weight"),)
        parts[path, "attention", "qkv", "kernel"] = tuple(
            Part(f"{prefix}.self_attn.{name}_proj.weight", n) for name, n in rows.items()
        )
        parts[path, "attention", "out", "kernel"] = (Part(f"{prefix}.self_attn.o_proj.weight"),)
        parts[path, "mlp", "gate_up", "kernel"] = tuple(
            Part(f"{prefix}.mlp.{name}_proj.weight", config.intermediate_size) for name in ("gate", "up")
        )
        parts[path, "mlp", "down", "kernel"] = (Part(f"{prefix}.mlp.down_proj.weight"),)
    return parts
