"""Front ends in processes of their own: shared work, and what happens when one of the processes dies."""

import asyncio
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
from pathlib import Path

import httpx

from paged.engine_client import EngineInfo
from server.link import EngineLink
from tests.server.conftest import ROOT, wait_for
from tests.server.test_lifecycle import Stream
from tests.server.test_load import ENDLESS, is_idle
from tests.server.test_refusals import check_error

TWO = ["--api-server-count", "2"]


def children(server) -> list[int]:
    """The front ends' process ids; multiprocessing has a child of its own beside them."""
    pids = []
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":\t", 1) for line in status.read_text().splitlines() if ":\t" in line)
            command = (status.parent / "cmdline").read_text()
        except OSError:
            continue
        if int(fields["PPid"]) == server.process.pid and "spawn_main" in command:
            pids.append(int(fields["Pid"]))
    return sorted(pids)


def test_front_ends_need_no_jax():
    """It would cost each of them seconds and hundreds of megabytes."""
    code = "import sys, server.front_end; print(sorted({'jax', 'flax', 'models', 'transformers'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


class Tokenizer:
    """`imported` when one was unpickled in this process."""

    imported: threading.Event

    def __reduce__(self):
        return Tokenizer._unpickle, ()

    @staticmethod
    def _unpickle() -> "Tokenizer":
        assert Tokenizer.imported.is_set(), "another thread is at the import that unpickling needs"
        return Tokenizer()


def test_a_tokenizer_is_unpickled_when_its_packages_are_imported():
    """Not meanwhile, in another thread; all else is taken at once."""

    async def run() -> None:
        Tokenizer.imported = threading.Event()
        importing = threading.Thread(target=Tokenizer.imported.wait)
        importing.start()
        engine, front = multiprocessing.Pipe()
        link = EngineLink(front, importing)
        engine.send([("drain",)])
        await asyncio.wait_for(link.drain.wait(), 60)
        info = EngineInfo(Tokenizer(), 8, 8, 1, 1, {})
        engine.send([("loaded", pickle.dumps(info)), ("open",)])
        await asyncio.sleep(0.2)
        assert not link.loaded.is_set() and not link.opened.is_set()
        Tokenizer.imported.set()
        await asyncio.wait_for(link.opened.wait(), 60)
        assert isinstance(link.engine.tokenizer, Tokenizer)
        engine.close()
        await asyncio.wait_for(link.stop.wait(), 60)

    asyncio.run(run())


def test_requests_of_two_front_ends(start):
    """Each answers alone what the other has no part in; what they count is counted together."""
    server = start(*TWO)
    assert len(children(server)) == 2
    body = ENDLESS | {"max_tokens": 30}

    async def crowd() -> list[httpx.Response]:
        async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_keepalive_connections=0)) as client:
            return await asyncio.gather(*(client.post(server.url + "/v1/completions", json=body) for _ in range(24)))

    answers = asyncio.run(crowd())
    assert len({answer.json()["choices"][0]["text"] for answer in answers}) == 1
    for _ in range(10):
        check_error(server.post("/v1/completions", {"prompt": 5}), 400, "prompt", "invalid_type")
    for _ in range(4):  # from either
        metrics = server.metrics()
        assert metrics["vllm:request_success_total{finished_reason=length}"] == 24
        assert metrics["paged:request_errors_total{status=400,code=invalid_type}"] == 10
        assert server.get("/load").json()["server_load"] == 0
    assert server.stop() == 0


def test_a_stop_string_is_found_in_a_front_end_and_frees_the_blocks(start):
    server = start()
    free = server.post("/v1/completions", ENDLESS | {"max_tokens": 60}).json()["choices"][0]["text"]
    stop = free[20:24]
    answer = server.post("/v1/completions", ENDLESS | {"stop": stop}).json()
    assert answer["choices"][0]["text"] == free[: free.index(stop)]
    assert answer["choices"][0]["finish_reason"] == "stop"
    wait_for(lambda: is_idle(server), "the engine was told")
    metrics = server.metrics()
    assert metrics["vllm:request_success_total{finished_reason=stop}"] == 1
    assert metrics["vllm:request_success_total{finished_reason=abort}"] == 0
    assert server.stop() == 0


def test_a_front_end_that_stands_still_holds_up_nobody_and_loses_nothing(start):
    server = start(*TWO)
    expected = server.post("/v1/completions", ENDLESS | {"max_tokens": 1500}).json()["choices"][0]["text"]
    streams = [Stream(server.url, 1500) for _ in range(3)]
    for stream in streams:
        stream.start()
    assert all(stream.started.wait(60) for stream in streams)
    still, _ = children(server)
    os.kill(still, signal.SIGSTOP)
    try:
        assert server.post("/v1/completions", ENDLESS | {"max_tokens": 3}).status_code == 200
        wait_for(lambda: is_idle(server), "the engine has finished everything")
    finally:
        os.kill(still, signal.SIGCONT)
    for stream in streams:
        stream.join(60)
        *events, done = [line.removeprefix("data: ") for line in stream.lines]
        assert done == "[DONE]"
        assert "".join(json.loads(event)["choices"][0]["text"] for event in events) == expected
    assert server.stop() == 0


def test_a_front_end_that_dies_is_replaced_and_its_requests_are_gone(start):
    server = start()
    [first] = children(server)
    stream = Stream(server.url, 8000)
    stream.start()
    assert stream.started.wait(60)
    os.kill(first, signal.SIGKILL)
    stream.join(60)
    assert not any("[DONE]" in line for line in stream.lines)
    wait_for(lambda: len(children(server)) == 1 and children(server) != [first], "another has started")
    assert server.post("/v1/completions", ENDLESS | {"max_tokens": 3}).status_code == 200
    wait_for(lambda: is_idle(server), "the dead one's request is gone")
    assert server.metrics()["vllm:request_success_total{finished_reason=abort}"] == 1
    assert "a front end died" in server.log.read_text()
    assert server.stop() == 0


def test_an_engine_process_that_dies_ends_every_stream_with_an_error(start):
    server = start(*TWO)
    streams = [Stream(server.url, 8000) for _ in range(4)]
    for stream in streams:
        stream.start()
    assert all(stream.started.wait(60) for stream in streams)
    pids = children(server)
    server.process.kill()
    health = server.get("/health")
    check_error(health, 503, None, "engine_dead")
    check_error(server.post("/v1/completions", ENDLESS), 503, None, "engine_stopped")
    for stream in streams:
        stream.join(60)
        error = json.loads(stream.lines[-1].removeprefix("data: "))["error"]
        assert (error["type"], error["code"]) == ("server_error", "engine_stopped")
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), "the front ends follow")
