"""Ragged paged attention: the contract, and the choice of implementation.

Shape letters: T tokens in the step, S sequences, B blocks in the pool, N tokens in a block, P blocks in a
sequence's table, H query heads, K key/value heads, G = H / K, D head size.
"""

import importlib
import logging
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.quantize import is_quantized
from kernels_pallas.rotary import Tables, apply_rotary, rms_norm, sum_parts

log = logging.getLogger(__name__)

Cache = Any  # one layer's keys and values: a pytree whose layout is the implementation's own business
_IMPLEMENTATIONS = {
    "reference": "kernels_pallas.reference",
    "mosaic_gpu": "kernels_pallas.gpu.attention",
    "mosaic_tpu": "kernels_pallas.tpu.attention",
}


class UnsupportedShapeError(ValueError):
    """An implementation cannot serve a cache or batch of this shape; its words tell the user what to change."""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["kv_lens", "block_tables", "cu_q_lens", "num_seqs", "arrivals"],
    meta_fields=["decode_only", "deterministic"],
)
@dataclass(frozen=True)
class AttentionBatch:
    """Which tokens of the step belong to which sequence, and where their keys and values live.

    Attributes:
      kv_lens: int32[S], tokens of each sequence in the cache once this step's are written; 0 for padding.
      block_tables: int32[S, P], block ids; entries past a sequence's length are 0 (the padding block).
      cu_q_lens: int32[S + 1], where each sequence's tokens start in T; sequence s has the last
        cu_q_lens[s+1] - cu_q_lens[s] positions of its kv_lens[s].
      num_seqs: int32[2]: single-token sequences at the front of the batch, and sequences in all.
      decode_only: static; every sequence has exactly one token and T == S.
      deterministic: static; a token's result is the same to the bit in whatever batch and chunk it is computed. There
        are kernels for that on Hopper alone.
      arrivals: of new_arrivals, for the layers of one step; None: kernels that need some make their own.
    """

    kv_lens: jax.Array
    block_tables: jax.Array
    cu_q_lens: jax.Array
    num_seqs: jax.Array
    decode_only: bool = False
    deterministic: bool = False
    arrivals: jax.Ref | None = None

    @property
    def num_tokens(self) -> jax.Array:
        """int32[], of the step; the T rows behind them are padding."""
        return self.cu_q_lens[self.num_seqs[1]]


@partial(jax.tree_util.register_dataclass, data_fields=["q", "k"], meta_fields=["epsilon", "offset"])
@dataclass(frozen=True)
class QKNorm:
    """RMS norms of each head's queries and keys: weights [D] each, to which `offset` is added."""

    q: jax.Array
    k: jax.Array
    epsilon: float
    offset: float = 0.0


def attention_backend(name: str = "auto") -> str:
    """Resolves "auto" to the implementation for the default device, by capability; checks any other name."""
    if name == "auto":
        return _fastest(jax.devices()[0])
    if name not in _IMPLEMENTATIONS:
        raise ValueError(f"attention backend {name!r} is not one of: auto, {', '.join(_IMPLEMENTATIONS)}")
    return name


def _fastest(device: jax.Device) -> str:
    if device.platform == "tpu":
        return _fastest_on_tpu(device.device_kind)
    if device.platform != "gpu":
        return "reference"
    capability = str(getattr(device, "compute_capability", "unknown"))
    if capability.split(".")[0] == "9":
        return "mosaic_gpu"
    log.warning(
        "%s has compute capability %s and the attention kernels need Hopper's (9.0): attention runs through plain XLA",
        device.device_kind,
        capability,
    )
    return "reference"


def _fastest_on_tpu(device_kind: str) -> str:
    if device_kind.startswith(("TPU v2", "TPU v3", "TPU v4")):
        log.warning("%s has too little vector memory for the attention kernel: attention runs through XLA", device_kind)
        return "reference"
    return "mosaic_tpu"


def _implementation(backend: str) -> ModuleType:
    return importlib.import_module(_IMPLEMENTATIONS[backend])


def lowering(backend: str) -> AbstractContextManager[None]:
    """What many programs with kernels of `backend` are lowered within."""
    if backend != "mosaic_gpu":
        return nullcontext()
    from kernels_pallas.gpu.ptxas import asked_once

    return asked_once()


def new_arrivals(num_seqs: int, num_kv_heads: int, *, backend: str) -> jax.Ref | None:
    """What the kernels of a step's layers count in, if those of `backend` do: int32[S, K] of zeros."""
    return jax.new_ref(jnp.zeros((num_seqs, num_kv_heads), jnp.int32)) if backend == "mosaic_gpu" else None


def cache_shape(num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int, dtype, *, backend: str) -> Cache:
    """The pytree of jax.ShapeDtypeStruct that one layer's cache has under `backend`. Axis 1 of each array is the
    KV heads, so that devices can have some of them each. With a dtype of int8 or float8_e4m3fn, scales are part of it
    (`quantize`)."""
    return _implementation(backend).cache_shape(num_blocks, block_size, num_kv_heads, head_dim, dtype)


def latent_cache_shape(num_blocks: int, block_size: int, head_dim: int, dtype) -> Cache:
    """As `cache_shape`, of the one head whose keys are its values too (multi-head latent attention): each is kept
    once, as the reference has it, for no backend has a kernel for it yet."""
    if is_quantized(dtype):
        raise UnsupportedShapeError(
            "latent attention has no eight-bit cache: its latent vectors are keys and values in one; "
            "set kv_cache_dtype to auto"
        )
    keys, _ = _implementation("reference").cache_shape(num_blocks, block_size, 1, head_dim, dtype)
    return (keys,)


def ragged_paged_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array | None,
    cache: Cache,
    batch: AttentionBatch,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    backend: str,
) -> tuple[jax.Array, Cache]:
    """Writes the step's keys and values into the cache and attends, causally, over everything cached.

    Args:
      q: [T, H, D]. k, v: [T, K, D], of the tokens of this step. Rows past the last sequence are padding.
        v None: the keys are the values too.
      cache: this layer's cache, of `cache_shape`, or of `latent_cache_shape` where v is None; donated by the step,
        updated in place.
      scale: multiplies the scores.
      window: a token sees itself and the window - 1 tokens before it; None sees all.
      soft_cap: scores become soft_cap * tanh(scores / soft_cap) (Gemma 2, arXiv 2408.00118).
      sinks: float32[H], a learned logit that takes part in the softmax's denominator alone (gpt-oss).

    In an eight-bit cache the step's own tokens are read as they are stored, too.

    Returns:
      [T, H, D] in q's dtype, zeros in padding rows, and the cache.
    """
    if v is None and backend != "reference":
        log.warning("No attention kernel for keys that are the values too: attention runs through plain XLA")
        backend = "reference"
    return _implementation(backend).ragged_paged_attention(
        q, k, v, cache, batch, scale=scale, window=window, soft_cap=soft_cap, sinks=sinks
    )


def qkv_attention(
    parts: jax.Array,
    rotary: Tables,
    norms: QKNorm | None,
    cache: Cache,
    batch: AttentionBatch,
    *,
    num_heads: int,
    dtype: Any,
    backend: str,
    **options: Any,
) -> tuple[jax.Array, Cache]:
    """From a fused projection to attention: q/k norm, rotary embedding and `ragged_paged_attention`.

    Args:
      parts: [any, T, H + 2K, D], what the projection is the sum of (`linear_parts`): the heads of queries, keys and
        values.
      rotary: cos and sin, float32[T, 1, R / 2] with R <= D.
      norms: of queries and keys, before the rotary embedding; None: there are none.
      dtype: of queries, keys and values, to which the sum is rounded, and of the result.
      options: as of ragged_paged_attention.
    """
    implementation = _implementation(backend)
    if hasattr(implementation, "qkv_attention"):
        options |= {"num_heads": num_heads, "dtype": jnp.dtype(dtype)}
        return implementation.qkv_attention(parts, rotary, norms, cache, batch, **options)
    q, k, v = rotated_qkv(sum_parts(parts, dtype), rotary, norms, num_heads)
    return ragged_paged_attention(q, k, v, cache, batch, backend=backend, **options)


def rotated_qkv(qkv: jax.Array, rotary: Tables, norms: QKNorm | None, num_heads: int) -> list[jax.Array]:
    """[T, H + 2K, D] -> q [T, H, D], k and v [T, K, D]."""
    num_kv_heads = (qkv.shape[1] - num_heads) // 2
    q, k, v = jnp.split(qkv, [num_heads, num_heads + num_kv_heads], axis=1)
    if norms is not None:
        q, k = (rms_norm(x, w, norms.epsilon, norms.offset) for x, w in ((q, norms.q), (k, norms.k)))
    return [apply_rotary(q, rotary), apply_rotary(k, rotary), v]
