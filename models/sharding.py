"""How a model lies on several devices: one mesh, and for each parameter where it goes.

The mesh has the axes ("data", "tensor"). Over "tensor", heads, inner width and vocabulary are split as in Megatron
(arXiv 1909.08053): projections into them by output (qkv, gate_up, up), projections out of them by input (out, down),
whose partial sums the compiler adds, the embedding and the head by vocabulary, caches by KV head. Norms, routers and
the biases of projections out of them are everywhere. Nothing is split over "data" yet.

A fused kernel is one matrix of several joined parts (q, k and v), and each device must get its piece of every part. So
in an array split n ways the rows stand in the devices' order: device 0's of q, of k, of v, then device 1's. Where n is
1 that is the checkpoint's own order.

Where there are more devices than KV heads, each device has one head, and as many neighbours as it takes have the same
one: the model on the devices has n KV heads, of which a checkpoint holds each once (`Compute.kv_heads`).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kernels_pallas import AttentionBatch
from models.config import ModelConfig
from models.parts import Path

AXES = ("data", "tensor")
HEADS = CACHE = PartitionSpec(None, "tensor")  # of [T, heads, D], and of every array of a cache
BY_OUTPUT, BY_INPUT, BY_VOCABULARY = ("qkv", "gate_up", "up"), ("out", "down"), ("embed", "head")


def make_mesh(tensor_parallel_size: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Raises ValueError if there are fewer `devices` (default: all of the default backend) than asked for."""
    devices = jax.devices() if devices is None else devices
    if tensor_parallel_size > len(devices):
        raise ValueError(
            f"tensor_parallel_size {tensor_parallel_size} needs as many devices, and there are {len(devices)}"
        )
    return Mesh(np.array(devices[:tensor_parallel_size]).reshape(1, -1), AXES)


def check_divides(config: ModelConfig, shards: int) -> None:
    """Raises ValueError, naming what cannot be split evenly."""
    if shards > 1 and config.latent is not None:
        raise ValueError(f"tensor_parallel_size must be 1, not {shards}: latent attention is not split over devices")
    reasons = _indivisible(config, shards)
    if reasons:
        fits = [n for n in range(2, shards) if not _indivisible(config, n)]
        instead = f"; what does: {', '.join(map(str, fits))}" if fits else ""
        raise ValueError(f"tensor_parallel_size {shards} {reasons[0]}{instead}")


def _indivisible(config: ModelConfig, shards: int) -> list[str]:
    """What such a size does not do."""
    widths = {
        "query heads": config.num_heads,
        "intermediate size": config.intermediate_size,
        "vocabulary": config.vocab_size,
    }
    if config.experts is not None:
        widths["experts' intermediate size"] = config.experts.intermediate_size
    reasons = [f"does not divide the model's {name} of {width:,}" for name, width in widths.items() if width % shards]
    K = config.num_kv_heads
    if K % shards and shards % K:
        reasons.insert(0, f"neither divides the model's KV heads of {K:,} nor is a multiple of them")
    return reasons


class Placement(NamedTuple):
    """Where a parameter goes.

    Attributes:
      axis: that is split over "tensor"; None: every device has it all.
      parts: sizes, along that axis, of what a checkpoint has joined there.
      copies: for each part, how many devices in turn have the same piece of it.
    """

    axis: int | None
    parts: tuple[int, ...] = ()
    copies: tuple[int, ...] = ()

    @property
    def spec(self) -> PartitionSpec:
        return PartitionSpec() if self.axis is None else PartitionSpec(*[None] * self.axis, "tensor")

    def stored(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """What a checkpoint has of a parameter that on the devices is of `shape`."""
        return self._resized(shape, sum(self.parts))

    def on_devices(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The opposite of `stored`."""
        return self._resized(shape, sum(size * n for size, n in zip(self.parts, self.copies, strict=True)))

    def _resized(self, shape: tuple[int, ...], size: int) -> tuple[int, ...]:
        return shape if self.axis is None else (*shape[: self.axis], size, *shape[self.axis + 1 :])


def placement(path: Path, shape: tuple[int, ...], config: ModelConfig, shards: int) -> Placement:
    """Of the parameter at `path`, whatever the family."""
    *_, name, leaf = path
    if leaf == "sinks" or (name in BY_VOCABULARY and leaf in ("kernel", "embedding")):
        return Placement(0, shape[:1], (1,))
    if name in BY_OUTPUT:
        axis = len(shape) - (2 if leaf == "kernel" else 1)
        size = shape[axis]
        if name == "qkv":
            query, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
            copies = max(1, shards // config.num_kv_heads)
            return Placement(axis, (query, kv, kv), (1, copies, copies))
        return Placement(axis, (size // 2,) * 2, (1, 1)) if name == "gate_up" else Placement(axis, (size,), (1,))
    if name in BY_INPUT and leaf == "kernel":
        return Placement(len(shape) - 1, shape[-1:], (1,))
    return Placement(None)


def place(host: np.ndarray, where: Placement, mesh: Mesh | None) -> jax.Array:
    """Sends each device its piece of a parameter that is in the checkpoint's order."""
    if mesh is None:
        return jax.device_put(host)
    sharding, shards = NamedSharding(mesh, where.spec), mesh.shape["tensor"]
    if mesh.size == 1:
        return jax.device_put(host, sharding)
    shape = where.on_devices(host.shape)

    def piece(index: Any) -> np.ndarray:
        if where.axis is None:
            return host
        shard = (index[where.axis].start or 0) * shards // shape[where.axis]
        mine = _pieces(host, where, shard, shards)
        return mine[0] if len(mine) == 1 else np.concatenate(mine, axis=where.axis)

    return jax.make_array_from_callback(shape, sharding, piece)


def in_device_order(x: jax.Array, where: Placement, shards: int) -> jax.Array:
    """What `place` does to a parameter, on the device."""
    if where.axis is None or len(where.parts) == 1 or shards == 1:
        return x
    pieces = [piece for shard in range(shards) for piece in _pieces(x, where, shard, shards)]
    return jnp.concatenate(pieces, axis=where.axis)


def _pieces(x: Any, where: Placement, shard: int, shards: int) -> list[Any]:
    """What device `shard` has of each part of a parameter in the checkpoint's order."""
    assert where.axis is not None
    pieces, start = [], 0
    for size, copies in zip(where.parts, where.copies, strict=True):
        width = size * copies // shards
        first = start + shard // copies * width
        pieces.append(x[(*[slice(None)] * where.axis, slice(first, first + width))])
        start += size
    return pieces


def unfuse(y: jax.Array, sizes: tuple[int, ...], shards: int) -> list[jax.Array]:
    """[T, sum(sizes)], what a fused projection over so many shards gives -> [T, size] for each."""
    T = y.shape[0]
    pieces = jnp.split(y.reshape(T, shards, -1), np.cumsum(sizes)[:-1] // shards, axis=2)
    return [piece.reshape(T, size) for piece, size in zip(pieces, sizes, strict=True)]


def sharded(shapes: Any, mesh: Mesh | None, spec: PartitionSpec) -> Any:
    """A pytree of jax.ShapeDtypeStruct, placed."""
    if mesh is None:
        return shapes
    sharding = NamedSharding(mesh, spec)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)


def attend(
    function: Callable[..., tuple[jax.Array, Any]],
    mesh: Mesh | None,
    by_head: tuple[jax.Array, ...],
    shared: tuple[Any, ...],
    cache: Any,
    batch: AttentionBatch,
    *,
    sinks: jax.Array | None = None,
    **options: Any,
) -> tuple[jax.Array, Any]:
    """`function(*by_head, *shared, cache, batch, sinks=sinks, **options)`, an attention of kernels_pallas, each device
    with its own heads: a compiler cannot split a kernel by itself. Arrays `by_head` are [..., heads, D]."""
    if mesh is None or mesh.shape["tensor"] == 1:
        return function(*by_head, *shared, cache, batch, sinks=sinks, **options)

    def local(by_head, shared, cache, batch, sinks):
        return function(*by_head, *shared, cache, batch, sinks=sinks, **options)

    heads = tuple(PartitionSpec(*[None] * (x.ndim - 2), "tensor") for x in by_head)
    specs = (heads, PartitionSpec(), CACHE, PartitionSpec(), PartitionSpec("tensor"))
    split = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(HEADS, CACHE), check_vma=False)
    return split(by_head, shared, cache, batch, sinks)
