"""Servers as a user starts them: processes of `python -m server`, asked over the network."""

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.server.tiny import write_model

ROOT = Path(__file__).parents[2]
TINY_FLAGS = ["--load-format", "dummy", "--dtype", "float32", "--max-num-batched-tokens", "32"]
TINY_FLAGS += ["--num-gpu-blocks-override", "2100"]
FOUR = ["--max-num-seqs", "4"]  # servers of one shape share their compiled programs
START_SECONDS = 240


@dataclass
class ServerProcess:
    process: subprocess.Popen
    url: str
    log: Path

    def client(self, **options) -> openai.OpenAI:
        return openai.OpenAI(**client_options(self.url) | options)

    def async_client(self, **options) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(**client_options(self.url) | options)

    def get(self, path: str, **options) -> httpx.Response:
        return httpx.get(self.url + path, timeout=30, **options)

    def post(self, path: str, body: dict, **options) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=120, **options)

    def metrics(self) -> dict[str, float]:
        """Samples by name; those with more labels than all have as name{label=value}."""
        samples = {}
        for family in text_string_to_metric_families(self.get("/metrics").text):
            for sample in family.samples:
                more = [k for k in ("finished_reason", "status", "code", "le") if k in sample.labels]
                labels = ",".join(f"{k}={sample.labels[k]}" for k in more)
                samples[sample.name + (f"{{{labels}}}" if labels else "")] = sample.value
        return samples

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=60)


def client_options(url: str) -> dict:
    return {"base_url": f"{url}/v1", "api_key": "any", "max_retries": 0, "timeout": 120}


def wait_for[T](condition: Callable[[], T], what: str, seconds: float = 60) -> T:
    """The first true value of `condition()`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError(f"{what}: not within {seconds} seconds")


def launch(log: Path, *flags: str) -> ServerProcess:
    """Starts a server on a free port and waits until it listens, which is before it is ready."""
    command = [sys.executable, "-m", "server", "--port", "0", *flags]
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)

    def listening() -> str | None:
        assert process.poll() is None, log.read_text()
        match = re.search(r"listening on 127\.0\.0\.1:(\d+)", log.read_text())
        return match and match[1]

    port = wait_for(listening, "the server listens", START_SECONDS)
    return ServerProcess(process, f"http://127.0.0.1:{port}", log)


def wait_until_ready(server: ServerProcess) -> ServerProcess:
    def ready() -> bool:
        assert server.process.poll() is None, server.log.read_text()
        return server.get("/ready").status_code == 200

    wait_for(ready, "the server is ready", START_SECONDS)
    return server


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> str:
    return write_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def start(tmp_path, tiny_model) -> Iterator[Callable[..., ServerProcess]]:
    """start(*flags): a server of the tiny model for one test, ready."""
    servers: list[ServerProcess] = []

    def start_server(*flags: str) -> ServerProcess:
        log = tmp_path / f"server{len(servers)}.log"
        servers.append(
            launch(log, "--model", tiny_model, *TINY_FLAGS, *(FOUR if "--max-num-seqs" not in flags else []), *flags)
        )
        return wait_until_ready(servers[-1])

    yield start_server
    for server in servers:
        server.process.kill()
        server.process.wait()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, tiny_model) -> Iterator[ServerProcess]:
    """A server of the tiny model for all tests."""
    flags = [*FOUR, "--served-model-name", "tiny"]
    flags += ["--max-body-bytes", "100000", "--max-choices", "64"]
    log = tmp_path_factory.mktemp("server") / "tiny.log"
    server = wait_until_ready(
        launch(log, "--model", tiny_model, *TINY_FLAGS, *(FOUR if "--max-num-seqs" not in flags else []), *flags)
    )
    yield server
    assert server.stop() == 0, server.log.read_text()


@pytest.fixture(scope="session")
def smollm(tmp_path_factory) -> Iterator[ServerProcess]:
    """A server of the default model for all tests."""
    flags = ["--dtype", "float32", "--max-num-seqs", "2", "--max-model-len", "512", "--max-num-batched-tokens", "32"]
    server = wait_until_ready(launch(tmp_path_factory.mktemp("server") / "smollm.log", *flags))
    yield server
    assert server.stop() == 0, server.log.read_text()
