"""The Llama family of decoders: Llama 2 and 3, SmolLM2, Mistral, Qwen 2 and 3 (dense).

What differs between them (biases, q/k norm, sliding windows, rotary scaling, tied head) is in ModelConfig. Letters: T
tokens, E hidden width, H query heads, K key/value heads, D head size, V vocabulary, R rows to sample from.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels_pallas import (
    AttentionBatch,
    Norm,
    Normed,
    QKNorm,
    array_of,
    best_tokens,
    cache_shape,
    new_arrivals,
    qkv_attention,
)
from models.config import ModelConfig
from models.config_fields import (
    Fields,
    decoder_fields,
    gguf_decoder_fields,
    layer_windows,
    refuse_unless,
    required,
    same_windows,
)
from models.layers import (
    AddNorm,
    Compute,
    Dtype,
    Embedding,
    GatedLinear,
    Layer,
    Linear,
    NormScale,
    Stream,
    begin_stream,
    lowered_once,
    rotary_tables,
)
from models.parts import Part, Path
from models.sharding import attend

Cache = Any
Rotary = tuple[jax.Array, jax.Array]


class Attention(nn.Module):
    norm_offset: ClassVar[float] = 0.0  # added to the weights of q/k norm

    config: ModelConfig
    window: int | None
    compute: Compute

    @nn.compact
    def __call__(
        self,
        x: jax.Array | Normed,
        rotary: Rotary,
        cache: Cache,
        batch: AttentionBatch,
        total: jax.Array | None = None,
        norm: Norm | None = None,
    ) -> tuple[Stream, Cache]:
        """x [T, E] -> the stream in which the result follows `total` [T, E] and comes before `norm`, and the cache."""
        c = self.config
        H, K, D = c.num_heads, self.compute.kv_heads(c), c.head_dim
        parts = Linear((H + 2 * K) * D, self.compute, use_bias=c.qkv_bias, name="qkv").parts(x)
        parts = parts.reshape(*parts.shape[:2], H + 2 * K, D)
        norms = sinks = None
        if c.qk_norm:
            q_norm, k_norm = (NormScale(D, self.compute.dtype, name=name)() for name in ("q_norm", "k_norm"))
            norms = QKNorm(q_norm, k_norm, c.rms_norm_eps, self.norm_offset)
        if c.attention_sinks:
            sinks = self.param("sinks", nn.initializers.zeros, (H,), self.compute.dtype).astype(jnp.float32)
        out, cache = attend(
            qkv_attention, self.compute.mesh, (parts,), (rotary, norms), cache, batch,
            num_heads=H // self.compute.shards, dtype=self.compute.dtype,
            scale=c.attention_scale or D**-0.5, window=self.window, soft_cap=c.attention_soft_cap, sinks=sinks,
            backend=self.compute.attention_backend,
        )  # fmt: skip
        out = out.reshape(-1, H * D)
        return Linear(c.hidden_size, self.compute, use_bias=c.out_bias, name="out").onto(out, total, norm), cache


class FeedForward(nn.Module):
    """A gated linear unit (arXiv 2002.05202): SwiGLU, or with another activation."""

    config: ModelConfig
    compute: Compute

    @nn.compact
    def __call__(self, x: jax.Array | Normed, total: jax.Array | None = None, norm: Norm | None = None) -> Stream:
        """x [T, E] -> the stream in which the result follows `total` [T, E] and comes before `norm`."""
        c, F = self.config, self.config.intermediate_size
        y = GatedLinear(F, c.activation, self.compute, use_bias=c.mlp_bias, name="gate_up")(x)
        return Linear(c.hidden_size, self.compute, use_bias=c.mlp_bias, name="down").onto(y, total, norm)


class DecoderLayer(Layer):
    feed_forward_type: ClassVar[type[nn.Module]] = FeedForward

    config: ModelConfig
    window: int | None
    compute: Compute

    def setup(self) -> None:
        c = self.config
        self.attention_norm = AddNorm(c.hidden_size, c.rms_norm_eps, self.compute)
        self.attention = Attention(c, self.window, self.compute)
        self.mlp_norm = AddNorm(c.hidden_size, c.rms_norm_eps, self.compute)
        self.mlp = self.feed_forward_type(c, self.compute)

    def attend(self, stream: Stream, rotary: Rotary, cache: Cache, batch: AttentionBatch) -> tuple[Stream, Cache]:
        x, y = self.attention_norm(*stream)
        return self.attention(y, rotary, cache, batch, x, self.mlp_norm.norm)

    def feed_forward(self, stream: Stream, num_tokens: jax.Array, following: Norm | None = None) -> Stream:
        x, y = self.mlp_norm(*stream)
        return self.mlp(y, x, following)


class Llama(nn.Module):
    """The decoder. Used purely: `model.apply(params, tokens, positions, caches, batch)`.

    Only few tokens of a prompt are sampled from, and what follows the last layer's attention is of each token alone, so
    this can be had in two: `to_last_attention` for all tokens, `from_last_attention` for those that it is wanted of.
    """

    decoder_layer: ClassVar[type[Layer]] = DecoderLayer
    norm_offset: ClassVar[float] = 0.0  # added to the weights of the last norm

    config: ModelConfig
    compute: Compute

    def setup(self) -> None:
        c = self.config
        self.embed = Embedding(c.vocab_size, c.hidden_size, self.compute)
        self.layers = self.decoder_layers()
        self.norm: Any = AddNorm(c.hidden_size, c.rms_norm_eps, self.compute, self.norm_offset)
        if not c.tie_word_embeddings:
            self.head = Linear(c.vocab_size, self.compute, out_dtype=jnp.float32)

    def decoder_layers(self) -> list[nn.Module]:
        return [self.decoder_layer(self.config, window, self.compute) for window in self.config.sliding_windows]

    def __call__(
        self, tokens: jax.Array, positions: jax.Array, caches: tuple[Cache, ...], batch: AttentionBatch
    ) -> tuple[jax.Array, tuple[Cache, ...]]:
        """Runs one step.

        Args:
          tokens, positions: int32[T], flat over the batch's sequences.
          caches: one layer's cache each, of `cache_shapes`; the step's keys and values are written to them.

        Returns:
          hidden states [T, E] after the final norm, and the caches.
        """
        stream, caches = self.to_last_attention(tokens, positions, caches, batch)
        hidden = self.from_last_attention(stream, batch.num_tokens)
        if self.is_initializing():
            self.logits(hidden)
        return hidden, caches

    def to_last_attention(
        self, tokens: jax.Array, positions: jax.Array, caches: tuple[Cache, ...], batch: AttentionBatch
    ) -> tuple[Stream, tuple[Cache, ...]]:
        """The first part of a step, up to the last layer's feed-forward: arguments as of a call; the stream [T, E] and
        the caches."""
        stream, written = begin_stream(self.embedded(tokens, positions)), []
        *before, (last, rotary, cache) = zip(self.layers, self.rotary(positions), caches, strict=True)
        for (layer, *inputs), following in zip(before, self._following_norms(), strict=False):
            stream, new = lowered_once(layer, "attend", stream, *inputs, batch)
            stream = lowered_once(layer, "feed_forward", stream, batch.num_tokens, *following)
            written.append(new)
        stream, new = lowered_once(last, "attend", stream, rotary, cache, batch)
        return stream, (*written, new)

    def from_last_attention(self, stream: Stream, num_tokens: jax.Array) -> jax.Array:
        """The second part, for the stream of some tokens [R, E], of which those from num_tokens on are padding: hidden
        states [R, E] after the final norm."""
        stream = lowered_once(self.layers[-1], "feed_forward", stream, num_tokens, *self._following_norms()[-1])
        return self.normed(stream)

    def embedded(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        """int32[T] each -> [T, E], what the layers begin with."""
        return self.embed(tokens)

    def rotary(self, positions: jax.Array) -> Sequence[Any]:
        """What each layer's attention gets of int32[T]."""
        return [rotary_tables(positions, self.config)] * self.config.num_layers

    def normed(self, stream: Stream) -> jax.Array:
        """The last norm."""
        return array_of(self.norm(*stream)[1])

    def _following_norms(self) -> Sequence[tuple[Norm, ...]]:
        """For each layer the norm that follows it, if they are of those that can make it."""
        if self.is_initializing() or not all(isinstance(layer, DecoderLayer) for layer in self.layers):
            return [()] * len(self.layers)
        scales = [layer.variables["params"]["attention_norm"]["scale"] for layer in self.layers[1:]]
        return [(Norm(scale, self.config.rms_norm_eps, 0.0),) for scale in scales] + [(self.norm.norm,)]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[R, E] -> float32[R, V]."""
        return self.embed.logits(hidden) if self.config.tie_word_embeddings else self.head(hidden)

    def best_tokens(self, hidden: jax.Array, *drawn: jax.Array) -> jax.Array | None:
        """`kernels_pallas.best_tokens` for hidden [R, E]: int32[R], or None where only `logits` will do. drawn: keys
        and temperature."""
        if self.config.logits_soft_cap is not None:
            return None
        tied = self.config.tie_word_embeddings
        kernel = self.embed.embedding if tied else self.head.get_variable("params", "kernel")
        return best_tokens(hidden, kernel, *drawn, **self.compute.kernels)

    def new_arrivals(self, num_seqs: int) -> jax.Ref | None:
        """`kernels_pallas.new_arrivals` for a step; over several devices kernels make their own."""
        heads, backend = self.compute.kv_heads(self.config), self.compute.attention_backend
        return new_arrivals(num_seqs, heads, backend=backend) if self.compute.shards == 1 else None

    def cache_shapes(self, num_blocks: int, block_size: int, dtype: Dtype) -> tuple[Cache, ...]:
        """One pytree of jax.ShapeDtypeStruct a layer."""
        c, heads = self.config, self.compute.kv_heads(self.config)
        shape = cache_shape(num_blocks, block_size, heads, c.head_dim, dtype, backend=self.compute.attention_backend)
        return (shape,) * c.num_layers


def hf_fields(architecture: str, config: Mapping[str, Any]) -> Fields:
    """ModelConfig's fields from config.json. Raises ValueError for what is not supported."""
    is_llama, is_qwen2 = architecture == "LlamaForCausalLM", architecture == "Qwen2ForCausalLM"
    if not is_llama:
        refuse_unless(architecture, config, mlp_bias=False)
    if architecture == "MistralForCausalLM":
        refuse_unless(architecture, config, attention_bias=False)
    attention_bias = bool(config["attention_bias"])
    return decoder_fields(config) | {
        "qkv_bias": is_qwen2 or attention_bias,
        "out_bias": attention_bias and not is_qwen2,
        "mlp_bias": is_llama and bool(config["mlp_bias"]),
        "qk_norm": architecture == "Qwen3ForCausalLM",
        "sliding_windows": _sliding_windows(architecture, config),
    }


def _sliding_windows(architecture: str, config: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Llama has none, Mistral one in every layer, Qwen, if switched on, past max_window_layers or by layer_types."""
    if architecture not in ("Qwen2ForCausalLM", "Qwen3ForCausalLM"):
        window = config["sliding_window"] if architecture == "MistralForCausalLM" else None
        return same_windows(architecture, config, window)
    window = config["sliding_window"] if config["use_sliding_window"] else None
    first = required(config, "num_hidden_layers") if window is None else config["max_window_layers"]
    layer_types = config.get("layer_types") or [
        "sliding_attention" if layer >= first else "full_attention" for layer in range(config["num_hidden_layers"])
    ]
    return layer_windows(window, layer_types)


def gguf_fields(header: Mapping[str, Any], tensor_names: Collection[str]) -> Fields:
    """ModelConfig's fields from a GGUF header and the file's tensors."""
    return gguf_decoder_fields(header, tensor_names) | {
        "qkv_bias": "blk.0.attn_q.bias" in tensor_names,
        "out_bias": "blk.0.attn_output.bias" in tensor_names,
        "qk_norm": "blk.0.attn_q_norm.weight" in tensor_names,
    }


def tensor_parts(config: ModelConfig) -> dict[Path, tuple[Part, ...]]:
    """For each parameter's path, the checkpoint's tensors (Hugging Face names) it is made of, joined along axis 0."""
    parts: dict[Path, tuple[Part, ...]] = {
        ("embed", "embedding"): (Part("model.embed_tokens.weight"),),
        ("norm", "scale"): (Part("model.norm.weight"),),
    }
    if not config.tie_word_embeddings:
        parts["head", "kernel"] = (Part("lm_head.weight"),)
    for layer in range(config.num_layers):
        for path, tensors in _layer_tensor_parts(config).items():
            parts[(f"layers_{layer}", *path)] = tuple(Part(f"model.layers.{layer}.{t.name}", t.rows) for t in tensors)
    return parts


def _layer_tensor_parts(config: ModelConfig) -> dict[Path, tuple[Part, ...]]:
    query_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim

    def qkv(kind: str) -> tuple[Part, ...]:
        rows = {"q": query_rows, "k": kv_rows, "v": kv_rows}
        return tuple(Part(f"self_attn.{name}_proj.{kind}", n) for name, n in rows.items())

    parts: dict[Path, tuple[Part, ...]] = {
        ("attention_norm", "scale"): (Part("input_layernorm.weight"),),
        ("attention", "qkv", "kernel"): qkv("weight"),
        ("attention", "out", "kernel"): (Part("self_attn.o_proj.weight"),),
        ("mlp_norm", "scale"): (Part("post_attention_layernorm.weight"),),
        ("mlp", "gate_up", "kernel"): tuple(
            Part(f"mlp.{name}_proj.weight", config.intermediate_size) for name in ("gate", "up")
        ),
        ("mlp", "down", "kernel"): (Part("mlp.down_proj.weight"),),
    }
    if config.mlp_bias:
        parts["mlp", "gate_up", "bias"] = tuple(
            Part(f"mlp.{name}_proj.bias", config.intermediate_size) for name in ("gate", "up")
        )
        parts["mlp", "down", "bias"] = (Part("mlp.down_proj.bias"),)
    if config.qkv_bias:
        parts["attention", "qkv", "bias"] = qkv("bias")
    if config.out_bias:
        parts["attention", "out", "bias"] = (Part("self_attn.o_proj.bias"),)
    if config.qk_norm:
        parts["attention", "q_norm", "scale"] = (Part("self_attn.q_norm.weight"),)
        parts["attention", "k_norm", "scale"] = (Part("self_attn.k_norm.weight"),)
    return parts
