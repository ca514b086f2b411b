"""Many at once, those who leave early, and those who come too late."""

import asyncio
from collections.abc import Callable

import httpx
import openai
import pytest

from tests.server.conftest import wait_for

ENDLESS = {"prompt": "go on", "max_tokens": 8000, "ignore_eos": True, "temperature": 0}


def is_idle(server) -> bool:
    load = server.get("/load").json()
    return load["num_requests_running"] == load["num_requests_waiting"] == 0


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.005)


def test_concurrent_streams_equal_single_answers(tiny):
    prompts = [f"{'x' * (7 * i)} prompt number {i}" for i in range(16)]
    options = {"model": "tiny", "max_tokens": 40, "temperature": 0, "extra_body": {"ignore_eos": True}}

    async def stream(client: openai.AsyncOpenAI, prompt: str) -> str:
        chunks = await client.completions.create(prompt=prompt, stream=True, **options)
        return "".join([chunk.choices[0].text async for chunk in chunks])

    async def all_streams() -> list[str]:
        async with tiny.async_client() as client:
            return await asyncio.gather(*(stream(client, prompt) for prompt in prompts))

    client = tiny.client()
    expected = [client.completions.create(prompt=prompt, **options).choices[0].text for prompt in prompts]
    assert asyncio.run(all_streams()) == expected


@pytest.mark.parametrize("n", [1, 3])
def test_a_client_that_leaves_a_stream_frees_its_blocks(tiny, n):
    before = tiny.metrics()
    with (
        httpx.Client(timeout=60) as client,
        client.stream("POST", tiny.url + "/v1/completions", json=ENDLESS | {"stream": True, "n": n}) as response,
    ):
        lines = response.iter_lines()  # kept: dropping it would close the connection
        next(lines)
        assert tiny.get("/load").json()["num_requests_running"] == n
    check_aborted(tiny, before, n)


@pytest.mark.parametrize("prompts", [1, 3])
def test_a_client_that_does_not_wait_for_its_answer_frees_its_blocks(tiny, prompts):
    before = tiny.metrics()
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(tiny.url + "/v1/completions", json=ENDLESS | {"prompt": ["a"] * prompts}, timeout=0.5)
    check_aborted(tiny, before, prompts)


def check_aborted(server, before: dict[str, float], count: int) -> None:
    wait_for(lambda: is_idle(server), "the request is gone")
    wait_for(lambda: server.metrics()["vllm:kv_cache_usage_perc"] == 0, "its blocks are free")
    after = server.metrics()
    aborted = "vllm:request_success_total{finished_reason=abort}"
    assert after[aborted] - before[aborted] == count
    generated = after["vllm:generation_tokens_total"] - before["vllm:generation_tokens_total"]
    assert generated < count * ENDLESS["max_tokens"]
    assert server.get("/load").json()["server_load"] == 0


def test_full_queue(start):
    server = start("--max-num-seqs", "1", "--max-num-queued-requests", "1")
    url, body = server.url + "/v1/completions", ENDLESS | {"stream": True}
    with httpx.Client(timeout=60) as client, client.stream("POST", url, json=body) as running:
        lines = running.iter_lines()
        next(lines)

        async def crowd() -> list[httpx.Response]:
            async with httpx.AsyncClient(timeout=60) as late:
                waiting = asyncio.create_task(late.post(url, json=ENDLESS))
                await until(lambda: server.get("/load").json()["num_requests_waiting"] == 1)
                bodies = [ENDLESS, body, ENDLESS | {"prompt": ["a", "b"]}]
                refused = [await late.post(url, json=b) for b in bodies]
                waiting.cancel()
                return refused

        for response in asyncio.run(crowd()):
            assert response.status_code == 429
            assert int(response.headers["retry-after"]) >= 1
            error = response.json()["error"]
            assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
        wait_for(lambda: server.get("/load").json()["num_requests_waiting"] == 0, "the one that waited is gone")
        with pytest.raises(openai.RateLimitError):  # two never fit, and neither of them may stay
            server.client().completions.create(
                model="", prompt=["a", "b", "c"], max_tokens=1, extra_body={"model": None}
            )
        wait_for(lambda: server.get("/load").json()["num_requests_waiting"] == 0, "none of a refused list stays")
        assert server.metrics()["paged:request_errors_total{status=429,code=queue_full}"] == 4
    wait_for(lambda: is_idle(server), "the running one is gone")


def test_priority(start):
    server = start("--max-num-seqs", "1", "--scheduling-policy", "priority")
    order: list[str] = []

    async def complete(client: httpx.AsyncClient, name: str, priority: int) -> None:
        body = ENDLESS | {"prompt": name, "max_tokens": 200, "priority": priority}
        response = await client.post(server.url + "/v1/completions", json=body)
        assert response.status_code == 200, response.text
        order.append(name)

    async def crowd() -> None:
        async with httpx.AsyncClient(timeout=60) as client:
            tasks = [asyncio.create_task(complete(client, "first", -9))]
            await until(lambda: server.get("/load").json()["num_requests_running"] == 1)
            tasks += [asyncio.create_task(complete(client, f"{priority}", priority)) for priority in (3, 1, 2)]
            await asyncio.gather(*tasks)

    asyncio.run(crowd())
    assert order == ["first", "1", "2", "3"]
