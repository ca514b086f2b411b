"""GPT-2: learned positions, LayerNorm and a plain GELU. Letters: T tokens, E hidden width, H heads, D head size, V
vocabulary, R rows."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import ACTIVATIONS, AttentionBatch, Norm, ragged_paged_attention
from models import llama
from models.config import ModelConfig
from models.config_fields import Fields, decoder_fields, refuse_unless, required
from models.layers import Compute, Embedding, Layer, LayerNorm, Linear, Stream, settled
from models.parts import Part, Path, TensorSource
from models.renamed_tensors import RenamedTensors
from models.sharding import attend, unfuse

Cache = Any
PREFIX = "transformer."
RENAMED = {"n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
           "n_positions": "max_position_embeddings", "layer_norm_epsilon": "rms_norm_eps"}  # fmt: skip
LINEARS = {("qkv",): "attn.c_attn", ("out",): "attn.c_proj", ("up",): "mlp.c_fc", ("down",): "mlp.c_proj"}
NORMS = {("attention_norm",): "ln_1", ("mlp_norm",): "ln_2"}


class DecoderLayer(Layer):
    config: ModelConfig
    attention_scale: float
    compute: Compute

    def setup(self) -> None:
        c = self.config
        self.attention_norm = LayerNorm(c.rms_norm_eps, self.compute.dtype)
        self.qkv = Linear(3 * c.hidden_size, self.compute, use_bias=True)
        self.out = Linear(c.hidden_size, self.compute, use_bias=True)
        self.mlp_norm = LayerNorm(c.rms_norm_eps, self.compute.dtype)
        self.up = Linear(c.intermediate_size, self.compute, use_bias=True)
        self.down = Linear(c.hidden_size, self.compute, use_bias=True)

    def attend(self, stream: Stream, rotary: None, cache: Cache, batch: AttentionBatch) -> tuple[Stream, Cache]:
        x, (E, H, D) = settled(*stream), (self.config.hidden_size, self.config.num_heads, self.config.head_dim)
        qkv = self.qkv(self.attention_norm(x))
        heads = tuple(y.reshape(-1, H, D) for y in unfuse(qkv, (E, E, E), self.compute.shards))
        y, cache = attend(
            ragged_paged_attention, self.compute.mesh, heads, (), cache, batch,
            scale=self.attention_scale, backend=self.compute.attention_backend,
        )  # fmt: skip
        return self.out.onto(y.reshape(-1, E), x), cache

    def feed_forward(self, stream: Stream, num_tokens: jax.Array, following: Norm | None = None) -> Stream:
        x = settled(*stream)
        return self.down.onto(ACTIVATIONS[self.config.activation](self.up(self.mlp_norm(x))), x)


class GPT2(llama.Llama):
    """The decoder: Llama's around other layers, with positions that are embedded."""

    def setup(self) -> None:
        c = self.config
        self.embed = Embedding(c.vocab_size, c.hidden_size, self.compute)
        self.position = Embedding(c.max_position_embeddings, c.hidden_size, self.compute)
        scale = c.attention_scale or c.head_dim**-0.5
        scales = [scale / (i + 1 if c.scale_by_layer else 1) for i in range(c.num_layers)]
        self.layers = [DecoderLayer(c, scale, self.compute) for scale in scales]
        self.norm = LayerNorm(c.rms_norm_eps, self.compute.dtype)
        if not c.tie_word_embeddings:
            self.head = Linear(c.vocab_size, self.compute, out_dtype=jnp.float32)

    def embedded(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        return self.embed(tokens) + self.position(positions)

    def rotary(self, positions: jax.Array) -> list[None]:
        return [None] * self.config.num_layers

    def normed(self, stream: Stream) -> jax.Array:
        return self.norm(settled(*stream))


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
