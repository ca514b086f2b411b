"""The engine's own faults: a step that raises, a device that hangs, a thread that dies."""

import asyncio
import json
import threading

import httpx
import pytest

from paged.config import EngineConfig
from server.app import build_app
from server.args import ServerArgs
from server.service import Service
from tests.server.test_refusals import check_error

BODY = {"prompt": "a", "max_tokens": 30, "temperature": 0, "ignore_eos": True}


@pytest.fixture
def service(tiny_model):
    """A loaded service in this process, whose engine can be made to fail."""
    options = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "num_gpu_blocks_override": 2100}
    config = EngineConfig.from_kwargs(model=tiny_model, load_format="dummy", dtype="float32", **options)
    service = Service(ServerArgs(max_step_age=0.2), config)
    asyncio.run(service.load())
    yield service
    assert asyncio.run(service.host.shutdown(30))


def ask(service, *requests: tuple[str, str, dict | None]) -> list[httpx.Response]:
    async def send_all() -> list[httpx.Response]:
        transport = httpx.ASGITransport(build_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://server", timeout=60) as client:
            return [await client.request(method, path, json=body) for method, path, body in requests]

    return asyncio.run(send_all())


def complete(service, **fields) -> httpx.Response:
    return ask(service, ("POST", "/v1/completions", BODY | fields))[0]


def fail_at_step(service, monkeypatch, number: int, error: BaseException) -> None:
    runner = service.engine._engine.runner
    execute, steps = runner.execute, iter(range(1, 10**9))

    def failing(plan):
        if next(steps) == number:
            raise error
        return execute(plan)

    monkeypatch.setattr(runner, "execute", failing)


def test_a_step_that_fails_is_a_500_and_the_next_request_is_fine(service, monkeypatch):
    expected = complete(service).json()["choices"][0]["text"]
    fail_at_step(service, monkeypatch, 3, RuntimeError("out of luck"))
    error = check_error(complete(service), 500, None, "request_failed")
    assert error["type"] == "server_error"
    assert complete(service).json()["choices"][0]["text"] == expected


def test_a_step_that_fails_ends_a_stream_with_an_error(service, monkeypatch):
    fail_at_step(service, monkeypatch, 9, RuntimeError("out of luck"))
    response = complete(service, stream=True)
    assert response.status_code == 200
    *events, last = response.text.strip().split("\n\n")
    assert all("choices" in json.loads(event.removeprefix("data: ")) for event in events)
    error = json.loads(last.removeprefix("data: "))["error"]
    assert (error["type"], error["code"]) == ("server_error", "request_failed")


def test_a_step_that_hangs_makes_the_server_unhealthy(service, monkeypatch):
    runner, go_on = service.engine._engine.runner, threading.Event()
    execute = runner.execute
    monkeypatch.setattr(runner, "execute", lambda plan: go_on.wait() and execute(plan))

    async def watch() -> list[httpx.Response]:
        transport = httpx.ASGITransport(build_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://server", timeout=60) as client:
            healthy = await client.get("/health")
            work = asyncio.create_task(client.post("/v1/completions", json=BODY))
            async with asyncio.timeout(60):
                while (stuck := await client.get("/health")).status_code == 200:
                    await asyncio.sleep(0.02)
            not_ready = await client.get("/ready")
            go_on.set()
            done = await work
            return [healthy, stuck, not_ready, done, await client.get("/health")]

    healthy, stuck, not_ready, done, recovered = asyncio.run(watch())
    assert healthy.status_code == done.status_code == recovered.status_code == 200
    check_error(stuck, 503, None, "engine_stuck")
    check_error(not_ready, 503, None, "engine_stuck")


def test_an_engine_that_dies_makes_the_server_unhealthy(service, monkeypatch):
    fail_at_step(service, monkeypatch, 1, KeyboardInterrupt("the thread's end"))
    asked, close = threading.Event(), service.engine._engine.close
    monkeypatch.setattr(service.engine._engine, "close", lambda: (asked.wait(60), close()))
    check_error(complete(service), 503, None, "engine_stopped")
    for thread_ended in (False, True):
        health, again = ask(service, ("GET", "/health", None), ("POST", "/v1/completions", BODY))
        error = check_error(health, 503, None, "engine_dead")
        assert "the thread's end" in error["message"]
        error = check_error(again, 503, None, "engine_stopped")
        assert "the thread's end" in error["message"]
        if not thread_ended:
            asked.set()
            service.engine.thread.join()
