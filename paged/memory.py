"""The block pool's size, from what the compiler says a step needs: no trial run, no running out later."""

import logging
import math
import os
from dataclasses import dataclass, replace
from typing import Any

import jax

from kernels_pallas import vector_bytes
from models import CACHE, ModelConfig, sharded
from paged.config import CacheArgs
from paged.runner import Runner, RunnerShape

logger = logging.getLogger(__name__)
CPU_CACHE_BYTES = 2 << 30
PROVISIONAL_BLOCKS = 64
RESERVE = 0.03  # of an accelerator's memory: what compilers and libraries allocate for themselves


@dataclass(frozen=True)
class MemoryLedger:
    """Bytes on one device. `limit` is None where memory is the host's own (CPU)."""

    limit: int | None
    weights: int
    activations: int  # largest temporary and output memory of any step program
    slots: int  # block tables and sampling state
    cache: int
    num_blocks: int
    block_size: int

    def __str__(self) -> str:
        parts = {"weights": self.weights, "activations": self.activations, "slots": self.slots, "KV cache": self.cache}
        text = " + ".join(f"{name} {gib(size)}" for name, size in parts.items())
        room = "" if self.limit is None else f" of {gib(self.limit)} usable"
        tokens = (self.num_blocks - 1) * self.block_size
        return f"{text} = {gib(sum(parts.values()))}{room}; {self.num_blocks:,} blocks, {tokens:,} tokens"


def gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def local_size(x: Any) -> int:
    """Elements of an array, or of its shape, on one device."""
    return math.prod(x.shape if x.sharding is None else x.sharding.shard_shape(x.shape))


def tree_bytes(tree: Any) -> int:
    """Bytes on one device."""
    return sum(local_size(x) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def usable_memory(device: jax.Device, utilization: float) -> int | None:
    """Bytes that may be used on an accelerator: its size times `utilization`, or the allocator's own limit."""
    if device.platform == "cpu" or not (stats := device.memory_stats()):
        return None
    return int(stats["bytes_limit"] * min(1.0, utilization / reserved_fraction()) * (1 - RESERVE))


def reserved_fraction() -> float:
    """The fraction of a GPU that JAX's allocator was told to take as its limit."""
    return float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.75"))


def reserve_device_memory(utilization: float) -> None:
    """Lets JAX's GPU allocator take `utilization` of the device. It reads this once, when the backend starts."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(utilization))


def block_bytes(model: Any, shape: RunnerShape) -> int:
    cache = model.cache_shapes(1, shape.block_size, shape.cache_dtype)
    return tree_bytes(sharded(cache, model.compute.mesh, CACHE))


def token_bytes(config: ModelConfig, dtype: Any, shards: int = 1) -> int:
    """What one token's keys and values in one layer take of one device, with the scales of eight-bit ones, and without
    padding."""
    kv_heads = max(1, config.num_kv_heads // shards)
    return (2 if config.latent is None else 1) * kv_heads * vector_bytes(config.head_dim, dtype)


def step_bytes(analysis: Any) -> int:
    """What a step needs beside its arguments: temporaries, and outputs that are not donated inputs."""
    return analysis.temp_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes


def size_pool(model: Any, params: Any, shape: RunnerShape, args: CacheArgs, cache_dir: str | None = None) -> int:
    """How many blocks the pool has; no more than max_num_seqs sequences of full length can use."""
    if args.num_gpu_blocks_override is not None:
        return args.num_gpu_blocks_override
    per_block, device = block_bytes(model, shape), jax.devices()[0]
    useful = shape.max_num_seqs * shape.blocks_per_seq + 1
    limit = usable_memory(device, args.gpu_memory_utilization)
    if args.kv_cache_memory_bytes is not None:
        budget = args.kv_cache_memory_bytes
    elif limit is None:
        budget = min(CPU_CACHE_BYTES, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4)
    else:
        budget = limit - tree_bytes(params) - activation_bytes(model, params, shape, cache_dir)
    return min(round_down(max(0, budget // per_block)), useful)


def round_down(num_blocks: int) -> int:
    """Drops less than 1%, so that a little more or less free memory does not change every program's shapes, and
    with them what the compilation cache holds."""
    granularity = 1 << max(0, num_blocks.bit_length() - 7)
    return num_blocks // granularity * granularity


def activation_bytes(model: Any, params: Any, shape: RunnerShape, cache_dir: str | None = None) -> int:
    """Compiles the two largest steps over a small pool (the pool's size does not change their temporaries)."""
    probe = Runner(model, params, replace(shape, num_blocks=PROVISIONAL_BLOCKS), cache_dir)
    programs = probe.compile_steps([(step, "full") for step in shape.largest_steps])
    analyses = [program.memory_analysis() for program in programs.values()]
    state = probe.state_shapes()
    return max(map(step_bytes, analyses)) + tree_bytes(state) - tree_bytes(state.caches)


def ledger(runner: Runner, args: CacheArgs) -> MemoryLedger:
    """What was compiled, added up."""
    cache = tree_bytes(runner.state.caches)
    return MemoryLedger(
        limit=usable_memory(jax.devices()[0], args.gpu_memory_utilization),
        weights=tree_bytes(runner.params),
        activations=max(map(step_bytes, runner.memory_analysis().values())),
        slots=tree_bytes(runner.state) - cache,
        cache=cache,
        num_blocks=runner.shape.num_blocks,
        block_size=runner.shape.block_size,
    )
