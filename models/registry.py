"""From a configuration to the module that implements it, and what that is made of."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels_pallas import AttentionBatch
from kernels_pallas import attention_backend as resolve_backend
from models.config import FAMILIES, ModelConfig, family_file
from models.layers import Compute, Dtype
from models.parts import Part, Path, TensorSource

Params = dict[str, Any]


def build_model(config: ModelConfig, *, dtype: Dtype, attention_backend: str = "auto") -> nn.Module:
    """The Flax module of `config`, in `dtype` float32 or bfloat16.

    Raises:
      ValueError: there is no such attention backend, or the dtype is another one.
    """
    dtype = jnp.dtype(dtype)
    if dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"dtype must be float32 or bfloat16, not {dtype}")
    module = getattr(family_file(config.architecture), FAMILIES[config.architecture].split(":")[1])
    return module(config, Compute(dtype, resolve_backend(attention_backend)))


def tensor_parts(config: ModelConfig) -> dict[Path, tuple[Part, ...]]:
    """Parameter path -> the checkpoint's tensors it is made of, joined along axis 0."""
    return family_file(config.architecture).tensor_parts(config)


def canonical_source(source: TensorSource, config: ModelConfig) -> TensorSource:
    """`source` with the names and layouts that `tensor_parts` speaks of, where a family's checkpoints have several."""
    file = family_file(config.architecture)
    return file.canonical_source(source, config) if hasattr(file, "canonical_source") else source


def param_shapes(model: nn.Module) -> Params:
    """The pytree of jax.ShapeDtypeStruct that `model.apply` takes as its parameters. Nothing is computed."""
    one = jax.ShapeDtypeStruct((1,), jnp.int32)
    two = jax.ShapeDtypeStruct((2,), jnp.int32)
    table = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    batch = AttentionBatch(kv_lens=one, block_tables=table, cu_q_lens=two, num_seqs=two, decode_only=True)  # type: ignore[arg-type]
    caches = model.cache_shapes(2, 16, model.compute.dtype)
    return jax.eval_shape(model.init, jax.random.key(0), one, one, caches, batch)
