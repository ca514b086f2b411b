"""What a checkpoint's architecture is, in one frozen dataclass, read from a config.json or a GGUF header."""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, Literal

from models.config_defaults import DEFAULTS
from models.experts_config import ExpertsConfig
from models.latent_config import LatentConfig

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
RopeKind = Literal["linear", "llama3", "yarn", "factors"]

# Architecture -> "file:module" under models/. Beside the Flax module the file has `hf_fields(architecture, config)`,
# for which models.config_defaults fills up `config`, and `tensor_parts(config)`; if its models come as GGUF,
# `gguf_fields(header, tensor_names)`; if its checkpoints come in several layouts, `canonical_source(source, config)`.
FAMILIES = {
    "LlamaForCausalLM": "llama:Llama",
    "MistralForCausalLM": "llama:Llama",
    "Qwen2ForCausalLM": "llama:Llama",
    "Qwen3ForCausalLM": "llama:Llama",
    "MixtralForCausalLM": "mixtral:Mixtral",
    "Qwen3MoeForCausalLM": "mixtral:Mixtral",
    "GptOssForCausalLM": "gpt_oss:Mixtral",
    "DeepseekV2ForCausalLM": "deepseek:DeepSeek",
    "DeepseekV3ForCausalLM": "deepseek:DeepSeek",
    "Gemma2ForCausalLM": "gemma:Gemma",
    "Gemma3ForCausalLM": "gemma:Gemma",
    "Gemma3ForConditionalGeneration": "gemma:Gemma",
    "Olmo2ForCausalLM": "olmo:Olmo2",
    "Phi3ForCausalLM": "phi:Llama",
    "GPT2LMHeadModel": "gpt2:GPT2",
}
GGUF_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
}


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How the rotary frequencies are stretched beyond the context the model was first trained on.

    Attributes:
      kind: "linear" (all frequencies / factor), "llama3" (low ones only, smoothly), "yarn" (arXiv 2309.00071),
        or "factors" (each frequency has its own divisor, as LongRoPE has, and GGUF files for Llama 3's scaling).
      factor: by how much the context is stretched.
      original_context: tokens of the first training's context (llama3, yarn, LongRoPE).
      low_freq_factor, high_freq_factor: llama3's band between stretched and kept wavelengths.
      beta_fast, beta_slow, truncate: yarn's band, in rotations, and whether it ends on whole dimensions.
      attention_factor: what cos and sin are multiplied by (yarn, factors).
      factors: one divisor a frequency (factors).
      long_factors: LongRoPE's others, for texts beyond original_context, and long_context, how far those reach.
    """

    kind: RopeKind
    factor: float = 1.0
    original_context: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True
    factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    long_context: int = 0

    def __post_init__(self) -> None:
        if self.factor <= 0:
            raise ValueError(f"rope scaling factor must be positive, not {self.factor}")
        if self.kind in ("llama3", "yarn") and self.original_context <= 0:
            raise ValueError(f"rope type {self.kind!r} needs original_max_position_embeddings in config.json")
        if self.long_factors and len(self.long_factors) != len(self.factors):
            raise ValueError(
                f"rope scaling has {len(self.long_factors)} long factors and {len(self.factors)} short ones"
            )
        if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"rope type 'llama3' needs a high_freq_factor above its low_freq_factor of {self.low_freq_factor}, not "
                f"{self.high_freq_factor}"
            )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a decoder. Hashable, so that it can be a static argument of compiled functions.

    Attributes:
      architecture: as config.json names it, such as "LlamaForCausalLM"; chooses the module (FAMILIES).
      head_dim: width of one attention head; need not be hidden_size / num_heads.
      rotary_dim: how much of a head, from its start, the rotary embedding turns; None: all of it.
      max_position_embeddings: the context length in tokens.
      sliding_windows: one entry a layer: a token sees itself and the window - 1 tokens before it; None sees all.
      qkv_bias, out_bias: whether the attention's input and output projections have a bias.
      mlp_bias: whether all projections of dense feed-forwards have one.
      activation: of the gate of a feed-forward, or of a feed-forward without gate; "gelu_tanh" approximates "gelu".
      qk_norm: whether queries and keys are normalised by head before the rotary embedding (Qwen3).
      local_rope_theta: the rotary base of layers with a window, which then have no rope_scaling; None: as the others.
      attention_scale: what scores are multiplied by; None: 1 / sqrt(head_dim).
      scale_by_layer: scores are also divided by the number of the layer, counted from 1 (GPT-2).
      attention_soft_cap, logits_soft_cap: x becomes cap * tanh(x / cap), for scores and for logits.
      attention_sinks: whether each head has a learned logit in the softmax's denominator (gpt-oss).
      experts: of the sparse layers; None: all feed-forward layers are dense.
      latent: of multi-head latent attention, whose one KV head of head_dim is what the cache keeps; None: no.
      eos_token_ids: tokens that end a generation; generation_config.json may add to them.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rotary_dim: int | None = None
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    activation: Activation = "silu"
    qk_norm: bool = False
    sliding_windows: tuple[int | None, ...] = ()
    local_rope_theta: float | None = None
    attention_scale: float | None = None
    scale_by_layer: bool = False
    attention_soft_cap: float | None = None
    logits_soft_cap: float | None = None
    attention_sinks: bool = False
    experts: ExpertsConfig | None = None
    latent: LatentConfig | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.sliding_windows:
            object.__setattr__(self, "sliding_windows", (None,) * self.num_layers)
        for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim",
            "max_position_embeddings",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"model config: {name} must be at least 1, not {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model config: {self.num_heads} query heads do not share {self.num_kv_heads} KV heads evenly"
            )
        rotary_dim = self.rotary_dim or self.head_dim
        if rotary_dim % 2 or rotary_dim > self.head_dim:
            raise ValueError(f"model config: rotary embeddings of {rotary_dim} dimensions need an even number of them")
        if len(self.sliding_windows) != self.num_layers:
            raise ValueError(
                f"model config: {len(self.sliding_windows)} sliding windows for {self.num_layers} layers; need one each"
            )
        if any(w is not None and w < 1 for w in self.sliding_windows):
            raise ValueError(f"model config: sliding windows must be at least 1, not {self.sliding_windows}")
        if self.experts is not None and len(self.experts.layers) != self.num_layers:
            raise ValueError(
                f"model config: {len(self.experts.layers)} marks of sparse layers for {self.num_layers} layers"
            )
        factors = self.rope_scaling.factors if self.rope_scaling else ()
        if factors and len(factors) != rotary_dim // 2:
            raise ValueError(f"rope scaling has {len(factors)} factors for {rotary_dim // 2} frequencies")

    def for_context(self, tokens: int) -> "ModelConfig":
        """Of the same model in a context of so many tokens: with LongRoPE's long factors if the short ones do not reach
        that far. They then apply to all sequences, as in vLLM; in transformers, to those that are that long."""
        scaling = self.rope_scaling
        if tokens <= self.max_position_embeddings or scaling is None or not scaling.long_factors:
            return self
        long = replace(scaling, factors=scaling.long_factors, long_factors=(), original_context=scaling.long_context)
        return replace(self, rope_scaling=long, max_position_embeddings=scaling.long_context)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "ModelConfig":
        """Reads a config.json, as transformers 4 (rope_theta, rope_scaling) or 5 (rope_parameters) writes it.

        Raises:
          ValueError: the architecture, or something that it is set to, is not supported, or a value is missing.
        """
        architecture = _architecture(config)
        config = {**DEFAULTS[architecture], **_text_config(architecture, config)}
        return cls(architecture=architecture, **family_file(architecture).hf_fields(architecture, config))

    @classmethod
    def from_gguf(cls, header: Mapping[str, Any], tensor_names: Sequence[str]) -> "ModelConfig":
        """Reads a GGUF file's header (`models.gguf_reader`); what it lacks is told by which tensors there are.

        Raises:
          ValueError: the architecture, or its rope scaling, is not supported, or a value is missing.
        """
        name = header.get("general.architecture")
        if name not in GGUF_ARCHITECTURES:
            supported = ", ".join(GGUF_ARCHITECTURES)
            raise ValueError(f"GGUF architecture {name!r} is not supported; supported are: {supported}")
        architecture = GGUF_ARCHITECTURES[name]
        return cls(architecture=architecture, **family_file(architecture).gguf_fields(header, set(tensor_names)))


def family_file(architecture: str) -> ModuleType:
    """The file of models/ that implements `architecture`, a key of FAMILIES."""
    return importlib.import_module(f"models.{FAMILIES[architecture].split(':')[0]}")


def _text_config(architecture: str, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of the text model, which a multimodal model's config.json has inside, but for these."""
    if not architecture.endswith("ForConditionalGeneration"):
        return config
    beside = ("bos_token_id", "eos_token_id", "quantization_config", "tie_word_embeddings")
    return {**(config.get("text_config") or {}), **{name: config[name] for name in beside if name in config}}


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures") or []
    for name in names:
        if name in FAMILIES:
            return name
    found = ", ".join(names) or f"none (model_type {config.get('model_type')!r})"
    code = (config.get("auto_map") or {}).get("AutoModelForCausalLM")
    own_code = f" (it brings its own code, {code}, which is never run)" if code else ""
    raise ValueError(f"architecture {found} is not supported{own_code}; supported are: {', '.join(FAMILIES)}")
