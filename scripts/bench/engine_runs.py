"""Driving the engine without a server: whole workloads, and steps under the clock."""

import gc
import itertools
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from paged.config import CacheArgs, EngineConfig, ModelArgs, RunnerArgs, SchedulerArgs, option, require
from paged.engine import Engine
from paged.errors import InvalidRequestError, QueueFullError
from paged.memory import reserve_device_memory
from paged.sampling_params import SamplingParams
from paged.startup import compute_dtype
from scripts.bench.report import machine, note
from scripts.bench.roofline import Ceilings, Cost, copy_bandwidth, matmul_flops
from scripts.bench.workload import Item

ENGINE_GROUPS = (ModelArgs, CacheArgs, SchedulerArgs, RunnerArgs)


@dataclass(frozen=True, kw_only=True)
class MeasureArgs:
    _argument_group_name: ClassVar[str] = "measurement"

    repeats: int = option(3, "times that each figure is measured; the median is shown")
    bandwidth: float | None = option(None, "bytes/s that a copy moves; none: measured first")
    peak_flops: float | None = option(None, "operations/s of a matrix product; none: measured first")

    def __post_init__(self) -> None:
        require(self.repeats >= 1, "repeats", "must be at least 1")
        for name in ("bandwidth", "peak_flops"):
            value = getattr(self, name)
            require(value is None or value > 0, name, "must be positive")


class Bench:
    """An engine to measure, and the ceilings of the machine that it runs on (measured while it is still empty).

    Text plays no part: prompts are token ids, and nothing is detokenized.
    """

    def __init__(self, config: EngineConfig, args: MeasureArgs):
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
        config = replace(config, model=replace(config.model, skip_tokenizer_init=True))
        reserve_device_memory(config.cache.gpu_memory_utilization)
        dtype = compute_dtype(config.model.dtype)
        self.ceilings = Ceilings(args.bandwidth or copy_bandwidth(), args.peak_flops or matmul_flops(dtype))
        note(
            f"{jax.devices()[0].device_kind}: copies {self.ceilings.bandwidth / 1e9:,.1f} GB/s, multiplies "
            f"{self.ceilings.flops / 1e12:,.2f} TFLOP/s in {jnp.dtype(dtype).name}"
        )
        begin = time.perf_counter()
        try:
            self.engine = Engine(config)
        except (ValueError, OSError) as e:
            raise InvalidRequestError(f"the engine could not be loaded: {e}") from e
        self.start_seconds = time.perf_counter() - begin
        gc.freeze()  # as a server does
        runner, model_config = self.engine.runner, self.engine.checkpoint.config
        shape = runner.shape
        self.cost = Cost.of(model_config, runner.params, shape.cache_dtype, runner.model.compute.shards)
        self.max_num_seqs, self.tokens_a_step = shape.max_num_seqs, shape.prompt_sizes[-1]
        self.capacity = self.engine.scheduler.capacity
        self.max_token_id = min(10_000, model_config.vocab_size - 1)
        self._ids = itertools.count()

    @property
    def about(self) -> dict[str, Any]:
        """The machine and the engine, for the record."""
        config, shape = self.engine.config, self.engine.runner.shape
        engine = {
            "model": config.model.model,
            "load_format": config.model.load_format,
            "dtype": jnp.dtype(compute_dtype(config.model.dtype)).name,
            "kv_cache_dtype": jnp.dtype(shape.cache_dtype).name,
            "attention_backend": config.runner.attention_backend,
            "tensor_parallel_size": config.runner.tensor_parallel_size,
            "block_size": shape.block_size,
            "num_blocks": shape.num_blocks,
            "max_num_seqs": self.max_num_seqs,
            "max_num_batched_tokens": self.tokens_a_step,
            "max_model_len": self.engine.max_model_len,
            "enable_prefix_caching": config.cache.enable_prefix_caching,
            "start_seconds": self.start_seconds,
        }
        return {"machine": machine(), "engine": engine}

    def add(self, items: Sequence[Item], temperature: float, top_k: int = 0, top_p: float = 1.0) -> list[str]:
        """Queues requests that share no cached prefix with any before them; returns their ids."""
        ids = [f"bench-{next(self._ids)}" for _ in items]
        for id, item in zip(ids, items, strict=True):
            params = SamplingParams(
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                max_tokens=item.output_len,
                ignore_eos=True,
                detokenize=False,
            )
            self.engine.add_request(id, item.prompt, params, cache_salt=ids[0])
        return ids

    def warm_up(self) -> None:
        """Runs every part once."""
        length = min(17, self.engine.max_model_len - 1)
        item = Item([1] * length, min(3, self.engine.max_model_len - length))
        self.run([item] * min(2, self.max_num_seqs), temperature=0.6)
        self.run([item], temperature=0.0)

    def run(self, items: Sequence[Item], temperature: float) -> "Run":
        """Runs a workload from empty to empty."""
        run, waste = Run(), CacheWaste(self.engine)
        pending = list(items)[::-1]
        run.begin = time.perf_counter()
        while pending or self.engine.has_unfinished_requests():
            self._feed(pending, temperature)
            deltas = self.engine.step()
            now = time.perf_counter()
            run.steps += 1
            for delta in deltas:
                if delta.error is not None:
                    raise RuntimeError(f"a request failed: {delta.error}")
                run.output_tokens += len(delta.token_ids)
                if delta.token_ids and not run.first_token_at.get(delta.request_id):
                    run.first_token_at[delta.request_id] = now
            waste.look()
        run.seconds = time.perf_counter() - run.begin
        run.prompt_tokens = sum(len(item.prompt) for item in items)
        run.cache_waste = waste.fraction
        return run

    def _feed(self, pending: list[Item], temperature: float) -> None:
        while pending:
            try:
                self.add([pending[-1]], temperature)
            except QueueFullError:
                return
            pending.pop()


@dataclass
class Run:
    begin: float = 0.0
    seconds: float = 0.0
    steps: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    cache_waste: float = 0.0
    first_token_at: dict[str, float] = field(default_factory=dict)


class CacheWaste:
    """The fraction of allocated cache slots that nothing was ever written to, over requests that ended: from the
    length of each block table and the tokens computed, as they were when the request was last seen running."""

    def __init__(self, engine: Engine):
        self._scheduler, self._block_size = engine.scheduler, engine.runner.shape.block_size
        self._last_seen: dict[str, tuple[int, int]] = {}

    def look(self) -> None:
        """After each step."""
        for request in self._scheduler.running:
            slots = len(request.block_table) * self._block_size
            self._last_seen[request.request_id] = slots, request.num_computed_tokens

    @property
    def fraction(self) -> float:
        allocated = sum(slots for slots, _ in self._last_seen.values())
        written = sum(tokens for _, tokens in self._last_seen.values())
        return 1 - written / allocated if allocated else 0.0
