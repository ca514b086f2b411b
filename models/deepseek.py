"""DeepSeek-V2 (arXiv 2405.04434) and V3 (arXiv 2412.19437): multi-head latent attention, and experts beside a
feed-forward that all tokens share.

The cache keeps what all heads' keys and values are made from: a latent vector of width R and a rotary key of width Q,
once for each token. Queries are brought into the latent space, where attention is that of H query heads over one
key/value head of width R + Q, and its result is brought out of it: a head's keys and values are never made. Letters: T
tokens, E hidden width, H heads, and R, Q, C, V: rank, rope_dim, nope_dim and value_dim of LatentConfig.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas import AttentionBatch, Norm, apply_rotary, array_of, latent_cache_shape, ragged_paged_attention
from models import llama
from models.config import ModelConfig
from models.config_fields import (
    Fields,
    decoder_fields,
    refuse_unless,
    required,
    rope_parameters,
    same_windows,
    yarn_magnitude,
)
from models.experts_config import ExpertsConfig
from models.latent_config import LatentConfig
from models.latent_tensors import LatentTensors
from models.layers import AddNorm, Compute, Dtype, Layer, Linear, RMSNorm, Stream
from models.mixtral import expert_parts
from models.moe import SparseFeedForward
from models.parts import Part, Path, TensorSource

LATENT_NORM_EPS = 1e-6  # whatever the other norms' is


class HeadLinear(nn.Module):
    """A matrix for each head: x [T, H, in] -> [T, H, out]. The kernel is [H, out, in], or [H, in, out] transposed."""

    heads: int
    features: int
    compute: Compute
    transposed: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        ends = (x.shape[-1], self.features) if self.transposed else (self.features, x.shape[-1])
        kernel = self.param("kernel", nn.initializers.normal(ends[1] ** -0.5), (self.heads, *ends), self.compute.dtype)
        precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
        summed = "thi,hio->tho" if self.transposed else "thi,hoi->tho"
        return jnp.einsum(summed, x, kernel, precision=precision, preferred_element_type=x.dtype)


class LatentAttention(nn.Module):
    config: ModelConfig
    compute: Compute

    @nn.compact
    def __call__(
        self, x: jax.Array, rotary: llama.Rotary, cache: llama.Cache, batch: AttentionBatch
    ) -> tuple[jax.Array, llama.Cache]:
        """x [T, E] -> parts [any, T, E] of the result, and the cache."""
        c, latent = self.config, self.config.latent
        assert latent is not None and c.attention_scale is not None
        H, query_rank = c.num_heads, latent.query_rank or 0
        down = Linear(query_rank + latent.rank + latent.rope_dim, self.compute, name="down")(x)
        queries, keys, rope_keys = jnp.split(down, [query_rank, query_rank + latent.rank], axis=1)
        queries = RMSNorm(LATENT_NORM_EPS, self.compute, name="q_norm")(queries) if query_rank else x
        keys = RMSNorm(LATENT_NORM_EPS, self.compute, name="kv_norm")(keys)
        q = Linear(H * (latent.nope_dim + latent.rope_dim), self.compute, name="q")(queries).reshape(len(x), H, -1)
        q, rope_q = jnp.split(q, [latent.nope_dim], axis=2)
        q = HeadLinear(H, latent.rank, self.compute, transposed=True, name="key")(q)
        out, cache = ragged_paged_attention(
            jnp.concatenate([q, apply_rotary(rope_q, rotary)], axis=2),
            jnp.concatenate([keys[:, None], apply_rotary(rope_keys[:, None], rotary)], axis=2),
            None,
            cache,
            batch,
            scale=c.attention_scale,
            backend=self.compute.attention_backend,
        )
        out = HeadLinear(H, latent.value_dim, self.compute, name="value")(out[..., : latent.rank])
        return Linear(c.hidden_size, self.compute, name="out").parts(out.reshape(len(x), -1)), cache


class DecoderLayer(Layer):
    config: ModelConfig
    sparse: bool
    compute: Compute

    def setup(self) -> None:
        c = self.config
        self.attention_norm = AddNorm(c.hidden_size, c.rms_norm_eps, self.compute)
        self.attention = LatentAttention(c, self.compute)
        self.mlp_norm = AddNorm(c.hidden_size, c.rms_norm_eps, self.compute)
        if self.sparse:
            self.mlp = SparseFeedForward(c, self.compute)
            self.shared = llama.FeedForward(_shared(c), self.compute)
        else:
            self.mlp = llama.FeedForward(c, self.compute)

    def attend(
        self, stream: Stream, rotary: llama.Rotary, cache: llama.Cache, batch: AttentionBatch
    ) -> tuple[Stream, llama.Cache]:
        x, y = self.attention_norm(*stream)
        parts, cache = self.attention(array_of(y), rotary, cache, batch)
        return (x, parts), cache

    def feed_forward(self, stream: Stream, num_tokens: jax.Array, following: Norm | None = None) -> Stream:
        x, y = self.mlp_norm(*stream)
        if not self.sparse:
            return self.mlp(y, x)
        return self.shared(y, x + self.mlp(array_of(y), num_tokens))


def _shared(config: ModelConfig) -> ModelConfig:
    """With the width of the feed-forward that all tokens share."""
    assert config.experts is not None
    return replace(config, intermediate_size=config.experts.shared * config.experts.intermediate_size)


class DeepSeek(llama.Llama):
    """Llama around other layers, with another cache."""

    def decoder_layers(self) -> list[nn.Module]:
        assert self.config.experts is not None
        return [DecoderLayer(self.config, sparse, self.compute) for sparse in self.config.experts.layers]

    def cache_shapes(self, num_blocks: int, block_size: int, dtype: Dtype) -> tuple[llama.Cache, ...]:
        """One pytree of jax.ShapeDtypeStruct a layer."""
        return (latent_cache_shape(num_blocks, block_size, self.config.head_dim, dtype),) * self.config.num_layers


def hf_fields(architecture: str, config: Mapping[str, Any]) -> Fields:
    """ModelConfig's fields from config.json. Raises ValueError for what is not supported."""
    is_v3 = architecture == "DeepseekV3ForCausalLM"
    supported: dict[str, Any]
    if is_v3:
        supported = {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
    else:
        supported = {"scoring_func": "softmax", "norm_topk_prob": False, "mlp_bias": False}
    refuse_unless(architecture, config, attention_bias=False, moe_layer_freq=1, rope_interleave=True, **supported)
    latent = LatentConfig(
        query_rank=config["q_lora_rank"],
        rank=required(config, "kv_lora_rank"),
        nope_dim=required(config, "qk_nope_head_dim"),
        rope_dim=required(config, "qk_rope_head_dim"),
        value_dim=required(config, "v_head_dim"),
    )
    fields = decoder_fields({**config, "head_dim": latent.rank + latent.rope_dim})
    return fields | {
        "num_kv_heads": 1,
        "sliding_windows": same_windows(architecture, config, None),
        "rotary_dim": latent.rope_dim,
        "attention_scale": _attention_scale(latent, config),
        "latent": latent,
        "experts": _experts(config, is_v3, fields["num_layers"]),
    }


def _experts(config: Mapping[str, Any], is_v3: bool, num_layers: int) -> ExpertsConfig:
    method = config["topk_method"]
    if not is_v3 and method not in ("greedy", "group_limited_greedy"):
        raise ValueError(f"config.json sets topk_method to {method!r}; supported are greedy and group_limited_greedy")
    has_groups = is_v3 or method == "group_limited_greedy"
    shared = required(config, "n_shared_experts")
    if shared < 1:
        raise ValueError(f"config.json must set n_shared_experts to at least 1, not {shared}")
    return ExpertsConfig(
        count=required(config, "n_routed_experts"),
        chosen=required(config, "num_experts_per_tok"),
        intermediate_size=required(config, "moe_intermediate_size"),
        layers=tuple(layer >= required(config, "first_k_dense_replace") for layer in range(num_layers)),
        scoring="sigmoid" if is_v3 else "softmax",
        normalise=is_v3 and bool(config["norm_topk_prob"]),
        scale=float(config["routed_scaling_factor"]),
        groups=required(config, "n_group") if has_groups else 1,
        chosen_groups=required(config, "topk_group") if has_groups else 1,
        shared=shared,
    )


def _attention_scale(latent: LatentConfig, config: Mapping[str, Any]) -> float:
    """1 / sqrt(width of a head's queries); where YaRN asks for it, it scales all their dimensions, not the rotary ones
    alone."""
    scale = (latent.nope_dim + latent.rope_dim) ** -0.5
    rope = rope_parameters(config)
    if (rope.get("rope_type") or rope.get("type") or "default") == "default" or not rope.get("mscale_all_dim"):
        return scale
    return scale * yarn_magnitude(rope["factor"], rope["mscale_all_dim"]) ** 2


def tensor_parts(config: ModelConfig) -> dict[Path, tuple[Part, ...]]:
    """As models.llama's where the layers are alike, in the names of `canonical_source`."""
    latent, experts = config.latent, config.experts
    assert latent is not None and experts is not None
    query_rank = latent.query_rank
    parts = {path: part for path, part in llama.tensor_parts(config).items() if "attention" not in path}
    for layer, sparse in enumerate(experts.layers):
        path, mlp, attention = f"layers_{layer}", f"model.layers.{layer}.mlp", f"model.layers.{layer}.self_attn"
        down = {"q_a_proj": query_rank} if query_rank else {}
        down["kv_a_proj_with_mqa"] = latent.rank + latent.rope_dim
        parts |= {
            (path, "attention", "down", "kernel"): tuple(Part(f"{attention}.{n}.weight", r) for n, r in down.items()),
            (path, "attention", "q", "kernel"): (Part(f"{attention}.{'q_b' if query_rank else 'q'}_proj.weight"),),
            (path, "attention", "kv_norm", "scale"): (Part(f"{attention}.kv_a_layernorm.weight"),),
            (path, "attention", "key", "kernel"): (Part(f"{attention}.k_b_proj.weight"),),
            (path, "attention", "value", "kernel"): (Part(f"{attention}.v_b_proj.weight"),),
            (path, "attention", "out", "kernel"): (Part(f"{attention}.o_proj.weight"),),
        }
        if query_rank:
            parts[path, "attention", "q_norm", "scale"] = (Part(f"{attention}.q_a_layernorm.weight"),)
        if sparse:
            parts |= expert_parts(config, path, mlp, "gate") | _shared_parts(config, path, f"{mlp}.shared_experts")
        if sparse and experts.scoring == "sigmoid":
            parts[path, "mlp", "choice_bias"] = (Part(f"{mlp}.gate.e_score_correction_bias"),)
    return parts


def _shared_parts(config: ModelConfig, path: str, name: str) -> dict[Path, tuple[Part, ...]]:
    width = _shared(config).intermediate_size
    return {
        (path, "shared", "gate_up", "kernel"): (
            Part(f"{name}.gate_proj.weight", width),
            Part(f"{name}.up_proj.weight", width),
        ),
        (path, "shared", "down", "kernel"): (Part(f"{name}.down_proj.weight"),),
    }


def canonical_source(source: TensorSource, config: ModelConfig) -> TensorSource:
    return LatentTensors(source, config)
