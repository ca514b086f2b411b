"""Reads the fields of a ModelConfig that most families have in common; each family's file adds its own."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from models.config import Activation, RopeScaling

Fields = dict[str, Any]  # keywords of ModelConfig
ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
WINDOWED = {"full_attention": False, "sliding_attention": True}


def decoder_fields(
    config: Mapping[str, Any],
    *,
    activation_key: str = "hidden_act",
    partial_rotary: bool = False,
    quantizations: Collection[str] = (),
) -> Fields:
    """Of a config.json that names things as Llama's does, with its defaults: all but biases, norms and windows.

    Args:
      activation_key: what config.json calls the feed-forward's activation.
      partial_rotary: whether the family can turn a part of each head alone.
      quantizations: methods that the family can read.

    Raises:
      ValueError: a value is missing or not supported, or the weights are quantized otherwise.
    """
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method", "unknown")
        if method not in quantizations:
            raise ValueError(f"checkpoint is quantized ({method}); only float checkpoints and GGUF files are supported")
    num_heads = required(config, "num_attention_heads")
    head_dim = config.get("head_dim") or default_head_dim(config)
    parameters = rope_parameters(config)
    theta, scaling = rope(parameters, config)
    part = parameters.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    if part != 1 and not partial_rotary:
        raise ValueError(f"config.json sets partial_rotary_factor to {part}; this architecture supports 1.0 only")
    return {
        "vocab_size": required(config, "vocab_size"),
        "hidden_size": required(config, "hidden_size"),
        "intermediate_size": required(config, "intermediate_size"),
        "num_layers": required(config, "num_hidden_layers"),
        "num_heads": num_heads,
        "num_kv_heads": config.get("num_key_value_heads") or num_heads,
        "head_dim": head_dim,
        "rotary_dim": int(head_dim * part) if part != 1 else None,
        "max_position_embeddings": _context(required(config, "max_position_embeddings"), scaling),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "rms_norm_eps": config["rms_norm_eps"],
        "activation": _activation(config, activation_key),
        "tie_word_embeddings": bool(config["tie_word_embeddings"]),
        "bos_token_id": config.get("bos_token_id"),
        "eos_token_ids": token_ids(config.get("eos_token_id")),
    }


def _context(context: int, scaling: RopeScaling | None) -> int:
    """YaRN extends it, LongRoPE's short factors have their own (`ModelConfig.for_context`)."""
    if scaling is not None and scaling.kind == "yarn":
        return max(context, int(scaling.original_context * scaling.factor))
    if scaling is not None and scaling.kind == "factors":
        return min(context, scaling.original_context)
    return context


def _activation(config: Mapping[str, Any], name: str) -> Activation:
    value = config[name]
    if value not in ACTIVATIONS:
        raise ValueError(f"config.json sets {name} to {value!r}; supported are: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[value]


def token_ids(value: int | Sequence[int] | None) -> tuple[int, ...]:
    """eos_token_id is one id, a list of them or null."""
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)


def required(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"config.json must set {name} to a whole number, not {value!r}")
    return value


def refuse_unless(architecture: str, config: Mapping[str, Any], **supported: Any) -> None:
    """Raises ValueError if config.json sets one of these names to something other than what is supported."""
    for name, value in supported.items():
        if config.get(name, value) != value:
            raise ValueError(f"config.json sets {name} to {config[name]!r}; {architecture} supports {value!r} only")


def default_head_dim(config: Mapping[str, Any]) -> int:
    hidden_size, num_heads = required(config, "hidden_size"), required(config, "num_attention_heads")
    if hidden_size % num_heads:
        raise ValueError(
            f"config.json has no head_dim and hidden_size {hidden_size} is not a multiple of {num_heads} heads"
        )
    return hidden_size // num_heads


def layer_windows(window: int | None, layer_types: Sequence[str]) -> tuple[int | None, ...]:
    """One window a layer, from config.json's sliding_window and layer_types."""
    unknown = sorted(set(layer_types) - set(WINDOWED))
    if unknown:
        raise ValueError(f"layer types {', '.join(unknown)} are not supported; supported are: {', '.join(WINDOWED)}")
    if window is None and "sliding_attention" in layer_types:
        raise ValueError("config.json has sliding_attention in layer_types, but no sliding_window that is switched on")
    return tuple(window if WINDOWED[kind] else None for kind in layer_types)


def same_windows(architecture: str, config: Mapping[str, Any], window: int | None) -> tuple[int | None, ...]:
    """The same in each layer; raises ValueError if layer_types says otherwise."""
    kind = "full_attention" if window is None else "sliding_attention"
    if set(config.get("layer_types") or [kind]) != {kind}:
        raise ValueError(f"config.json sets layer_types to others than {kind}, which {architecture} has in every layer")
    return (window,) * required(config, "num_hidden_layers")


def rope_parameters(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """As transformers 4 (rope_scaling) or 5 (rope_parameters) calls them."""
    return config.get("rope_scaling") or config.get("rope_parameters") or {}


def rope(parameters: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """theta and scaling, from `rope_parameters`; `config` has what older files keep beside them.

    "dynamic" scaling begins past max_position_embeddings, which is as far as a model is served.
    """
    if any(isinstance(value, Mapping) for value in parameters.values()):
        raise ValueError("rope parameters that differ by layer type are not supported")
    theta = float(parameters.get("rope_theta") or config["rope_theta"])
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind in ("default", "dynamic"):
        return theta, None
    original = (
        config.get("original_max_position_embeddings")
        or parameters.get("original_max_position_embeddings")
        or required(config, "max_position_embeddings")
    )
    if kind == "longrope":
        return theta, _longrope(parameters, original, required(config, "max_position_embeddings"))
    if kind not in ("linear", "llama3", "yarn"):
        raise ValueError(
            f"rope type {kind!r} is not supported; supported are: default, linear, dynamic, llama3, yarn, longrope"
        )
    factor = _rope_value(parameters, kind, "factor")
    if kind == "linear":
        return theta, RopeScaling(kind="linear", factor=factor)
    if kind == "llama3":
        return theta, RopeScaling(
            kind="llama3",
            factor=factor,
            original_context=original,
            low_freq_factor=_rope_value(parameters, kind, "low_freq_factor"),
            high_freq_factor=_rope_value(parameters, kind, "high_freq_factor"),
        )
    return theta, RopeScaling(
        kind="yarn",
        factor=factor,
        original_context=original,
        beta_fast=parameters.get("beta_fast") or 32.0,
        beta_slow=parameters.get("beta_slow") or 1.0,
        attention_factor=parameters.get("attention_factor") or _yarn_attention_factor(parameters, factor),
        truncate=parameters.get("truncate", True),
    )


def _longrope(parameters: Mapping[str, Any], original: int, context: int) -> RopeScaling:
    """LongRoPE (arXiv 2402.13753) in the context that its short factors are for."""
    if not (parameters.get("short_factor") and parameters.get("long_factor")):
        raise ValueError("rope type 'longrope' needs short_factor and long_factor in config.json")
    factor = parameters.get("factor") or context / original
    return RopeScaling(
        kind="factors",
        factors=tuple(parameters["short_factor"]),
        long_factors=tuple(parameters["long_factor"]) if context > original else (),
        long_context=context,
        original_context=original,
        attention_factor=parameters.get("attention_factor")
        or math.sqrt(1 + math.log(max(factor, 1)) / math.log(original)),
    )


def _yarn_attention_factor(parameters: Mapping[str, Any], factor: float) -> float | None:
    """DeepSeek's, of two scales; None is the paper's, of `factor` alone."""
    scale, scale_all = parameters.get("mscale"), parameters.get("mscale_all_dim")
    return yarn_magnitude(factor, scale) / yarn_magnitude(factor, scale_all) if scale and scale_all else None


def yarn_magnitude(factor: float, scale: float = 1.0) -> float:
    """What queries and keys are multiplied by when the context is stretched by `factor` (arXiv 2309.00071, 3.4)."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1


def _rope_value(parameters: Mapping[str, Any], kind: str, name: str) -> float:
    if parameters.get(name) is None:
        raise ValueError(f"rope type {kind!r} needs {name} in config.json")
    return float(parameters[name])


def gguf_decoder_fields(header: Mapping[str, Any], tensor_names: Collection[str]) -> Fields:
    """Of a GGUF header: all but biases, norms and windows.

    Raises:
      ValueError: a value is missing, or its rope scaling is not supported.
    """
    name = header["general.architecture"]

    def value(key: str, default: Any = None) -> Any:
        found = header.get(f"{name}.{key}", default)
        if found is None:
            raise ValueError(f"GGUF header has no {name}.{key}")
        return found

    num_heads, hidden_size = value("attention.head_count"), value("embedding_length")
    eos = [header.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")]
    return {
        "vocab_size": header.get(f"{name}.vocab_size") or len(header.get("tokenizer.ggml.tokens", ())),
        "hidden_size": hidden_size,
        "intermediate_size": value("feed_forward_length"),
        "num_layers": value("block_count"),
        "num_heads": num_heads,
        "num_kv_heads": value("attention.head_count_kv", num_heads),
        "head_dim": value("attention.key_length", hidden_size // num_heads),
        "max_position_embeddings": value("context_length"),
        "rope_theta": value("rope.freq_base", 10_000.0),
        "rope_scaling": _gguf_rope_scaling(name, header),
        "rms_norm_eps": value("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in tensor_names,
        "bos_token_id": header.get("tokenizer.ggml.bos_token_id"),
        "eos_token_ids": tuple(dict.fromkeys(token for token in eos if token is not None)),
    }


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
