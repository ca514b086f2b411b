"""The hot operations: arrays in, arrays out. One public function each, implementations chosen by name."""

from kernels_pallas.attention import (
    AttentionBatch,
    QKNorm,
    UnsupportedShapeError,
    attention_backend,
    cache_shape,
    latent_cache_shape,
    lowering,
    new_arrivals,
    qkv_attention,
    ragged_paged_attention,
)
from kernels_pallas.grouped_matmul import grouped_matmul
from kernels_pallas.head import best_tokens
from kernels_pallas.linear import (
    ACTIVATIONS,
    Norm,
    Normed,
    add_linear,
    add_rms_norm,
    array_of,
    gated_linear,
    linear,
    linear_parts,
    rms_norm,
)
from kernels_pallas.quantize import is_quantized, quantize, vector_bytes
from kernels_pallas.rotary import apply_rotary, sum_parts

__all__ = [
    "ACTIVATIONS",
    "AttentionBatch",
    "Norm",
    "Normed",
    "QKNorm",
    "UnsupportedShapeError",
    "add_linear",
    "add_rms_norm",
    "apply_rotary",
    "array_of",
    "attention_backend",
    "best_tokens",
    "cache_shape",
    "gated_linear",
    "grouped_matmul",
    "is_quantized",
    "latent_cache_shape",
    "linear",
    "linear_parts",
    "lowering",
    "new_arrivals",
    "qkv_attention",
    "quantize",
    "ragged_paged_attention",
    "rms_norm",
    "sum_parts",
    "vector_bytes",
]
