"""Compiles kernels for an H100, on any machine: python -m tests.kernels.gpu.compile_for_h100 '{...}'"""

import json
import re
import sys
from functools import partial

import jax
import jax.numpy as jnp

from kernels_pallas import (
    ACTIVATIONS,
    AttentionBatch,
    QKNorm,
    add_rms_norm,
    best_tokens,
    cache_shape,
    grouped_matmul,
    qkv_attention,
    ragged_paged_attention,
)
from tests.kernels.gpu.h100 import compile_for, h100


def array(shape, dtype=jnp.int32):
    return jax.ShapeDtypeStruct(shape, dtype)


def compile_step(
    H, K, D, N, *, T, S, P=33, dtype="bfloat16", cache_dtype=None, sinks=False, decode_only=False, fused=0,
    norms=False, **options,
):  # fmt: skip
    """Attention as a layer calls it; `fused`: from so many parts of the projection, with or without norms of queries
    and keys."""
    batch = AttentionBatch(array((S,)), array((S, P)), array((S + 1,)), array((2,)), decode_only=decode_only)
    cache = cache_shape(100, N, K, D, cache_dtype or dtype, backend="mosaic_gpu")
    sinks = array((H,), jnp.float32) if sinks else None
    options |= {"scale": D**-0.5, "backend": "mosaic_gpu"}
    if fused:
        table = array((T, 1, D // 2), jnp.float32)
        weights = QKNorm(*[array((D,), dtype)] * 2, epsilon=1e-6) if norms else None
        parts = array((fused, T, H + 2 * K, D), jnp.float32 if fused > 1 else dtype)
        inputs = parts, (table, table), weights
        function = partial(qkv_attention, num_heads=H, dtype=dtype, **options)
    else:
        inputs = tuple(array((T, heads, D), dtype) for heads in (H, K, K))
        function = partial(ragged_paged_attention, **options)

    def step(inputs, cache, batch, sinks):
        return function(*inputs, cache, batch, sinks=sinks)

    with h100() as sharding:
        return compile_for(sharding, step, inputs, cache, batch, sinks, donate=1)


def compile_experts(X, M, F, C, dtype="bfloat16", activation=None):
    """X experts' matrices [F, C] and M rows sorted by expert."""
    function = partial(grouped_matmul, backend="mosaic_gpu", activation=activation and ACTIVATIONS[activation])
    with h100() as sharding:
        return compile_for(sharding, function, array((M, C), dtype), array((X, F, C), dtype), array((X,)))


def compile_add_norm(M, E, parts, dtype="bfloat16"):
    """M rows of E, to which so many parts are added."""
    function = partial(add_rms_norm, epsilon=1e-6, backend="mosaic_gpu")
    added = array((parts, M, E), jnp.float32 if parts > 1 else dtype)
    with h100() as sharding:
        return compile_for(sharding, function, array((M, E), dtype), added, array((E,), dtype))


def compile_head(M, V, C, dtype="bfloat16", greedy=False):
    """A token for each of M rows from V logits."""
    drawn = () if greedy else (array((M, 2), jnp.uint32), array((M,), jnp.float32))
    function = partial(best_tokens, backend="mosaic_gpu")
    with h100() as sharding:
        return compile_for(sharding, function, array((M, C), dtype), array((V, C), dtype), *drawn)


if __name__ == "__main__":
    case = json.loads(sys.argv[1])
    by_key = {"X": compile_experts, "V": compile_head, "parts": compile_add_norm}
    compile_case = next((f for key, f in by_key.items() if key in case), compile_step)
    compiled = compile_case(**case)
    names = re.findall(r'target="mosaic_gpu.*?op_name="[^"]*/(\w+)/\w+"', compiled.as_text())
    print(json.dumps({"kernels": sorted(set(names)), "temporary": compiled.memory_analysis().temp_size_in_bytes}))
