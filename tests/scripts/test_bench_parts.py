"""The benchmark's arithmetic, and its HTTP client against a server that cuts its answers anywhere."""

import asyncio
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models import ModelConfig, build_model, param_shapes
from scripts.bench.http import Client, HttpError
from scripts.bench.load import Load, Outcome, Sent
from scripts.bench.report import repeated, table
from scripts.bench.roofline import Ceilings, Cost, ideal_seconds
from scripts.bench.serve import ServeArgs, summarize
from scripts.bench.workload import Item, fixed, nano, poisson_arrivals
from scripts.percentiles import percentiles

CONFIGS = Path(__file__).parents[2] / "configs"


def test_the_nano_workload_is_nano_vllms() -> None:
    items = nano()
    assert len(items) == 256
    assert sum(item.output_len for item in items) == 133_966
    assert sum(len(item.prompt) for item in items) == 142_827
    assert {type(t) for item in items for t in item.prompt} == {int}
    assert max(max(item.prompt) for item in items) <= 10_000


def test_the_fixed_workload_is_the_same_each_time() -> None:
    items = fixed(3, 5, 7, max_token_id=9)
    assert [(len(i.prompt), i.output_len, i.total_len) for i in items] == [(5, 7, 12)] * 3
    assert items == fixed(3, 5, 7, max_token_id=9)
    assert items != fixed(3, 5, 7, max_token_id=9, seed=1)


def test_arrivals_are_poisson() -> None:
    times = poisson_arrivals(20_000, rate=4.0)
    gaps = np.diff(times)
    assert times[0] == 0.0
    assert gaps.min() >= 0
    assert gaps.mean() == pytest.approx(1 / 4, rel=0.03)
    assert gaps.std() == pytest.approx(1 / 4, rel=0.03)
    assert set(poisson_arrivals(5, math.inf)) == {0.0}


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50))
def test_percentiles_are_numpys(values: list[float]) -> None:
    got = percentiles(values)
    assert got is not None
    for name, q in (("p50", 50), ("p95", 95), ("p99", 99), ("max", 100)):
        assert got[name] == pytest.approx(float(np.percentile(values, q)))
    assert got["mean"] == pytest.approx(float(np.mean(values)), abs=1e-9)


def test_percentiles_of_nothing_are_none() -> None:
    assert percentiles([]) is None


def test_repeats_keep_their_spread() -> None:
    assert repeated([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0, "values": [3.0, 1.0, 2.0]}


def test_a_table_is_aligned() -> None:
    assert table([{"a": "1", "name": "x"}, {"a": "1000", "name": "y"}]).splitlines() == [
        "   a  name",
        "----  ----",
        "   1     x",
        "1000     y",
    ]


def config(name: str) -> ModelConfig:
    return ModelConfig.from_hf(json.loads((CONFIGS / name / "config.json").read_text()))


@pytest.mark.parametrize(
    ("name", "total", "embedding"),
    [
        ("qwen3-0.6b", 596_049_920, 0),
        ("llama-3.1-8b", 8_030_261_248, 128_256 * 4096),
        ("qwen3-30b-a3b", 30_532_122_624, 151_936 * 2048),
        ("gemma-3-1b", 999_885_952, 0),
    ],
)
def test_the_committed_configurations_have_the_published_number_of_weights(
    name: str, total: int, embedding: int
) -> None:
    """And the roofline counts all of them but an embedding that is not also the head."""
    model = build_model(config(name), dtype=jnp.bfloat16, attention_backend="reference")
    cost = Cost.of(config(name), param_shapes(model), cache_dtype="bfloat16")
    assert cost.weights == total - embedding
    assert cost.weight_bytes == 2 * cost.weights


def test_a_step_reads_the_experts_that_its_tokens_are_sent_to() -> None:
    """Of Qwen3-30B-A3B, where a token passes through 3.3 thousand million weights, with the input embedding."""
    c = config("qwen3-30b-a3b")
    model = build_model(c, dtype=jnp.bfloat16, attention_backend="reference")
    cost = Cost.of(c, param_shapes(model), cache_dtype="bfloat16")
    one = 48 * 3 * 2048 * 768  # in each layer
    assert (cost.expert_weights, cost.expert_bytes) == (128 * one, 2 * 128 * one)
    assert cost.weights_used() == pytest.approx(cost.weights - 120 * one)
    assert cost.bytes_read(1) == pytest.approx(cost.weight_bytes - 2 * 120 * one)
    rng = np.random.default_rng(0)
    routed = [len(np.unique([rng.permutation(128)[:8] for _ in range(20)])) for _ in range(200)]
    touched = 128 - (cost.weight_bytes - cost.bytes_read(20)) / (2 * one)
    assert touched == pytest.approx(np.mean(routed), rel=0.01)
    bytes_moved, operations = cost.decode([1000] * 20)
    assert bytes_moved == pytest.approx(cost.bytes_read(20) + 48 * 20_000 * cost.kv_bytes)
    assert operations == pytest.approx(2 * 20 * cost.weights_used() + 4 * 32 * 128 * 48 * 20_000)


@pytest.mark.parametrize(("shards", "kv_heads"), [(2, 4), (8, 1), (16, 1)])
def test_a_device_has_its_share_of_the_model(shards: int, kv_heads: int) -> None:
    """Of Llama-3.1-8B, over devices that are only named; where two have the same KV head, it counts in both."""
    c = config("llama-3.1-8b")
    mesh: Any = jax.sharding.AbstractMesh((1, shards), ("data", "tensor"), (jax.sharding.AxisType.Auto,) * 2)
    model = build_model(c, dtype=jnp.bfloat16, attention_backend="reference", mesh=mesh)
    cost = Cost.of(c, param_shapes(model), cache_dtype="bfloat16", shards=shards)
    norms, vocabulary, rest = 65 * 4096, 128_256 * 4096, 8_030_261_248 - 65 * 4096 - 2 * 128_256 * 4096
    repeated = 32 * 2 * 128 * 4096 * (kv_heads - 8 / shards)
    assert cost.weights == norms + (vocabulary + rest) / shards + repeated
    assert cost.weight_bytes == 2 * cost.weights
    assert cost.head_weights == vocabulary / shards
    assert cost.kv_bytes == 2 * kv_heads * 128 * 2
    bytes_moved, operations = cost.decode([1000])
    assert bytes_moved == cost.weight_bytes + 32 * 1000 * cost.kv_bytes
    assert operations == 2 * cost.weights + 4 * (32 // shards) * 128 * 32 * 1000


def one_layer(**changes: Any) -> Cost:
    shape = {
        "architecture": "LlamaForCausalLM",
        "vocab_size": 10, "hidden_size": 4, "intermediate_size": 8, "num_layers": 2, "num_heads": 2,
        "num_kv_heads": 1, "head_dim": 2, "max_position_embeddings": 100,
    }  # fmt: skip
    config = ModelConfig(**shape | changes)
    return Cost(config, weight_bytes=1000, weights=500, head_weights=40, kv_bytes=2 * 1 * 2 * 4)


def test_a_decode_step_reads_the_weights_once_and_every_sequences_cache() -> None:
    bytes_moved, operations = one_layer().decode([10, 20])
    assert bytes_moved == 1000 + 2 * 30 * 16
    assert operations == 2 * 500 * 2 + 4 * 2 * 2 * (2 * 30)


def test_a_sliding_window_bounds_what_is_read() -> None:
    bytes_moved, _ = one_layer(sliding_windows=(None, 8)).decode([10, 20])
    assert bytes_moved == 1000 + (30 + 16) * 16


def test_a_prompt_needs_the_head_for_its_last_token_only() -> None:
    bytes_moved, operations = one_layer().prefill([3, 5], tokens_a_step=4)
    assert bytes_moved == 2 * 1000
    assert operations == 2 * (500 - 40) * 8 + 2 * 40 * 2 + 4 * 2 * 2 * 2 * (6 + 15)


def naive_ideal_seconds(items: list[Item], cost: Cost, ceilings: Ceilings, max_num_seqs: int) -> float:
    """Every step spelled out."""
    total = ceilings.seconds(*cost.prefill([len(item.prompt) for item in items], 512))
    left = [[len(item.prompt), item.output_len - 1] for item in items if item.output_len > 1]
    while left:
        running = left[:max_num_seqs]
        for sequence in running:
            sequence[0] += 1
            sequence[1] -= 1
        total += ceilings.seconds(*cost.decode([length for length, _ in running]))
        left = [s for s in left if s[1] > 0]
    return total


@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(1, 12)), min_size=1, max_size=12),
    st.integers(1, 5),
    st.floats(1e3, 1e5),
)
def test_the_floor_of_a_run_is_that_of_its_steps(shapes: list[tuple[int, int]], slots: int, bandwidth: float) -> None:
    items = [Item([0] * n, out) for n, out in shapes]
    ceilings = Ceilings(bandwidth, 1e5)
    expected = naive_ideal_seconds(items, one_layer(), ceilings, slots)
    assert ideal_seconds(items, one_layer(), ceilings, slots, 512) == pytest.approx(expected)


def test_what_a_user_sees_of_a_request() -> None:
    outcome = Outcome(output_tokens=5, token_times=[0.2, 0.3, 0.6], end=0.6)
    assert outcome.time_to_first_token == 0.2
    assert outcome.time_per_output_token == pytest.approx(0.4 / 4)
    assert outcome.inter_token_times == pytest.approx([0.1, 0.3])
    assert Outcome(output_tokens=1, token_times=[0.2], end=0.2).time_per_output_token is None


@pytest.mark.parametrize(
    ("limits", "good"),
    [
        ({}, 2),
        ({"ttft_limit_ms": 250.0}, 1),
        ({"tpot_limit_ms": 99.0}, 1),
        ({"e2e_limit_ms": 599.0}, 0),
        ({"ttft_limit_ms": 250.0, "tpot_limit_ms": 99.0}, 0),
    ],
)
def test_goodput_counts_what_met_every_limit(limits: dict[str, float], good: int) -> None:
    outcomes = [
        Outcome(output_tokens=5, token_times=[0.2, 0.6], end=0.6),
        Outcome(output_tokens=5, token_times=[0.5, 0.6], end=0.6),
        Outcome(error="HTTP 429"),
    ]
    row, measurement = summarize(Sent(outcomes, 2.0, busy=0.25, processes=3), 1.0, ServeArgs(**limits))
    assert (row["client busy"], measurement["client"]) == ("25% of 3", {"processes": 3, "busy": 0.25})
    assert measurement["requests"] == {"ok": 2, "failed": 1, "good": good}
    assert measurement["goodput_requests_per_second"] == good / 2
    assert measurement["output_tokens_per_second"] == 5.0
    assert measurement["ttft_ms"]["p50"] == pytest.approx(350)
    assert row["failed"] == "1"


@pytest.mark.parametrize(("count", "concurrency"), [(1, None), (3, None), (3, 7), (8, 5), (20, None), (4, 1)])
def test_shares_of_a_load_add_up(count: int, concurrency: int | None) -> None:
    items, arrivals = [Item([i], 1) for i in range(11)], [0.1 * i for i in range(11)]
    shares = Load("http://a", None, "m", 0.0, items, arrivals, concurrency).shares(count)
    assert len(shares) == min(count, 11, concurrency or 11)
    sent = sorted(pair for share in shares for pair in zip(share.arrivals, share.items, strict=True))
    assert sent == list(zip(arrivals, items, strict=True))
    if concurrency is not None:
        assert sum(share.concurrency or 0 for share in shares) == concurrency
        assert all(share.concurrency for share in shares)


def exchange(answer: bytes, cut: int, use: Callable[[Client], Any]) -> tuple[Any, bytes]:
    """What `use` makes of a server that answers with these bytes, `cut` at a time; and what it was asked."""
    asked = b""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length:")[1].split()[0])
        asked = head + await reader.readexactly(length)
        for i in range(0, len(answer), cut):
            writer.write(answer[i : i + cut])
            await writer.drain()
            await asyncio.sleep(0)
        writer.close()

    async def both() -> Any:
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            return await asyncio.wait_for(use(Client(f"http://127.0.0.1:{port}/base", "key")), 10)

    return asyncio.run(both()), asked


async def collect(client: Client) -> list[dict[str, Any]]:
    return [json.loads(data) async for data in client.events("/v1/completions", b'{"prompt": [1]}')]


def chunked(body: bytes, size: int) -> bytes:
    parts = [body[i : i + size] for i in range(0, len(body), size)]
    return b"".join(f"{len(part):x}\r\n".encode() + part + b"\r\n" for part in [*parts, b""])


BODY = ': hello\n\ndata: {"a": 1}\n\ndata: {"b": "é\\n"}\r\n\r\ndata: [DONE]\n\n'.encode()


@pytest.mark.parametrize("cut", [1, 2, 7, 1000])
@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_events_survive_any_cutting(cut: int, chunk: int) -> None:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    events, asked = exchange(head + chunked(BODY, chunk), cut, collect)
    assert events == [{"a": 1}, {"b": "é\n"}]
    assert asked.startswith(b"POST /base/v1/completions HTTP/1.1\r\n")
    assert b"Authorization: Bearer key\r\n" in asked
    assert asked.endswith(b'\r\n\r\n{"prompt": [1]}')


def test_events_until_the_server_closes() -> None:
    assert exchange(b"HTTP/1.0 200 OK\r\n\r\n" + BODY, 5, collect)[0] == [{"a": 1}, {"b": "é\n"}]


def test_json_of_a_known_length() -> None:
    answer = b'HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\n{"a": 1}'
    assert exchange(answer, 3, lambda client: client.get_json("/v1/models"))[0] == {"a": 1}


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"HTTP/1.1 429 Too Many\r\nContent-Length: 4\r\n\r\nwait", HttpError),
        (b"HTTP/1.1 200 OK\r\n\r\ndata: {}\n\n", ConnectionError),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\ndat", ConnectionError),
        (b"", ConnectionError),
        (b"SSH-2.0\r\n\r\n", ConnectionError),
    ],
)
def test_a_bad_answer_is_an_error(answer: bytes, error: type[Exception]) -> None:
    with pytest.raises(error):
        exchange(answer, 1000, collect)


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://a", "http://"])
def test_a_url_needs_a_scheme_and_a_host(url: str) -> None:
    with pytest.raises(ValueError, match="must be like"):
        Client(url)
