"""The metrics page: names that dashboards know, and figures that are right."""

import random

import prometheus_client
import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.metrics import FIRST_TOKEN_SECONDS, HISTOGRAMS, REQUEST_SECONDS, STEP_SECONDS, Histogram

NAMES = [
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:cache_config_info",
    "vllm:prompt_tokens_total",
    "vllm:prompt_tokens_cached_total",
    "vllm:generation_tokens_total",
    "vllm:request_success_total",
    "vllm:num_preemptions_total",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
    "vllm:time_to_first_token_seconds_bucket",
    "vllm:inter_token_latency_seconds_bucket",
    "vllm:request_time_per_output_token_seconds_bucket",
    "vllm:e2e_request_latency_seconds_bucket",
    "vllm:request_queue_time_seconds_bucket",
    "vllm:request_inference_time_seconds_bucket",
    "vllm:request_prefill_time_seconds_bucket",
    "vllm:request_decode_time_seconds_bucket",
    "vllm:request_prompt_tokens_bucket",
    "vllm:request_generation_tokens_bucket",
    "vllm:request_params_n_bucket",
    "vllm:request_params_max_tokens_bucket",
    "vllm:iteration_tokens_total_bucket",
    "paged:recomputed_tokens_total",
    "paged:compiles_total",
    "paged:steps_total",
    "paged:last_step_age_seconds",
]
VLLM_STEP_SECONDS = [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80]
VLLM_FIRST_TOKEN_SECONDS = [0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20]
VLLM_FIRST_TOKEN_SECONDS += [40, 80, 160, 640, 2560]
VLLM_REQUEST_SECONDS = [0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680]


def test_names_and_labels(tiny):
    samples = {}
    for family in text_string_to_metric_families(tiny.get("/metrics").text):
        for sample in family.samples:
            samples.setdefault(sample.name, []).append(sample)
            if family.name.startswith("vllm:"):
                assert (sample.labels["model_name"], sample.labels["engine"]) == ("tiny", "0")
    assert not [name for name in NAMES if name not in samples]
    assert {s.labels["finished_reason"] for s in samples["vllm:request_success_total"]} == {
        "stop", "length", "abort", "error",
    }  # fmt: skip
    assert "process_resident_memory_bytes" in samples
    assert samples["vllm:cache_config_info"][0].labels["num_gpu_blocks"] == "2100"


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (STEP_SECONDS, VLLM_STEP_SECONDS),
        (FIRST_TOKEN_SECONDS, VLLM_FIRST_TOKEN_SECONDS),
        (REQUEST_SECONDS, VLLM_REQUEST_SECONDS),
    ],
)
def test_buckets_contain_vllms_and_are_finer(ours, theirs):
    assert set(theirs) < set(ours)


@pytest.mark.parametrize("name", sorted(HISTOGRAMS))
def test_histograms_count_like_the_client_librarys(name):
    bounds = HISTOGRAMS[name][1]
    assert list(bounds) == sorted(set(bounds))
    rng = random.Random(name)
    values = [*bounds[:3], *(rng.lognormvariate(0, 4) for _ in range(500))]
    ours, registry = Histogram(bounds), prometheus_client.CollectorRegistry()
    theirs = prometheus_client.Histogram("x", "x", buckets=bounds, registry=registry)
    ours.observe(values)
    for value in values:
        theirs.observe(value)
    [family] = registry.collect()
    expected = [(s.labels["le"], s.value) for s in family.samples if s.name == "x_bucket"]
    assert ours.cumulative() == expected
    assert ours.sum == pytest.approx(sum(values))


def test_figures(tiny):
    before = tiny.metrics()
    body = {"prompt": "count me", "max_tokens": 9, "n": 2, "ignore_eos": True, "seed": 1}
    usage = tiny.post("/v1/completions", body).json()["usage"]
    after = tiny.metrics()

    def added(name: str) -> float:
        return after[name] - before[name]

    assert added("vllm:prompt_tokens_total") == usage["prompt_tokens"] == 8
    assert added("vllm:generation_tokens_total") == usage["completion_tokens"] == 18
    assert added("vllm:request_success_total{finished_reason=length}") == 2
    assert added("vllm:time_to_first_token_seconds_count") == 2
    assert added("vllm:inter_token_latency_seconds_count") == 16
    assert added("vllm:e2e_request_latency_seconds_count") == 2
    assert added("vllm:request_generation_tokens_sum") == 18
    assert added("vllm:request_params_n_sum") == 2
    assert added("vllm:request_params_max_tokens_sum") == 9
    assert added("paged:compiles_total") == 0
    assert after["vllm:num_requests_running"] == after["vllm:num_requests_waiting"] == 0
    assert after["vllm:kv_cache_usage_perc"] == 0


def test_status_routes(tiny):
    assert tiny.get("/ready").json() == {"status": "ready"}
    assert tiny.get("/ping").status_code == tiny.post("/ping", {}).status_code == 200
    assert tiny.get("/version").json()["version"]
    assert tiny.get("/load").json() == {
        "server_load": 0, "num_requests_running": 0, "num_requests_waiting": 0, "kv_cache_usage_perc": 0,
    }  # fmt: skip
