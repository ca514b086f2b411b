"""Fills a model's parameters: from a checkpoint's tensors, or at random, one at a time, straight to its devices."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax
from jax.sharding import Mesh, NamedSharding
from tqdm import tqdm

from models.layers import Dtype
from models.orbax_checkpoint import OrbaxSource
from models.parts import Part, Path, TensorSource
from models.raw_arrays import aligned_empty
from models.registry import HEAD, Params, canonical_source, param_shapes, tensor_parts, where_is
from models.sharding import Placement, in_device_order, place

IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)  # old Llama checkpoints store what is computed from config.json


def load_params(model: nn.Module, source: TensorSource, dtype: Dtype, *, progress: bool = True) -> Params:
    """Reads every parameter of `model` from `source`, cast to `dtype` or what the model needs beyond it.

    One parameter is read while the one before is sent to the device: host memory peaks at two, and the largest part of
    a fused one.

    Raises:
      ValueError: a tensor is missing, unreadable, of another shape than the model's, or has no place in the model.
    """
    shapes = flatten_dict(param_shapes(model)["params"])
    places = {path: where_is(path, shape, model) for path, shape in shapes.items()}
    stored = {path: places[path].stored(shape.shape) for path, shape in shapes.items()}
    parts, source = checked_parts(model, source)

    def assemble(path: Path) -> np.ndarray:
        return _assemble(source, parts[path], stored[path], jnp.promote_types(dtype, shapes[path].dtype))

    leaves = {}
    total = sum(map(math.prod, stored.values())) * jnp.dtype(dtype).itemsize
    with tqdm(total=total, desc="Loading weights", unit="B", unit_scale=True, disable=not progress) as bar:
        for path, host in zip(shapes, _one_ahead(assemble, shapes), strict=True):
            leaves[path] = jax.block_until_ready(place(host, places[path], model.compute.mesh))
            bar.update(host.nbytes)
    return {"params": unflatten_dict(leaves)}


def checked_parts(model: nn.Module, source: TensorSource) -> tuple[dict[Path, tuple[Part, ...]], TensorSource]:
    """What each parameter is made of, and the source that has it under these names; nothing is read.

    Raises:
      ValueError: a tensor is missing, or has no place in the model.
    """
    if isinstance(source, OrbaxSource):
        paths = flatten_dict(param_shapes(model)["params"])
        parts: dict[Path, tuple[Part, ...]] = {path: (Part(".".join(path)),) for path in paths}
    else:
        parts, source = tensor_parts(model.config), canonical_source(source, model.config)
    _check_names({p.name for ps in parts.values() for p in ps}, source, tied=model.config.tie_word_embeddings)
    return parts, source


def random_params(model: nn.Module, dtype: Dtype, seed: int = 0) -> Params:
    """Random parameters, made on the device and scaled so that activations keep their variance."""
    shapes = flatten_dict(param_shapes(model)["params"])
    key = jax.random.key(seed)
    leaves = {
        path: _placed_random(
            jax.random.fold_in(key, i),
            path[-1],
            shape.shape,
            jnp.promote_types(dtype, shape.dtype),
            where_is(path, shape, model),
            model.compute.mesh,
        )
        for i, (path, shape) in enumerate(shapes.items())
    }
    return {"params": unflatten_dict(leaves)}


@partial(jax.jit, static_argnums=(1, 2, 3, 4, 5))
def _placed_random(key, name: str, shape, dtype: Dtype, where: Placement, mesh: Mesh | None) -> jax.Array:
    leaf = _random(key, name, where.stored(shape), dtype)
    if mesh is None:
        return leaf
    leaf = in_device_order(leaf, where, mesh.shape["tensor"])
    return lax.with_sharding_constraint(leaf, NamedSharding(mesh, where.spec))


def _random(key: jax.Array, name: str, shape: tuple[int, ...], dtype: Dtype) -> jax.Array:
    if name == "scale":
        return jnp.ones(shape, dtype)
    if name == "bias":
        return jnp.zeros(shape, dtype)
    limit = math.sqrt(3 / shape[-1])  # of a uniform distribution with variance 1 / fan-in
    return jax.random.uniform(key, shape, dtype, -limit, limit)


def _assemble(source: TensorSource, parts: tuple[Part, ...], shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """The tensors of `parts`, cast to `dtype` and joined along axis 0 into `shape`; along its first two axes, taken as
    one, where they are a stack of fused parameters."""
    joined = aligned_empty(shape, dtype)
    rows = [part.rows or shape[0] for part in parts]
    joined_axes = 1 if sum(rows) == shape[0] else 2
    flat = joined.reshape(-1, *shape[joined_axes:])
    start = 0
    for part, count in zip(parts, rows, strict=True):
        target = flat[start : start + count]
        tensor = source.read(part.name, target)
        needed = (count, *shape[joined_axes:])
        if tensor.shape != needed:
            raise ValueError(f"tensor {part.name} has shape {list(tensor.shape)}, but the model needs {list(needed)}")
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            raise ValueError(f"tensor {part.name} is stored as {tensor.dtype}, not as floating-point numbers")
        if len(parts) == 1 and tensor.dtype == dtype and tensor.flags.c_contiguous:
            return tensor.reshape(shape)
        if tensor is not target:
            target[...] = tensor
        start += count
    return joined


def _one_ahead[T, R](make: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """make(item) of each item, the next one under way in a thread while the caller is busy with the last."""
    with ThreadPoolExecutor(1) as thread:
        ahead: deque = deque()
        for item in items:
            ahead.append(thread.submit(make, item))
            if len(ahead) > 1:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def _check_names(needed: set[str], source: TensorSource, *, tied: bool) -> None:
    missing = sorted(needed - set(source.names))
    if missing:
        raise ValueError(f"the checkpoint lacks {len(missing)} tensors that the model needs, such as {missing[0]}")
    unused = sorted(
        name
        for name in set(source.names) - needed
        if not name.endswith(IGNORED_SUFFIXES) and not (tied and name == HEAD)
    )
    if unused:
        raise ValueError(
            f"the checkpoint has {len(unused)} tensors that its config does not mention, such as {unused[0]}"
        )
