"""The block pool's size, from what the compiler says a step needs: no trial run, no running out later."""

import logging
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import jax

from kernels_pallas import vector_bytes
from models import CACHE, ModelConfig, sharded
from paged.compiler import Compiler, Lowering
from paged.config import CacheArgs
from paged.runner import Runner
from paged.runner_shape import RunnerShape

logger = logging.getLogger(__name__)
CPU_CACHE_BYTES = 2 << 30
PROVISIONAL_BLOCKS = 64
RESERVE = 0.03  # of an accelerator's memory: what compilers and libraries allocate for themselves


@dataclass(frozen=True)
class MemoryLedger:
    """Bytes on one device. `limit` is None where memory is the host's own (CPU)."""

    limit: int | None
    weights: int
    activations: int  # largest temporary and output memory of any call
    slots: int  # block tables, sampling state, hidden states of prompts
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


def unreserved_memory(device: jax.Device) -> int:
    """Bytes of a GPU beside what JAX's allocator may take."""
    limit = (device.memory_stats() or {}).get("bytes_limit", 0)
    return int(limit / reserved_fraction()) - limit


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


def call_bytes(analysis: Any) -> int:
    """What a program needs beside its arguments: temporaries, and outputs that are not donated inputs."""
    return analysis.temp_size_in_bytes + output_bytes(analysis)


def output_bytes(analysis: Any) -> int:
    return analysis.output_size_in_bytes - analysis.alias_size_in_bytes


def most_bytes(forwards: Iterable[Any], samplings: Iterable[Any]) -> int:
    """The most that a call of compiled programs needs beside weights and state: one with the layers in it; or sampling,
    which reads what another left."""
    before, after = ([program.memory_analysis() for program in programs] for programs in (forwards, samplings))
    return max(*map(call_bytes, before), max(map(output_bytes, before)) + max(map(call_bytes, after)))


def size_pool(model: Any, params: Any, shape: RunnerShape, args: CacheArgs, compiler: Compiler) -> int:
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
        probe = Probe(model, params, shape)
        compiler.start(probe.lowerings, probe.runner.shape)
        compiler.prepare(probe.runner.sampling_lowerings(shape.samplings), shape)  # meanwhile: no pool changes them
        budget = limit - tree_bytes(params) - probe.activation_bytes(compiler)
    return min(round_down(max(0, budget // per_block)), useful)


def round_down(num_blocks: int) -> int:
    """Drops less than 1%, so that a little more or less free memory does not change every program's shapes, and
    with them what the compilation cache holds."""
    granularity = 1 << max(0, num_blocks.bit_length() - 7)
    return num_blocks // granularity * granularity


class Probe:
    """What is compiled to size the pool: the layers of the two largest steps over a small one (its size does not change
    their temporaries), and what reads what they leave."""

    def __init__(self, model: Any, params: Any, shape: RunnerShape):
        self.runner = Runner(model, params, replace(shape, num_blocks=PROVISIONAL_BLOCKS))
        self._forwards = self.runner.forward_lowerings(shape.largest_steps[::-1])
        self._samplings = self.runner.sampling_lowerings([shape.largest_sampling]) | self.runner.score_lowering()

    @property
    def lowerings(self) -> dict[str, Lowering]:
        return self._forwards | self._samplings

    def activation_bytes(self, compiler: Compiler) -> int:
        """All that a device has to hold beside weights and cache."""
        compiler.start(self.lowerings, self.runner.shape)
        needed = most_bytes(compiler.get(self._forwards).values(), compiler.get(self._samplings).values())
        state = self.runner.state_shapes()
        return needed + tree_bytes(state) - tree_bytes(state.caches)


def ledger(runner: Runner, args: CacheArgs) -> MemoryLedger:
    """What was compiled, added up."""
    cache = tree_bytes(runner.state.caches)
    return MemoryLedger(
        limit=usable_memory(jax.devices()[0], args.gpu_memory_utilization),
        weights=tree_bytes(runner.params),
        activations=most_bytes(*runner.compiled),
        slots=tree_bytes(runner.state) - cache,
        cache=cache,
        num_blocks=runner.shape.num_blocks,
        block_size=runner.shape.block_size,
    )
