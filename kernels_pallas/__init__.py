"""The hot operations: arrays in, arrays out. One public function each, implementations chosen by name."""

from kernels_pallas.attention import (
    AttentionBatch,
    attention_backend,
    cache_shape,
    ragged_paged_attention,
)
from kernels_pallas.grouped_matmul import grouped_matmul

__all__ = ["AttentionBatch", "attention_backend", "cache_shape", "grouped_matmul", "ragged_paged_attention"]
