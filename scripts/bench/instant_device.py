"""An engine without a device: its tokens mean nothing and come at once, or after a time, so that what a step costs is
the host's work alone."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from paged.config import EngineConfig
from paged.memory import MemoryLedger
from paged.runner import PackedStep, Runner, StepHandle, variant_ranks
from paged.runner_shape import RunnerShape
from paged.sampler import SampleOutput
from paged.startup import Parts, make_scheduler, open_model, runner_shape


@dataclass(frozen=True)
class ArrivingArray:
    """Becomes a numpy array at a moment of time.monotonic(): whoever wants it earlier waits, as for a device."""

    values: np.ndarray
    arrival: float

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        time.sleep(max(0.0, self.arrival - time.monotonic()))
        return self.values


class InstantRunner(Runner):
    """Packs steps as the real one does; random tokens take the place of their execution, one step after the other,
    each `step_seconds` long."""

    def __init__(self, shape: RunnerShape, step_seconds: float = 0.0, seed: int = 0):
        self.shape, self.step_seconds = shape, step_seconds
        self._chains, self._ranks = {}, variant_ranks(shape)
        self._random = np.random.default_rng(seed)
        self._free_at = 0.0

    def reset_state(self) -> None:
        """There is none."""

    def execute(self, steps: Sequence[PackedStep]) -> list[StepHandle]:
        return [self._handle(step) for step in steps]

    def _handle(self, step: PackedStep) -> StepHandle:
        tokens: Any = self._random.integers(self.shape.vocab_size, size=step.shape.S, dtype=np.int32)
        if self.step_seconds:
            self._free_at = max(self._free_at, time.monotonic()) + self.step_seconds
            tokens = ArrivingArray(tokens, self._free_at)
        return StepHandle([step.plan], SampleOutput(tokens), [])


def instant_parts(config: EngineConfig, step_seconds: float = 0.0, platform: str = "gpu") -> Parts:
    """What `paged.startup.build` would make for a `platform`, with a cache that holds every sequence at full length.
    Of the model only the configuration and the tokenizer are read."""
    args = config.model
    checkpoint = open_model(args)
    shape = runner_shape(config, checkpoint, jnp.dtype("bfloat16"), platform)
    shape = replace(shape, num_blocks=shape.max_num_seqs * shape.blocks_per_seq + 1)
    max_model_len = args.max_model_len or checkpoint.config.max_position_embeddings
    nothing = MemoryLedger(None, 0, 0, 0, 0, shape.num_blocks, shape.block_size)
    return Parts(checkpoint, InstantRunner(shape, step_seconds), make_scheduler(config, shape), max_model_len, nothing)
