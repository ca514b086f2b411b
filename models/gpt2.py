"""GPT-2: learned positions, LayerNorm and a plain GELU. Letters: T tokens, E hidden width, H heads, D head size, V
vocabulary, R rows."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from kernels_pallas import AttentionBatch, ragged_paged_attention
from models import llama
from models.config import ModelConfig
from models.config_fields import Fields, decoder_fields, refuse_unless, required
from models.layers import Compute, Embedding, LayerNorm, Linear
from models.parts import Part, Path, TensorSource
from models.sharding import attend, unfuse

Cache = Any
PREFIX = "transformer."
RENAMED = {"n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
           "n_positions": "max_position_embeddings", "layer_norm_epsilon": "rms_norm_eps"}  # fmt: skip
LINEARS = {("qkv",): "attn.c_attn", ("out",): "attn.c_proj", ("up",): "mlp.c_fc", ("down",): "mlp.c_proj"}
NORMS = {("attention_norm",): "ln_1", ("mlp_norm",): "ln_2"}


class DecoderLayer(nn.Module):
    config: ModelConfig
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
            scale=D**-0.5, backend=self.compute.attention_backend,
        )  # fmt: skip
        x = x + Linear(E, self.compute, use_bias=True, name="out")(y.reshape(-1, E))
        y = LayerNorm(c.rms_norm_eps, self.compute.dtype, name="mlp_norm")(x)
        y = nn.gelu(Linear(c.intermediate_size, self.compute, use_bias=True, name="up")(y), approximate=True)
        return x + Linear(E, self.compute, use_bias=True, name="down")(y), cache


class GPT2(llama.Llama):
    """The decoder: Llama's around other layers, with positions that are embedded."""

    def setup(self) -> None:
        c = self.config
        self.embed = Embedding(c.vocab_size, c.hidden_size, self.compute)
        self.position = Embedding(c.max_position_embeddings, c.hidden_size, self.compute)
        layer = nn.jit(DecoderLayer)
        self.layers = [layer(c, self.compute) for _ in range(c.num_layers)]
        self.norm = LayerNorm(c.rms_norm_eps, self.compute.dtype)

    def __call__(
        self, tokens: jax.Array, positions: jax.Array, caches: tuple[Cache, ...], batch: AttentionBatch
    ) -> tuple[jax.Array, tuple[Cache, ...]]:
        """int32[T] tokens and positions -> hidden states [T, E] after the final norm, and the caches."""
        x = self.embed(tokens) + self.position(positions)
        written = []
        for layer, cache in zip(self.layers, caches, strict=True):
            x, cache = layer(x, cache, batch)
            written.append(cache)
        return self.norm(x), tuple(written)


def hf_fields(architecture: str, config: Mapping[str, Any]) -> Fields:
    """ModelConfig's fields from config.json. Raises ValueError for what is not supported."""
    refuse_unless(
        architecture,
        config,
        activation_function="gelu_new",
        scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False,
        add_cross_attention=False,
        tie_word_embeddings=True,
    )
    config = {RENAMED.get(name, name): value for name, value in config.items()}
    inner = config.get("n_inner") or 4 * required(config, "hidden_size")
    return decoder_fields({"rms_norm_eps": 1e-5, **config, "intermediate_size": inner, "tie_word_embeddings": True})


def tensor_parts(config: ModelConfig) -> dict[Path, tuple[Part, ...]]:
    """For each parameter's path, the tensors of `canonical_source` that it is made of."""
    parts: dict[Path, tuple[Part, ...]] = {
        ("embed", "embedding"): (Part("wte.weight"),),
        ("position", "embedding"): (Part("wpe.weight"),),
        ("norm", "scale"): (Part("ln_f.weight"),),
        ("norm", "bias"): (Part("ln_f.bias"),),
    }
    for layer in range(config.num_layers):
        for leaf, named in (("kernel", LINEARS), ("scale", NORMS)):
            for path, name in named.items():
                parts[(f"layers_{layer}", *path, leaf)] = (Part(f"h.{layer}.{name}.weight"),)
                parts[(f"layers_{layer}", *path, "bias")] = (Part(f"h.{layer}.{name}.bias"),)
    return parts


def canonical_source(source: TensorSource, config: ModelConfig) -> TensorSource:
    return GPT2Tensors(source)


class GPT2Tensors:
    """GPT-2's tensors: named with or without "transformer.", beside masks that nobody needs, and the weights of linear
    layers transposed to [in, out]."""

    def __init__(self, source: TensorSource):
        self._source = source
        masks = (".attn.bias", ".attn.masked_bias")
        self._stored_as = {name.removeprefix(PREFIX): name for name in source.names if not name.endswith(masks)}

    @property
    def names(self) -> list[str]:
        return list(self._stored_as)

    def read(self, name: str, out: np.ndarray | None = None) -> np.ndarray:
        tensor = self._source.read(self._stored_as[name])
        is_linear = name.endswith(tuple(f"{linear}.weight" for linear in LINEARS.values()))
        return tensor.T if is_linear else tensor
