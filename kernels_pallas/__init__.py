"""The hot operations: arrays in, arrays out. One public function each, implementations chosen by name."""

from kernels_pallas.attention import (
    AttentionBatch,
    attention_backend,
    cache_shape,
    ragged_paged_attention,
)

__all__ = ["AttentionBatch", "attention_backend", "cache_shape", "ragged_paged_attention"]
