"""What a checkpoint's architecture is, in one frozen dataclass, read from a config.json or a GGUF header."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

RopeKind = Literal["linear", "llama3", "yarn", "factors"]


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How the rotary frequencies are stretched beyond the context the model was first trained on.

    Attributes:
      kind: "linear" (all frequencies / factor), "llama3" (low ones only, smoothly), "yarn" (arXiv 2309.00071),
        or "factors" (each frequency has its own divisor, as GGUF files store Llama 3's scaling).
      factor: by how much the context is stretched.
      original_context: tokens of the first training's context (llama3, yarn).
      low_freq_factor, high_freq_factor: llama3's band between stretched and kept wavelengths.
      beta_fast, beta_slow, attention_factor, truncate: yarn's band, in rotations, what cos and sin are multiplied
        by, and whether the band ends on whole dimensions.
      factors: one divisor a frequency (factors).
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

    def __post_init__(self) -> None:
        if self.factor <= 0:
            raise ValueError(f"rope scaling factor must be positive, not {self.factor}")
        if self.kind in ("llama3", "yarn") and self.original_context <= 0:
            raise ValueError(f"rope type {self.kind!r} needs original_max_position_embeddings in config.json")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a decoder. Hashable, so that it can be a static argument of compiled functions.

    Attributes:
      architecture: as config.json names it, such as "LlamaForCausalLM"; chooses the module (models.registry).
      head_dim: width of one attention head; need not be hidden_size / num_heads.
      max_position_embeddings: the context length in tokens.
      sliding_windows: one entry a layer: a token sees itself and the window - 1 tokens before it; None sees all.
      qkv_bias, out_bias: whether the attention's input and output projections have a bias.
      qk_norm: whether queries and keys are normalised by head before the rotary embedding (Qwen3).
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
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    sliding_windows: tuple[int | None, ...] = ()
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
        if self.head_dim % 2:
            raise ValueError(f"model config: head_dim must be even for rotary embeddings, not {self.head_dim}")
        if len(self.sliding_windows) != self.num_layers:
            raise ValueError(
                f"model config: {len(self.sliding_windows)} sliding windows for {self.num_layers} layers; need one each"
            )
        if any(w is not None and w < 1 for w in self.sliding_windows):
            raise ValueError(f"model config: sliding windows must be at least 1, not {self.sliding_windows}")
        if self.rope_scaling and self.rope_scaling.factors and len(self.rope_scaling.factors) != self.head_dim // 2:
            raise ValueError(
                f"rope scaling has {len(self.rope_scaling.factors)} factors for {self.head_dim // 2} frequencies"
            )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "ModelConfig":
        """Reads a config.json, as transformers 4 (rope_theta, rope_scaling) or 5 (rope_parameters) writes it.

        Raises:
          ValueError: the architecture, or something that it is set to, is not supported, or a value is missing.
        """
        architecture = _architecture(config)
        if quantization := config.get("quantization_config"):
            method = quantization.get("quant_method", "unknown")
            raise ValueError(f"checkpoint is quantized ({method}); only float checkpoints and GGUF files are supported")
        for name, supported in (("hidden_act", "silu"), ("mlp_bias", False), ("partial_rotary_factor", 1.0)):
            if config.get(name, supported) != supported:
                raise ValueError(
                    f"config.json sets {name} to {config[name]!r}; {architecture} supports {supported!r} only"
                )
        num_heads = _required(config, "num_attention_heads")
        rope_theta, rope_scaling = _rope(config)
        context = config.get("max_position_embeddings", 2048)
        if rope_scaling is not None and rope_scaling.kind == "yarn":
            context = max(context, int(rope_scaling.original_context * rope_scaling.factor))
        is_qwen2 = architecture == "Qwen2ForCausalLM"
        attention_bias = bool(config.get("attention_bias", False))
        return cls(
            architecture=architecture,
            vocab_size=_required(config, "vocab_size"),
            hidden_size=_required(config, "hidden_size"),
            intermediate_size=_required(config, "intermediate_size"),
            num_layers=_required(config, "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=config.get("num_key_value_heads") or num_heads,
            head_dim=config.get("head_dim") or _default_head_dim(architecture, config),
            max_position_embeddings=context,
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=is_qwen2 or attention_bias,
            out_bias=attention_bias and not is_qwen2,
            qk_norm=architecture == "Qwen3ForCausalLM",
            sliding_windows=_sliding_windows(architecture, config),
            bos_token_id=config.get("bos_token_id"),
            eos_token_ids=token_ids(config.get("eos_token_id")),
        )

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

        def value(key: str, default: Any = None) -> Any:
            found = header.get(f"{name}.{key}", default)
            if found is None:
                raise ValueError(f"GGUF header has no {name}.{key}")
            return found

        num_heads, hidden_size = value("attention.head_count"), value("embedding_length")
        num_kv_heads = value("attention.head_count_kv", num_heads)
        vocab_size = header.get(f"{name}.vocab_size") or len(header.get("tokenizer.ggml.tokens", ()))
        tensors = set(tensor_names)
        eos = [header.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")]
        return cls(
            architecture=GGUF_ARCHITECTURES[name],
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=value("feed_forward_length"),
            num_layers=value("block_count"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=value("attention.key_length", hidden_size // num_heads),
            max_position_embeddings=value("context_length"),
            rope_theta=value("rope.freq_base", 10_000.0),
            rope_scaling=_gguf_rope_scaling(name, header),
            rms_norm_eps=value("attention.layer_norm_rms_epsilon"),
            tie_word_embeddings="output.weight" not in tensors,
            qkv_bias="blk.0.attn_q.bias" in tensors,
            out_bias="blk.0.attn_output.bias" in tensors,
            qk_norm="blk.0.attn_q_norm.weight" in tensors,
            bos_token_id=header.get("tokenizer.ggml.bos_token_id"),
            eos_token_ids=tuple(dict.fromkeys(token for token in eos if token is not None)),
        )


SUPPORTED_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
GGUF_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


def token_ids(value: int | Sequence[int] | None) -> tuple[int, ...]:
    """eos_token_id is one id, a list of them or null."""
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures") or []
    for name in names:
        if name in SUPPORTED_ARCHITECTURES:
            return name
    found = ", ".join(names) or f"none (model_type {config.get('model_type')!r})"
    raise ValueError(f"architecture {found} is not supported; supported are: {', '.join(SUPPORTED_ARCHITECTURES)}")


def _required(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"config.json must set {name} to a whole number, not {value!r}")
    return value


def _default_head_dim(architecture: str, config: Mapping[str, Any]) -> int:
    if architecture == "Qwen3ForCausalLM":
        return 128
    hidden_size, num_heads = _required(config, "hidden_size"), _required(config, "num_attention_heads")
    if hidden_size % num_heads:
        raise ValueError(
            f"config.json has no head_dim and hidden_size {hidden_size} is not a multiple of {num_heads} heads"
        )
    return hidden_size // num_heads


def _rope(config: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(parameters.get("rope_theta") or config.get("rope_theta") or 10_000.0)
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind == "default":
        if any(isinstance(value, Mapping) for value in parameters.values()):
            raise ValueError("rope parameters that differ by layer type are not supported")
        return theta, None
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("partial_rotary_factor other than 1.0 is not supported")
    original = parameters.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    if kind == "linear":
        return theta, RopeScaling(kind="linear", factor=_rope_value(parameters, kind, "factor"))
    if kind == "llama3":
        return theta, RopeScaling(
            kind="llama3",
            factor=_rope_value(parameters, kind, "factor"),
            original_context=original or 0,
            low_freq_factor=_rope_value(parameters, kind, "low_freq_factor"),
            high_freq_factor=_rope_value(parameters, kind, "high_freq_factor"),
        )
    if kind == "yarn" and not (parameters.get("mscale") or parameters.get("mscale_all_dim")):
        return theta, RopeScaling(
            kind="yarn",
            factor=_rope_value(parameters, kind, "factor"),
            original_context=original or config.get("max_position_embeddings", 0),
            beta_fast=parameters.get("beta_fast") or 32.0,
            beta_slow=parameters.get("beta_slow") or 1.0,
            attention_factor=parameters.get("attention_factor"),
            truncate=parameters.get("truncate", True),
        )
    raise ValueError(
        f"rope type {kind!r} is not supported; supported are: default, linear, llama3, yarn without mscale"
    )


def _rope_value(parameters: Mapping[str, Any], kind: str, name: str) -> float:
    if parameters.get(name) is None:
        raise ValueError(f"rope type {kind!r} needs {name} in config.json")
    return float(parameters[name])


def _gguf_rope_scaling(name: str, header: Mapping[str, Any]) -> RopeScaling | None:
    """Llama 3's scaling is not here but in the tensor rope_freqs.weight; the reader adds it."""
    kind = header.get(f"{name}.rope.scaling.type", "none")
    factor = header.get(f"{name}.rope.scaling.factor", 1.0)
    if kind == "none":
        return None
    if kind == "linear":
        return RopeScaling(kind="linear", factor=factor)
    if kind == "yarn":
        original = header.get(f"{name}.rope.scaling.original_context_length", 0)
        return RopeScaling(kind="yarn", factor=factor, original_context=original)
    raise ValueError(f"GGUF rope scaling {kind!r} is not supported; supported are: none, linear, yarn")


def _sliding_windows(architecture: str, config: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Mistral slides in every layer, Qwen, if switched on, past max_window_layers; layer_types overrides both."""
    num_layers = _required(config, "num_hidden_layers")
    window = config.get("sliding_window")
    is_qwen = architecture in ("Qwen2ForCausalLM", "Qwen3ForCausalLM")
    slides = architecture == "MistralForCausalLM" or (is_qwen and config.get("use_sliding_window", False))
    if window is None or not slides:
        return (None,) * num_layers
    if layer_types := config.get("layer_types"):
        unknown = set(layer_types) - {"full_attention", "sliding_attention"}
        if unknown:
            raise ValueError(f"layer types {', '.join(sorted(unknown))} are not supported")
        return tuple(window if kind == "sliding_attention" else None for kind in layer_types)
    first = config.get("max_window_layers", 28) if is_qwen else 0
    return tuple(window if layer >= first else None for layer in range(num_layers))
