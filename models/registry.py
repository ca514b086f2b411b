"""From a configuration to the module that implements it, and what that is made of."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from kernels_pallas import AttentionBatch
from kernels_pallas import attention_backend as resolve_backend
from models.config import FAMILIES, ModelConfig, family_file
from models.layers import Compute, Dtype
from models.parts import Part, Path, TensorSource
from models.renamed_tensors import RenamedTensors
from models.sharding import Placement, check_divides, placement, sharded

Params = dict[str, Any]
HEAD = "lm_head.weight"


def build_model(
    config: ModelConfig,
    *,
    dtype: Dtype,
    attention_backend: str = "auto",
    mesh: Mesh | None = None,
    deterministic: bool = False,
) -> nn.Module:
    """The Flax module of `config`, in `dtype` float32 or bfloat16, split over `mesh` (of models.sharding.make_mesh).

    Raises:
      ValueError: there is no such attention backend, the dtype is another one, the mesh does not divide the model, or
        it cannot be deterministic.
    """
    dtype = jnp.dtype(dtype)
    if dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"dtype must be float32 or bfloat16, not {dtype}")
    module = getattr(family_file(config.architecture), FAMILIES[config.architecture].split(":")[1])
    compute = Compute(dtype, resolve_backend(attention_backend), mesh, deterministic)
    check_divides(config, compute.shards)
    if deterministic:
        check_deterministic(config, compute)
    return module(config, compute)


def check_deterministic(config: ModelConfig, compute: Compute) -> None:
    """Raises ValueError, naming what there are no kernels for whose results are the same in every step."""
    obstacles = {
        "a Hopper GPU and its attention kernels (mosaic_gpu)": compute.attention_backend != "mosaic_gpu",
        "dtype bfloat16": compute.dtype != jnp.bfloat16,
        "tensor_parallel_size 1": compute.shards > 1,
        "a model without sparse experts": config.experts is not None,
        "a model without latent attention": config.latent is not None,
        "a model with RMS norms": config.architecture == "GPT2LMHeadModel",
    }
    if missing := [words for words, is_missing in obstacles.items() if is_missing]:
        raise ValueError(f"deterministic needs {', '.join(missing)}")


def tensor_parts(config: ModelConfig) -> dict[Path, tuple[Part, ...]]:
    """Parameter path -> the checkpoint's tensors it is made of, joined along axis 0."""
    return family_file(config.architecture).tensor_parts(config)


def canonical_source(source: TensorSource, config: ModelConfig) -> TensorSource:
    """`source` with the names and layouts that `tensor_parts` speaks of.

    Beside what is a family's own: a model that was saved without its head lacks the prefix "model.", and one that ties
    its head to its embedding may have either of the two.
    """
    file = family_file(config.architecture)
    if hasattr(file, "canonical_source"):
        source = file.canonical_source(source, config)
    stored_as = {name: name for name in source.names}
    if "embed_tokens.weight" in stored_as:
        stored_as = {name if name == HEAD else f"model.{name}": name for name in stored_as}
    if config.tie_word_embeddings and HEAD in stored_as:
        stored_as.setdefault(embedding_name(config), stored_as[HEAD])
    return RenamedTensors(source, stored_as)


def embedding_name(config: ModelConfig) -> str:
    """Of the checkpoint's tensor."""
    return tensor_parts(config)["embed", "embedding"][0].name


def param_shapes(model: nn.Module) -> Params:
    """The pytree of jax.ShapeDtypeStruct that `model.apply` takes as its parameters, with their places on the
    model's mesh. Nothing is computed."""
    one = jax.ShapeDtypeStruct((1,), jnp.int32)
    two = jax.ShapeDtypeStruct((2,), jnp.int32)
    table = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    batch = AttentionBatch(kv_lens=one, block_tables=table, cu_q_lens=two, num_seqs=two, decode_only=True)  # type: ignore[arg-type]
    caches = model.cache_shapes(2, 16, model.compute.dtype)
    shapes = flatten_dict(jax.eval_shape(model.init, jax.random.key(0), one, one, caches, batch)["params"])
    placed = {path: sharded(x, model.compute.mesh, where_is(path, x, model).spec) for path, x in shapes.items()}
    return {"params": unflatten_dict(placed)}


def head_params(params: Params) -> Params:
    """Of a model's parameters, those of its output head: what its method `logits` takes."""
    name = "head" if "head" in params["params"] else "embed"
    return {"params": {name: params["params"][name]}}


def where_is(path: Path, leaf: Any, model: nn.Module) -> Placement:
    """Of a parameter of the model, or its shape."""
    return placement(path, leaf.shape, model.config, model.compute.shards)
