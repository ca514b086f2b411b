"""The metrics page: what the engine reports, under vLLM's names where the meaning is the same (`vllm:`), and what
only this engine tells (`paged:`).

The engine pushes its figures from its own thread, between two steps, so adding them up is made cheap here: plain
counters, turned into Prometheus's families when somebody reads the page.
"""

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from paged.config import EngineConfig
from paged.stats import FinishedRequestStats, StepStats

if TYPE_CHECKING:  # brings jax with it
    from paged.async_engine import AsyncEngine

Buckets = tuple[float, ...]

# All begin finer than vLLM's, whose bounds they contain, so that its dashboards and recording rules go on working.
STEP_SECONDS: Buckets = (0.0005, 0.001, 0.002, 0.003, 0.004, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025, 0.05, 0.075)
STEP_SECONDS += (0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
FIRST_TOKEN_SECONDS: Buckets = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.15, 0.25, 0.5)
FIRST_TOKEN_SECONDS += (0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560)
REQUEST_SECONDS: Buckets = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10)
REQUEST_SECONDS += (15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
STEP_TOKENS: Buckets = (1, 2, 4, *(2**i for i in range(3, 15)))
CHOICES: Buckets = (1, 2, 5, 10, 20, 50, 100)
TOKENS: Buckets = tuple(m * 10**e for e in range(7) for m in (1, 2, 5))

GAUGES = {
    "vllm:num_requests_running": "Requests in the running batch.",
    "vllm:num_requests_waiting": "Requests in the queue.",
    "vllm:kv_cache_usage_perc": "Cache blocks held by running requests, from 0 to 1.",
    "paged:last_step_age_seconds": "Time since the engine last made progress while it has work; 0 when idle.",
}
COUNTERS = {
    "vllm:prompt_tokens": "Prompt tokens of requests that got as far as their first token.",
    "vllm:prompt_tokens_cached": "Those of them that were found in the prefix cache.",
    "vllm:generation_tokens": "Tokens generated.",
    "vllm:num_preemptions": "Requests that lost their blocks to others and were put back into the queue.",
    "vllm:prefix_cache_queries": "Tokens looked up in the prefix cache.",
    "vllm:prefix_cache_hits": "Tokens found in the prefix cache.",
    "paged:recomputed_tokens": "Tokens computed again after a preemption.",
    "paged:compiles": "Programs compiled after start-up; each one made requests wait.",
    "paged:steps": "Steps of the engine.",
}
HISTOGRAMS = {
    "vllm:time_to_first_token_seconds": ("From arrival to the first token.", FIRST_TOKEN_SECONDS),
    "vllm:inter_token_latency_seconds": ("Between two tokens of a request.", STEP_SECONDS),
    "vllm:request_time_per_output_token_seconds": ("A request's mean time between two tokens.", STEP_SECONDS),
    "vllm:e2e_request_latency_seconds": ("From arrival to the end.", REQUEST_SECONDS),
    "vllm:request_queue_time_seconds": ("From arrival to the first step.", REQUEST_SECONDS),
    "vllm:request_inference_time_seconds": ("From the first step to the last token.", REQUEST_SECONDS),
    "vllm:request_prefill_time_seconds": ("From the first step to the first token.", REQUEST_SECONDS),
    "vllm:request_decode_time_seconds": ("From the first token to the last.", REQUEST_SECONDS),
    "vllm:request_prompt_tokens": ("Prompt tokens of a request.", TOKENS),
    "vllm:request_generation_tokens": ("Tokens generated for a request.", TOKENS),
    "vllm:request_params_n": ("The n of a request.", CHOICES),
    "vllm:request_params_max_tokens": ("The max_tokens of a request.", TOKENS),
    "vllm:iteration_tokens_total": ("Tokens computed in a step.", STEP_TOKENS),
    "paged:step_seconds": ("Time of a step.", STEP_SECONDS),
}


class Histogram:
    def __init__(self, bounds: Buckets):
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, values: Iterable[float]) -> None:
        for value in values:
            self.counts[bisect_left(self.bounds, value)] += 1
            self.sum += value

    def cumulative(self) -> list[tuple[str, float]]:
        """(upper bound, observations up to it), as Prometheus wants them."""
        total, rows = 0, []
        for bound, count in zip((*map(floatToGoString, self.bounds), "+Inf"), self.counts, strict=True):
            total += count
            rows.append((bound, float(total)))
        return rows


class EngineMetrics(Collector):
    """Listens to an engine (paged.stats.StatsListener) and writes the page."""

    def __init__(self, model_name: str, config: EngineConfig):
        self._config = config
        self._labels = {"model_name": model_name, "engine": "0"}
        self._lock = threading.Lock()
        self._engine: AsyncEngine | None = None
        self._kv_cache_usage = 0.0
        self._counters: Counter[str] = Counter()
        self._finished: Counter[str] = Counter(dict.fromkeys(("stop", "length", "abort", "error"), 0))
        self._errors: Counter[tuple[str, str]] = Counter()
        self._histograms = {name: Histogram(bounds) for name, (_, bounds) in HISTOGRAMS.items()}
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def watch(self, engine: "AsyncEngine") -> None:
        """The gauges read this engine's health."""
        self._engine = engine

    def page(self) -> bytes:
        """Prometheus's text format."""
        return generate_latest(self._registry)

    @property
    def kv_cache_usage(self) -> float:
        return self._kv_cache_usage

    def count_error(self, status: int, code: str) -> None:
        with self._lock:
            self._errors[str(status), code] += 1

    def on_step(self, stats: StepStats) -> None:
        with self._lock:
            self._kv_cache_usage = stats.kv_cache_usage
            counters = self._counters
            counters["paged:steps"] += 1
            counters["paged:compiles"] += stats.num_compiles
            counters["paged:recomputed_tokens"] += stats.num_recomputed_tokens
            counters["vllm:generation_tokens"] += stats.num_generation_tokens
            counters["vllm:num_preemptions"] += stats.num_preemptions
            counters["vllm:prefix_cache_queries"] += stats.prefix_cache_queries
            counters["vllm:prefix_cache_hits"] += stats.prefix_cache_hits
            self._observe("paged:step_seconds", stats.step_seconds)
            self._observe("vllm:iteration_tokens_total", stats.num_prompt_tokens + stats.num_generation_tokens)
            self._histograms["vllm:time_to_first_token_seconds"].observe(stats.time_to_first_token)
            self._histograms["vllm:inter_token_latency_seconds"].observe(stats.inter_token_latency)

    def on_finished(self, stats: FinishedRequestStats) -> None:
        """Once for each of a request's n completions."""
        with self._lock:
            self._finished[stats.finish_reason] += 1
            self._observe("vllm:request_prompt_tokens", stats.num_prompt_tokens)
            self._observe("vllm:request_generation_tokens", stats.num_generation_tokens)
            if stats.index == 0:
                self._observe("vllm:request_params_n", stats.n)
                if stats.max_tokens is not None:
                    self._observe("vllm:request_params_max_tokens", stats.max_tokens)
            self._observe_times(stats)

    def _observe_times(self, stats: FinishedRequestStats) -> None:
        times = stats.metrics
        self._observe("vllm:e2e_request_latency_seconds", stats.finish_time - times.arrival_time)
        if times.first_scheduled_time is None:
            return
        self._observe("vllm:request_queue_time_seconds", times.first_scheduled_time - times.arrival_time)
        if times.first_token_time is None or times.last_token_time is None:
            return
        decode_time = times.last_token_time - times.first_token_time
        self._observe("vllm:request_prefill_time_seconds", times.first_token_time - times.first_scheduled_time)
        self._observe("vllm:request_decode_time_seconds", decode_time)
        self._observe("vllm:request_inference_time_seconds", times.last_token_time - times.first_scheduled_time)
        if stats.num_generation_tokens > 1:
            per_token = decode_time / (stats.num_generation_tokens - 1)
            self._observe("vllm:request_time_per_output_token_seconds", per_token)
        if stats.index == 0:
            self._counters["vllm:prompt_tokens"] += stats.num_prompt_tokens
            self._counters["vllm:prompt_tokens_cached"] += stats.num_cached_tokens

    def _observe(self, name: str, value: float) -> None:
        self._histograms[name].observe((value,))

    def collect(self) -> Iterator[Metric]:
        names, values = list(self._labels), list(self._labels.values())
        gauges = self._gauges()
        for name, help_text in GAUGES.items():
            gauge = GaugeMetricFamily(name, help_text, labels=names)
            gauge.add_metric(values, gauges[name])
            yield gauge
        with self._lock:
            families = list(self._counted(names, values))
        yield from families
        blocks = {} if self._engine is None else {"num_gpu_blocks": self._engine.info.num_blocks}
        yield self._info("vllm:cache_config_info", "The cache's options.", asdict(self._config.cache) | blocks)
        yield self._info("paged:build_info", "The server's version.", {"version": package_version()})

    def _gauges(self) -> dict[str, float]:
        health = self._engine.health() if self._engine is not None else None
        return {
            "vllm:num_requests_running": health.num_running if health else 0,
            "vllm:num_requests_waiting": health.num_waiting if health else 0,
            "vllm:kv_cache_usage_perc": self._kv_cache_usage,
            "paged:last_step_age_seconds": health.last_step_age if health else 0.0,
        }

    def _counted(self, names: list[str], values: list[str]) -> Iterator[Metric]:
        for name, help_text in COUNTERS.items():
            counter = CounterMetricFamily(name, help_text, labels=names)
            counter.add_metric(values, self._counters[name])
            yield counter
        finished = CounterMetricFamily(
            "vllm:request_success", "Completions ended, by how.", labels=[*names, "finished_reason"]
        )
        for reason, count in self._finished.items():
            finished.add_metric([*values, reason], count)
        yield finished
        errors = CounterMetricFamily(
            "paged:request_errors", "Requests refused or failed, by cause.", labels=[*names, "status", "code"]
        )
        for (status, code), count in self._errors.items():
            errors.add_metric([*values, status, code], count)
        yield errors
        for name, histogram in self._histograms.items():
            family = HistogramMetricFamily(name, HISTOGRAMS[name][0], labels=names)
            family.add_metric(values, histogram.cumulative(), histogram.sum)
            yield family

    def _info(self, name: str, help_text: str, facts: dict[str, object]) -> Metric:
        labels = self._labels | {key: str(value) for key, value in facts.items()}
        family = GaugeMetricFamily(name, help_text, labels=list(labels))
        family.add_metric(list(labels.values()), 1)
        return family


def package_version() -> str:
    try:
        return version("paged")
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "0+source"
