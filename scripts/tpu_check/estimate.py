"""How fast compiled steps can be: the bytes and operations of the compiled program over the chip's peaks, attention by
the lengths of the sequences. The sampler is the greedy one: what another adds depends on the requests. What chips say
to each other is not in it, and no chip reaches its peaks."""

from typing import Any

import numpy as np

from models import ModelConfig
from paged.memory import tree_bytes
from paged.packing import StepShape, at_least
from paged.runner import Runner
from scripts.bench.report import Report
from scripts.bench.roofline import Ceilings, Cost
from scripts.tpu_check.chips import Chip
from scripts.tpu_check.program import Program


class Estimates:
    """programs: by step, its layers, and its head with a greedy sampler."""

    def __init__(self, runner: Runner, chip: Chip, programs: dict[StepShape, tuple[Program, Program]]):
        self.programs = programs
        self.config: ModelConfig = runner.model.config
        shape = runner.shape
        self.capacity = (shape.num_blocks - 1) * shape.block_size
        self.kv_bytes = tree_bytes(runner.state_shapes().caches) / (shape.num_blocks * shape.block_size)
        self.ceilings = Ceilings(chip.bandwidth, chip.flops)
        self.cost = Cost.of(self.config, runner.params, shape.cache_dtype, runner.model.compute.shards)

    def report(self, batches, contexts, max_model_len: int, about: dict[str, Any]) -> None:
        report = Report("tpu_check", about)
        decodes = {shape.S: step for shape, step in self.programs.items() if shape.decode_only}
        for context in contexts:
            for batch in batches:
                if decodes and batch <= max(decodes) and context <= max_model_len and batch * context <= self.capacity:
                    step = decodes[at_least(tuple(sorted(decodes)), batch)]
                    self._add(report, f"decode {batch} x {context:,}", step, [context] * batch, batch)
        for shape, step in self.programs.items():
            if not shape.decode_only:
                T = shape.T
                full, rest = divmod(T, min(T, max_model_len))
                lengths = [min(T, max_model_len)] * full + [rest] * (rest > 0)
                contexts_of_tokens = np.concatenate([np.arange(1, n + 1) for n in lengths])
                self._add(report, f"prompt {T:,}", step, contexts_of_tokens, T, read=sum(lengths))
        report.print_table()

    def _add(
        self, report: Report, name: str, step: tuple[Program, Program], contexts, tokens: int, read: int | None = None
    ) -> None:
        """contexts: for each token of the step, how many it attends to; read: cached tokens that are fetched."""
        attended = self.cost.cached_tokens_read(contexts)
        fetched = (attended / self.config.num_layers if read is None else read) * self.kv_bytes
        attention = self.cost.attention_flops(attended)
        moved = sum(program.bytes for program in step) + fetched
        operations = sum(program.flops for program in step) + attention
        seconds = self.ceilings.seconds(moved, operations)
        used = 2 * tokens * self.cost.weights_used()
        if read is not None:  # a prompt step has logits for the last token of each sequence alone
            used = 2 * tokens * (self.cost.weights_used() - self.cost.head_weights)
        floor = self.ceilings.seconds(self.cost.bytes_read(tokens) + fetched, used + attention)
        report.add(
            {
                "step": name,
                "GB": f"{moved / 1e9:.2f}",
                "TFLOP": f"{operations / 1e12:.3f}",
                "ms at best": f"{seconds * 1e3:.2f}",
                "floor ms": f"{floor * 1e3:.2f}",
                "times floor": f"{seconds / floor:.2f}",
                "tok/s at best": f"{tokens / seconds:,.0f}",
            },
            {
                "step": name,
                "bytes": moved,
                "flops": operations,
                "ms": seconds * 1e3,
                "floor_ms": floor * 1e3,
                "tokens_per_second": tokens / seconds,
            },
        )
