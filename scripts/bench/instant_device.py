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
from paged.plan import StepPlan
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


@dataclass(frozen=True)
class StepSeconds:
    """What steps take: `step`, and more for each sequence that decodes; prompts, if that is more, `prompt_token` for
    each of their tokens."""

    step: float = 0.0
    sequence: float = 0.0
    prompt_token: float = 0.0

    def of(self, plan: StepPlan) -> float:
        decodes = self.step + self.sequence * len(plan.decodes)
        return max(decodes, self.prompt_token * sum(chunk.num_tokens for chunk in plan.prefills))


class InstantRunner(Runner):
    """Packs steps as the real one does, and has as many in a call; random tokens take the place of their execution, one
    step after the other."""

    def __init__(self, shape: RunnerShape, seconds: StepSeconds, seed: int = 0):
        self.shape, self.seconds = shape, seconds
        self._chains, self._ranks = dict.fromkeys(shape.chained), variant_ranks(shape)
        self._random = np.random.default_rng(seed)
        self._free_at = 0.0

    def reset_state(self) -> None:
        """There is none."""

    def _execute(self, step: PackedStep) -> StepHandle:
        return self._handle([step], (step.shape.S,))

    def _execute_chain(self, steps: Sequence[PackedStep]) -> StepHandle:
        return self._handle(steps, (len(steps), steps[0].shape.S))

    def _handle(self, steps: Sequence[PackedStep], size: tuple[int, ...]) -> StepHandle:
        tokens: Any = self._random.integers(self.shape.vocab_size, size=size, dtype=np.int32)
        if taken := sum(self.seconds.of(step.plan) for step in steps):
            self._free_at = max(self._free_at, time.monotonic()) + taken
            tokens = ArrivingArray(tokens, self._free_at)
        return StepHandle([step.plan for step in steps], SampleOutput(tokens), [])


def instant_parts(config: EngineConfig, seconds: StepSeconds, platform: str = "gpu") -> Parts:
    """What `paged.startup.build` would make for a `platform`, with a cache that holds every sequence at full length.
    Of the model only the configuration and the tokenizer are read."""
    args = config.model
    checkpoint = open_model(args)
    shape = runner_shape(config, checkpoint, jnp.dtype("bfloat16"), platform)
    shape = replace(shape, num_blocks=shape.max_num_seqs * shape.blocks_per_seq + 1)
    max_model_len = args.max_model_len or checkpoint.config.max_position_embeddings
    nothing = MemoryLedger(None, 0, 0, 0, 0, shape.num_blocks, shape.block_size)
    return Parts(checkpoint, InstantRunner(shape, seconds), make_scheduler(config, shape), max_model_len, nothing)
