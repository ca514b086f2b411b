"""What the engine tells whoever watches it (the server's metrics page, the bench): plain numbers, pushed once
a step and once a finished request. Times are seconds."""

from dataclasses import dataclass, field
from typing import Protocol

from paged.outputs import FinishReason, RequestMetrics


@dataclass(slots=True)
class StepStats:
    """One engine step. Gauges are values after it; everything else happened in it."""

    num_running: int = 0
    num_waiting: int = 0
    kv_cache_usage: float = 0.0  # fraction of blocks held by running requests
    num_prompt_tokens: int = 0  # computed in the step
    num_generation_tokens: int = 0
    num_preemptions: int = 0
    num_recomputed_tokens: int = 0  # computed again after a preemption
    prefix_cache_queries: int = 0  # tokens looked up in the prefix index
    prefix_cache_hits: int = 0  # tokens found there
    num_compiles: int = 0  # programs compiled since the last report; after start-up, 0 is right
    step_seconds: float = 0.0
    time_to_first_token: list[float] = field(default_factory=list)
    inter_token_latency: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class FinishedRequestStats:
    finish_reason: FinishReason
    num_prompt_tokens: int
    num_cached_tokens: int
    num_generation_tokens: int
    n: int
    max_tokens: int | None
    finish_time: float
    metrics: RequestMetrics
    index: int = 0  # which of the n completions


class StatsListener(Protocol):
    def on_step(self, stats: StepStats) -> None: ...
    def on_finished(self, stats: FinishedRequestStats) -> None: ...
