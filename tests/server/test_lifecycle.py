"""Loading, draining, and the ways in which a start fails."""

import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading

import httpx
import pytest

from server.__main__ import main
from tests.server.conftest import FOUR, ROOT, TINY_FLAGS, launch, wait_for, wait_until_ready
from tests.server.test_load import ENDLESS
from tests.server.test_refusals import check_error


def test_it_answers_while_it_loads(tmp_path, tiny_model):
    server = launch(tmp_path / "log", "--model", tiny_model, *TINY_FLAGS, *FOUR)
    assert server.get("/health").json() == {"status": "loading"}
    for response in (server.get("/ready"), server.get("/v1/models"), server.post("/v1/completions", {})):
        check_error(response, 503, None, "loading")
        assert int(response.headers["retry-after"]) >= 1
    wait_until_ready(server)
    assert server.get("/health").json() == {"status": "ready"}
    assert server.stop() == 0


def test_a_signal_while_it_loads_ends_it(tmp_path, tiny_model):
    server = launch(tmp_path / "log", "--model", tiny_model, *TINY_FLAGS, *FOUR)
    assert server.stop() == 0


class Stream(threading.Thread):
    """Reads one stream to its end."""

    def __init__(self, url: str, max_tokens: int):
        super().__init__()
        self.url, self.max_tokens = url, max_tokens
        self.started = threading.Event()
        self.lines: list[str] = []

    def run(self) -> None:
        body = ENDLESS | {"max_tokens": self.max_tokens, "stream": True}
        with (
            contextlib.suppress(httpx.RemoteProtocolError),  # cut off: what came before is in `lines`
            httpx.stream("POST", self.url + "/v1/completions", json=body, timeout=120) as response,
        ):
            for line in response.iter_lines():
                self.lines += [line] if line else []
                self.started.set()


def test_a_signal_lets_running_requests_finish(start):
    server = start()
    stream = Stream(server.url, 3000)
    stream.start()
    assert stream.started.wait(60)
    server.process.send_signal(signal.SIGTERM)
    wait_for(lambda: server.get("/ready").status_code == 503, "it is not ready any more")
    assert server.get("/health").status_code == 200
    refused = server.post("/v1/completions", ENDLESS)
    check_error(refused, 503, None, "draining")
    stream.join(120)
    assert stream.lines[-1] == "data: [DONE]"
    assert json.loads(stream.lines[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    assert server.process.wait(60) == 0


def test_a_drain_has_an_end(start):
    server = start("--drain-timeout", "0.2")
    stream = Stream(server.url, 8000)
    stream.start()
    assert stream.started.wait(60)
    assert server.stop() == 0
    stream.join(60)
    error = json.loads(stream.lines[-1].removeprefix("data: "))["error"]
    assert (error["type"], error["code"]) == ("server_error", "engine_stopped")


def test_a_second_signal_ends_it_at_once(start):
    server = start("--drain-timeout", "600")
    stream = Stream(server.url, 8000)
    stream.start()
    assert stream.started.wait(60)
    server.process.send_signal(signal.SIGINT)
    wait_for(lambda: server.get("/ready").status_code == 503, "it drains")
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(30) == 1


def fail(*flags: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "server", *flags]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    return result.returncode, result.stdout + result.stderr


def test_a_model_that_cannot_be_loaded(tmp_path):
    status, output = fail("--port", "0", "--model", str(tmp_path))
    assert status == 1
    assert "could not be loaded" in output
    assert "Traceback" not in output


def test_a_port_that_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        status, output = fail("--port", str(taken.getsockname()[1]))
    assert status == 1
    assert "cannot listen" in output
    assert "Traceback" not in output


@pytest.mark.parametrize(
    "flags",
    [
        ["--port", "70000"],
        ["--max-num-seqs", "0"],
        ["--chat-template", "/no/such/file"],
        ["--api-key", ""],
        ["--drain-timeout", "-1"],
        ["--no-such-flag"],
    ],
)
def test_bad_flags(flags, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["server", *flags])
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 2
    assert flags[0] in capsys.readouterr().err


def test_chat_template_of_ones_own(start, tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}[{{ m['content'] }}]{% endfor %}")
    server = start("--chat-template", str(template))
    body = {"messages": [{"role": "user", "content": "ab"}], "return_token_strs": True}
    assert server.post("/tokenize", body).json()["token_strs"] == ["[", "a", "b", "]"]


def test_without_a_tokenizer(start):
    server = start("--skip-tokenizer-init")
    check_error(server.post("/v1/completions", {"prompt": "a"}), 400, "prompt", "invalid_value")
    check_error(
        server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
        400,
        "messages",
        "invalid_value",
    )
    body = {"prompt": [1, 2, 3], "max_tokens": 5, "ignore_eos": True, "return_token_ids": True}
    choice = server.post("/v1/completions", body).json()["choices"][0]
    assert len(choice["token_ids"]) == 5
    assert choice["text"] == ""
