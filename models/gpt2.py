"""GPT-2: learned positions, LayerNorm and a plain GELU. Letters: T tokens, E hidden width, H heads, D head size, V
vocabulary, R rows."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import ACTIVATIONS, AttentionBatch, ragged_paged_attention
from models import llama
from models.config import ModelConfig
from models.config_fields import Fields, decoder_fields, refuse_unless, required
from models.layers import Compute, Embedding, LayerNorm, Linear
from models.parts import Part, Path, TensorSource
from models.renamed_tensors import RenamedTensors
from models.sharding import attend, unfuse

Cache = Any
PREFIX = "transformer."
RENAMED = {"n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
           "n_positions": "max_position_embeddings", "layer_norm_epsilon": "rms_norm_eps"}  # fmt: skip
LINEARS = {("qkv",): "attn.c_attn", ("out",): "attn.c_proj", ("up",): "mlp.c_fc", ("down",): "mlp.c_proj"}
NORMS = {("attention_norm",): "ln_1", ("mlp_norm",): "ln_2"}


class DecoderLayer(nn.Module):
    config: ModelConfig
    attention_scale: float
    compute: Compute

    @nn.compact
    def __call__(self, x: jax.Array, cache: Cache, batch: AttentionBatch) -> tuple[jax.Array, Cache]:
        c = self.config
        E, H, D = c.hidden_size, c.num_heads, c.head_dim
        y = LayerNorm(c.rms_norm_eps, self.compute.dtype, name="attention_norm")(x)
        qkv = Linear(3 * E, self.compute, use_bias=True, name="qkv")(y)
        heads = tuple(y.reshape(-1, H, D) for y in unfuse(qkv, (E, E, E), self.compute.shards))
        y, cache = attend(
            ragged_paged_attention, self.compute.mesh, heads, (), cache, batch,
            scale=self.attention_scale, backend=self.compute.attention_backend,
        )  # fmt: skip
        x = x + Linear(E, self.compute, use_bias=True, name="out")(y.reshape(-1, E))
        y = LayerNorm(c.rms_norm_eps, self.compute.dtype, name="mlp_norm")(x)
        y = Linear(c.intermediate_size, self.compute, use_bias=True, name="up")(y)
        return x + Linear(E, self.compute, use_bias=True, name="down")(ACTIVATIONS[c.activation](y)), cache


class GPT2(llama.Llama):
    """The decoder: Llama's around other layers, with positions that are embedded."""

    def setup(self) -> None:
        c = self.config
        self.embed = Embedding(c.vocab_size, c.hidden_size, self.compute)
        self.position = Embedding(c.max_position_embeddings, c.hidden_size, self.compute)
        layer, scale = nn.jit(DecoderLayer), c.attention_scale or c.head_dim**-0.5
        scales = [scale / (i + 1 if c.scale_by_layer else 1) for i in range(c.num_layers)]
        self.layers = [layer(c, scale, self.compute) for scale in scales]
        self.norm = LayerNorm(c.rms_norm_eps, self.compute.dtype)
        if not c.tie_word_embeddings:
            self.head = Linear(c.vocab_size, self.compute, out_dtype=jnp.float32)

    def __call__(
        self, tokens: jax.Array, positions: jax.Array, caches: tuple[Cache, ...], batch: AttentionBatch
    ) -> tuple[jax.Array, tuple[Cache, ...]]:
        """int32[T] tokens and positions -> hidden states [T, E] after the final norm, and the caches."""
        x = self.embed(tokens) + self.position(positions)
        written = []
        for layer, cache in zip(self.layers, caches, strict=True):
            x, cache = layer(x, cache, batch)
            written.append(cache)
        hidden = self.norm(x)
        if self.is_initializing():
            self.logits(hidden)
        return hidden, tuple(written)


def hf_fields(architecture: str, config: Mapping[str, Any]) -> Fields:
    """ModelConfig's fields from config.json. Raises ValueError for what is not supported."""
    refuse_unless(architecture, config, add_cross_attention=False)
    config = {RENAMED.get(name, name): value for name, value in config.items()}
    inner = config["n_inner"] or 4 * required(config, "hidden_size")
    fields = decoder_fields(
        {**config, "intermediate_size": inner, "rope_theta": 10_000.0}, activation_key="activation_function"
    )
    return fields | {
        "attention_scale": None if config["scale_attn_weights"] else 1.0,
        "scale_by_layer": bool(config["scale_attn_by_inverse_layer_idx"]),
    }


def tensor_parts(config: ModelConfig) -> dict[Path, tuple[Part, ...]]:
    """For each parameter's path, the tensors of `canonical_source` that it is made of."""
    parts: dict[Path, tuple[Part, ...]] = {
        ("embed", "embedding"): (Part("wte.weight"),),
        ("position", "embedding"): (Part("wpe.weight"),),
        ("norm", "scale"): (Part("ln_f.weight"),),
        ("norm", "bias"): (Part("ln_f.bias"),),
    }
    if not config.tie_word_embeddings:
        parts["head", "kernel"] = (Part("lm_head.weight"),)
    for layer in range(config.num_layers):
        for leaf, named in (("kernel", LINEARS), ("scale", NORMS)):
            for path, name in named.items():
                parts[(f"layers_{layer}", *path, leaf)] = (Part(f"h.{layer}.{name}.weight"),)
                parts[(f"layers_{layer}", *path, "bias")] = (Part(f"h.{layer}.{name}.bias"),)
    return parts


def canonical_source(source: TensorSource, config: ModelConfig) -> TensorSource:
    return GPT2Tensors(source)


class GPT2Tensors(RenamedTensors):
    """GPT-2's tensors: named with or without "transformer.", beside masks that nobody needs, and the weights of linear
    layers transposed to [in, out]."""

    def __init__(self, source: TensorSource):
        masks = (".attn.bias", ".attn.masked_bias")
        super().__init__(source, {n.removeprefix(PREFIX): n for n in source.names if not n.endswith(masks)})

    def read(self, name: str, out: np.ndarray | None = None) -> np.ndarray:
        tensor = super().read(name)
        is_linear = name.endswith(tuple(f"{linear}.weight" for linear in LINEARS.values()))
        return tensor.T if is_linear else tensor
