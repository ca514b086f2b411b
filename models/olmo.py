"""OLMo 2 (arXiv 2501.00656): Llama with norms after attention and MLP, not before, over all queries and keys."""

from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels_pallas import AttentionBatch, Norm, apply_rotary, ragged_paged_attention, rms_norm, sum_parts
from models import llama
from models.config import ModelConfig
from models.config_fields import Fields, decoder_fields, same_windows
from models.layers import Compute, Layer, Linear, NormScale, RMSNorm, Stream, settled
from models.parts import Part, Path
from models.sharding import attend, unfuse

NORMS = {"attention_norm": "post_attention_layernorm", "mlp_norm": "post_feedforward_layernorm"}


class Attention(nn.Module):
    config: ModelConfig
    compute: Compute

    @nn.compact
    def __call__(
        self, x: jax.Array, rotary: llama.Rotary, cache: llama.Cache, batch: AttentionBatch
    ) -> tuple[jax.Array, llama.Cache]:
        c = self.config
        H, K, D = c.num_heads, self.compute.kv_heads(c), c.head_dim
        qkv = Linear((H + 2 * K) * D, self.compute, use_bias=c.qkv_bias, name="qkv")(x)
        q, k, v = unfuse(qkv, (H * D, K * D, K * D), self.compute.shards)
        q = RMSNorm(c.rms_norm_eps, self.compute, name="q_norm")(q).reshape(-1, H, D)
        k_scale = NormScale(c.num_kv_heads * D, self.compute.dtype, name="k_norm")().reshape(-1, D)
        k_scale = jnp.repeat(k_scale, K // c.num_kv_heads, axis=0).reshape(-1)
        k = rms_norm(k, k_scale, c.rms_norm_eps, deterministic=self.compute.deterministic).reshape(-1, K, D)
        q, k = apply_rotary(q, rotary), apply_rotary(k, rotary)
        out, cache = attend(
            ragged_paged_attention, self.compute.mesh, (q, k, v.reshape(-1, K, D)), (), cache, batch,
            scale=D**-0.5, backend=self.compute.attention_backend,
        )  # fmt: skip
        return Linear(c.hidden_size, self.compute, use_bias=c.out_bias, name="out")(out.reshape(-1, H * D)), cache


class DecoderLayer(Layer):
    config: ModelConfig
    window: int | None
    compute: Compute

    def setup(self) -> None:
        c = self.config
        self.attention = Attention(c, self.compute)
        self.attention_norm = RMSNorm(c.rms_norm_eps, self.compute)
        self.mlp = llama.FeedForward(c, self.compute)
        self.mlp_norm = RMSNorm(c.rms_norm_eps, self.compute)

    def attend(
        self, stream: Stream, rotary: llama.Rotary, cache: llama.Cache, batch: AttentionBatch
    ) -> tuple[Stream, llama.Cache]:
        x = settled(*stream)
        y, cache = self.attention(x, rotary, cache, batch)
        return (x, self.attention_norm(y)[None]), cache

    def feed_forward(self, stream: Stream, num_tokens: jax.Array, following: Norm | None = None) -> Stream:
        x = settled(*stream)
        _, parts = self.mlp(x)
        return x, self.mlp_norm(sum_parts(parts, x.dtype))[None]


class Olmo2(llama.Llama):
    """The decoder: Llama's around other layers."""

    decoder_layer: ClassVar[type[Layer]] = DecoderLayer


def hf_fields(architecture: str, config: Mapping[str, Any]) -> Fields:
    """ModelConfig's fields from config.json. Raises ValueError for what is not supported."""
    bias, windows = bool(config["attention_bias"]), same_windows(architecture, config, None)
    return decoder_fields(config) | {"qk_norm": True, "qkv_bias": bias, "out_bias": bias, "sliding_windows": windows}


def tensor_parts(config: ModelConfig) -> dict[Path, tuple[Part, ...]]:
    """Llama's, but for the norms of a layer."""
    parts = llama.tensor_parts(config)
    for layer in range(config.num_layers):
        for path, name in NORMS.items():
            parts[f"layers_{layer}", path, "scale"] = (Part(f"model.layers.{layer}.{name}.weight"),)
    return parts
