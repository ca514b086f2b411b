"""The hot operations: arrays in, arrays out. One public function each, implementations chosen by name."""

from kernels_pallas.attention import (
    AttentionBatch,
    QKNorm,
    UnsupportedShapeError,
    attention_backend,
    cache_shape,
    latent_cache_shape,
    qkv_attention,
    ragged_paged_attention,
)
from kernels_pallas.grouped_matmul import grouped_matmul
from kernels_pallas.quantize import is_quantized, quantize, vector_bytes
from kernels_pallas.rotary import apply_rotary, rms_norm

__all__ = [
    "AttentionBatch",
    "QKNorm",
    "UnsupportedShapeError",
    "apply_rotary",
    "attention_backend",
    "cache_shape",
    "grouped_matmul",
    "is_quantized",
    "latent_cache_shape",
    "qkv_attention",
    "quantize",
    "ragged_paged_attention",
    "rms_norm",
    "vector_bytes",
]
