"""python -m scripts.batch on a tiny model whose greedy tokens transformers has computed: whole runs, kills, limits."""

import asyncio
import io
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tqdm import tqdm

from paged.async_engine import AsyncEngine
from paged.config import EngineConfig
from paged.errors import EngineStoppedError
from scripts.batch.__main__ import main
from scripts.batch.lines import read_lines
from scripts.batch.results import ResultFile
from scripts.batch.run import BatchRun, Summary, Task, UniqueIds, tasks

ROOT = Path(__file__).parents[2]
MODEL = str(ROOT / "tests" / "fixtures" / "llama3")
EXPECTED = np.load(Path(MODEL) / "expected.npz")
PROMPTS = [EXPECTED[f"prompt_{i}"].tolist() for i in range(3)]
GREEDY = [EXPECTED[f"greedy_{i}"].tolist() for i in range(3)]
SMALL = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "num_gpu_blocks_override": 80, "dtype": "float32"}
FLAGS = ["--model", MODEL, *(word for k, v in SMALL.items() for word in (f"--{k}", str(v)))]
MESSAGES = [{"role": "user", "content": "Hi"}]


def greedy_line(i: int, tokens: int, **fields: Any) -> dict[str, Any]:
    line = {"prompt": PROMPTS[i % 3], "temperature": 0, "ignore_eos": True, "max_tokens": tokens}
    return line | {"return_token_ids": True} | fields


def write_lines(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def read_results(path: Path) -> dict[int, dict[str, Any]]:
    results = [json.loads(text) for text in path.read_bytes().splitlines()]
    by_line = {result["line"]: result for result in results}
    assert len(by_line) == len(results), "a line was answered twice"
    return by_line


def openai_line(custom_id: str, url: str, **body: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
TOP_3 = {"logprobs": True, "top_logprobs": 3}
MIXED = [
    greedy_line(0, 10),
    greedy_line(1, 7, id="mine", logprobs=2, prompt_logprobs=0),
    "{not json",
    openai_line("c", CHAT, messages=MESSAGES, max_tokens=5, temperature=0, ignore_eos=True, **TOP_3),
    openai_line("p", COMPLETIONS, prompt=PROMPTS[:2], n=2, max_tokens=4, seed=3, logprobs=1, ignore_eos=True),
    "",
    openai_line("c", CHAT, messages=MESSAGES, max_tokens=5),
    greedy_line(2, 5, temperature=-1),
    {"prompt": "some words", "max_tokens": 3, "n": 2, "ignore_eos": True, "seed": 5},
    {"prompt": [1] * 300},
    {"prompt": "word " * 400, "id": "long"},
    openai_line("tools", CHAT, messages=MESSAGES, tools=[]),
    {"messages": [{"role": "nobody", "content": "Hi"}]},
    {"prompt": [5000]},
    {"prompt": "lone surrogate \ud800", "max_tokens": 1},
    greedy_line(2, 64, id="last"),
]  # fmt: skip


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, dict[str, Any]], dict[str, Any]]:
    """The folder, the results by line, and the summary of one run over MIXED."""
    folder = tmp_path_factory.mktemp("mixed")
    write_lines(folder / "in", MIXED)
    args = [str(folder / "in"), str(folder / "out"), "--summary", str(folder / "summary"), *FLAGS]
    assert main(args) == 0
    return folder, read_results(folder / "out"), json.loads((folder / "summary").read_text())


def test_every_line_but_the_blank_one_has_one_result(mixed) -> None:
    _, results, summary = mixed
    assert sorted(results) == [n for n, line in enumerate(MIXED, start=1) if line]
    failed = {
        n for n, r in results.items() if (r["response"]["status_code"] != 200 if r.get("response") else r["error"])
    }
    assert failed == {3, 7, 8, 10, 11, 12, 13, 14, 15}
    assert summary["requests"] == {"ok": len(results) - len(failed), "failed": len(failed), "done_before": 0}


def test_plain_results_are_what_transformers_generates(mixed) -> None:
    _, results, _ = mixed
    for number, id, i, tokens in ((1, 1, 0, 10), (2, "mine", 1, 7), (16, "last", 2, 64)):
        result = results[number]
        assert result["id"] == id
        assert result["token_ids"] == GREEDY[i][:tokens]
        assert (result["finish_reason"], result["stop_reason"], result["error"]) == ("length", None, None)
        assert (result["prompt_tokens"], result["completion_tokens"]) == (len(PROMPTS[i]), tokens)
        assert result["text"]


def test_plain_logprobs_are_transformers(mixed) -> None:
    result = mixed[1][2]
    expected = EXPECTED["logprobs_1"]
    given = [0.0] + [candidates[0]["logprob"] for candidates in result["prompt_logprobs"][1:] + result["logprobs"]]
    assert result["prompt_logprobs"][0] is None
    np.testing.assert_allclose(given[1:], expected[: len(given) - 1], atol=1e-4)
    for token_id, candidates in zip(result["token_ids"], result["logprobs"], strict=True):
        assert candidates[0]["token_id"] == token_id
        assert [c["rank"] for c in candidates] == [1, 2]
    assert all(len(candidates) == 1 for candidates in result["prompt_logprobs"][1:])


def test_an_openai_chat_line_gets_the_body_of_a_chat_completion(mixed) -> None:
    from openai.types.chat import ChatCompletion

    result = mixed[1][4]
    assert (result["custom_id"], result["error"], result["response"]["status_code"]) == ("c", None, 200)
    body = ChatCompletion.model_validate(result["response"]["body"], strict=True)
    (choice,) = body.choices
    assert (choice.finish_reason, choice.message.role, body.model) == ("length", "assistant", MODEL)
    assert choice.logprobs is not None and choice.logprobs.content is not None
    assert [len(token.top_logprobs) for token in choice.logprobs.content] == [3] * 5
    assert all(token.top_logprobs[0].logprob == token.logprob for token in choice.logprobs.content), "greedy"
    assert body.usage is not None
    assert body.usage.total_tokens == body.usage.prompt_tokens + 5


def test_an_openai_completions_line_has_a_choice_for_each_prompt_and_n(mixed) -> None:
    from openai.types import Completion

    body = Completion.model_validate(mixed[1][5]["response"]["body"], strict=True)
    assert [choice.index for choice in body.choices] == [0, 1, 2, 3]
    assert body.usage is not None
    assert (body.usage.prompt_tokens, body.usage.completion_tokens) == (len(PROMPTS[0]) + len(PROMPTS[1]), 16)
    for choice in body.choices:
        assert choice.logprobs is not None
        assert len(choice.logprobs.tokens or []) == len(choice.logprobs.token_logprobs or []) == 4


def test_n_gives_several_outputs(mixed) -> None:
    result = mixed[1][9]
    assert [output["completion_tokens"] for output in result["outputs"]] == [3, 3]
    assert result["completion_tokens"] == 6
    assert "text" not in result


@pytest.mark.parametrize(
    ("line", "id", "param", "word"),
    [
        (3, 3, None, "not JSON"),
        (8, 8, "temperature", "temperature"),
        (10, 10, "prompt", "300 tokens"),
        (11, "long", "prompt", "tokens"),
        (13, 13, "messages[0].role", "role"),
        (14, 14, "prompt", "token ids"),
        (15, 15, None, ""),
    ],
)
def test_a_bad_plain_line_says_what_is_wrong(mixed, line: int, id: Any, param: str | None, word: str) -> None:
    result = mixed[1][line]
    assert result["id"] == id
    assert result["error"]["param"] == param
    assert word in result["error"]["message"]


@pytest.mark.parametrize(
    ("line", "custom_id", "param", "word"), [(7, "c", "custom_id", "line 4"), (12, "tools", "tools", "tools")]
)
def test_a_bad_openai_line_is_a_400(mixed, line: int, custom_id: str, param: str, word: str) -> None:
    result = mixed[1][line]
    assert (result["custom_id"], result["error"], result["response"]["status_code"]) == (custom_id, None, 400)
    error = result["response"]["body"]["error"]
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert word in error["message"]


def test_the_summary_adds_up(mixed) -> None:
    _, _, summary = mixed
    assert summary["completion_tokens"] == 10 + 7 + 5 + 16 + 6 + 64
    latency, first = summary["latency_seconds"], summary["time_to_first_token_seconds"]
    assert 0 < first["p50"] <= latency["p50"] <= latency["p95"] <= latency["p99"] <= summary["seconds"]


def test_a_complete_run_has_nothing_left_to_do(mixed, capsys) -> None:
    folder, _, _ = mixed
    before = (folder / "out").read_bytes()
    assert main([str(folder / "in"), str(folder / "out"), *FLAGS]) == 0
    assert "is complete" in capsys.readouterr().err
    assert (folder / "out").read_bytes() == before


def test_another_input_or_model_does_not_go_on_with_these_results(mixed, capsys, tmp_path) -> None:
    folder, _, _ = mixed
    before = (folder / "out").read_bytes()
    changed = write_lines(tmp_path / "in", [greedy_line(0, 11), *MIXED[1:]])
    shorter = write_lines(tmp_path / "short", MIXED[:4])
    for path, more, word in (
        (changed, [], "result for line 1 that was made from another input"),
        (folder / "in", ["--seed", "1"], "or with other model options"),
        (shorter, [], "ends at line 4"),
    ):
        assert main([str(path), str(folder / "out"), *FLAGS, *more]) == 1
        assert word in capsys.readouterr().err
    assert (folder / "out").read_bytes() == before


def test_a_model_that_is_not_there_is_an_error_in_words(tmp_path, capsys) -> None:
    path = write_lines(tmp_path / "in", [greedy_line(0, 1)])
    assert main([str(path), str(tmp_path / "out"), "--model", str(tmp_path / "none")]) == 1
    assert "error: the engine could not be loaded: model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "word"), [(["none", "out"], "there is none at none"), (["{in}", "{in}"], "another file")]
)
def test_bad_files_are_refused_at_once(tmp_path, capsys, argv: list[str], word: str) -> None:
    path = write_lines(tmp_path / "in", [])
    with pytest.raises(SystemExit) as e:
        main([word.format(**{"in": path}) for word in argv])
    assert e.value.code == 2
    assert word in capsys.readouterr().err


def start(*args: str, **options: Any) -> subprocess.Popen:
    command = [sys.executable, "-m", "scripts.batch", *args, *FLAGS]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, **options)


def kill_after(process: subprocess.Popen, output: Path, num_bytes: int) -> None:
    """kill -9 as soon as the output has grown by this much."""
    begin = output.stat().st_size if output.exists() else 0
    deadline = time.monotonic() + 200
    while not output.exists() or output.stat().st_size < begin + num_bytes:
        assert process.poll() is None, process.stderr and process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_kill_minus_9_in_the_middle_loses_and_repeats_nothing(tmp_path) -> None:
    lines: list[Any] = [greedy_line(i, 8 + i % 57) for i in range(400)]
    lines[100:100] = ["{broken", {"id": 17, "prompt": [3], "max_tokens": 1}, {"id": 17, "prompt": [3]}]
    path, output = write_lines(tmp_path / "in", lines), tmp_path / "out"
    done = [0]
    for grow, torn in ((3000, b""), (6000, b'{"line": 7, "dig'), (1000, b"{")):
        kill_after(start(str(path), str(output)), output, grow)
        done.append(output.read_bytes().count(b"\n"))
        with output.open("ab") as file:
            file.write(torn if output.read_bytes().endswith(b"\n") else b"")
    assert done == sorted(set(done)), "each run got further"
    assert done[-1] < len(lines), "it was killed before the end"

    process = start(str(path), str(output), "--no-progress", "--summary", str(tmp_path / "summary"))
    _, log = process.communicate(timeout=250)
    assert process.returncode == 0, log.decode()
    results = read_results(output)
    assert sorted(results) == list(range(1, len(lines) + 1))
    assert sum(result["error"] is not None for result in results.values()) == 2
    for number, line in enumerate(lines, start=1):
        if isinstance(line, dict) and "ignore_eos" in line:
            i = PROMPTS.index(line["prompt"])
            assert results[number]["token_ids"] == GREEDY[i][: line["max_tokens"]]
    requests = json.loads((tmp_path / "summary").read_text())["requests"]
    assert requests["done_before"] == done[-1]
    assert sum(requests.values()) == len(lines)
    assert f"{done[-1]} before" in log.decode()


def test_lines_can_come_from_standard_input(tmp_path) -> None:
    process = start("-", str(tmp_path / "out"), stdin=subprocess.PIPE)
    text = "".join(json.dumps(greedy_line(i, 5)) + "\n" for i in range(6))
    _, log = process.communicate(text.encode(), timeout=250)
    assert process.returncode == 0, log.decode()
    assert {n: r["token_ids"] for n, r in read_results(tmp_path / "out").items()} == {
        i + 1: GREEDY[i % 3][:5] for i in range(6)
    }
    assert "6 ok, 0 failed" in log.decode()
    assert "generated/s" in log.decode()


@pytest.fixture(scope="module")
def engine() -> Iterator[AsyncEngine]:
    """Its queue is so short that a run has to wait for it."""
    engine = AsyncEngine(EngineConfig.from_kwargs(model=MODEL, max_num_queued_requests=2, **SMALL))
    yield engine
    engine.shutdown()


class Reader(io.BytesIO):
    """Standard input that knows how many lines were taken from it."""

    taken = 0

    def __next__(self) -> bytes:
        line = super().__next__()
        self.taken += 1
        return line


def run_batch(engine: AsyncEngine, lines: list[Any], output: Path, window: int, watch=None) -> Summary:
    stdin = Reader("".join(json.dumps(line) + "\n" for line in lines).encode())
    results, ids = ResultFile(str(output)), UniqueIds()
    bar = tqdm(disable=True)

    def todo() -> Iterator[Task]:
        for task in tasks(read_lines("-", stdin, b""), results, ids):
            if watch is not None:
                watch(stdin.taken, output.read_bytes().count(b"\n"))
            yield task

    try:
        return asyncio.run(BatchRun(engine, results, window, ("m",), bar).run(todo()))
    finally:
        results.close()
        ids.close()


def test_only_a_window_of_lines_is_in_memory(engine, tmp_path) -> None:
    ahead = []
    lines = [greedy_line(i, 6) for i in range(60)]
    summary = run_batch(engine, lines, tmp_path / "out", 8, lambda taken, written: ahead.append(taken - written))
    assert summary.num_ok == 60
    assert 4 <= max(ahead) <= 8 + 2, "a window, the line that waits to enter it, and the one being read"


def test_a_full_queue_is_waited_for(engine, tmp_path) -> None:
    summary = run_batch(engine, [greedy_line(i, 20) for i in range(40)], tmp_path / "out", window=30)
    assert (summary.num_ok, summary.num_failed) == (40, 0)
    assert {n: r["token_ids"] for n, r in read_results(tmp_path / "out").items()} == {
        i + 1: GREEDY[i % 3][:20] for i in range(40)
    }


def test_what_no_queue_could_take_fails_alone(engine, tmp_path) -> None:
    lines = [greedy_line(0, 5), greedy_line(0, 5, n=9, temperature=1), greedy_line(1, 5)]
    summary = run_batch(engine, lines, tmp_path / "out", window=4)
    results = read_results(tmp_path / "out")
    assert (summary.num_ok, summary.num_failed) == (2, 1)
    assert "more than the queue ever takes" in results[2]["error"]["message"]


def test_a_failed_step_is_tried_again(engine, tmp_path, monkeypatch) -> None:
    runner = engine._engine.runner
    execute, failures = runner.execute, iter([False] * 5 + [True])

    def fail_once(plan):
        if next(failures, False):
            raise RuntimeError("a cosmic ray")
        return execute(plan)

    monkeypatch.setattr(runner, "execute", fail_once)
    summary = run_batch(engine, [greedy_line(i, 15) for i in range(6)], tmp_path / "out", window=6)
    assert next(failures, None) is None, "a step did fail"
    assert (summary.num_ok, summary.num_failed) == (6, 0)
    assert {n: r["token_ids"] for n, r in read_results(tmp_path / "out").items()} == {
        i + 1: GREEDY[i % 3][:15] for i in range(6)
    }


def test_an_engine_that_stops_ends_the_run_and_leaves_its_lines_to_be_done(tmp_path) -> None:
    engine = AsyncEngine(EngineConfig.from_kwargs(model=MODEL, **SMALL))
    lines = [greedy_line(i, 60) for i in range(200)]

    def stop_in_the_middle(taken: int, written: int) -> None:
        if written >= 10:
            engine.shutdown()

    with pytest.raises(EngineStoppedError):
        run_batch(engine, lines, tmp_path / "out", 8, stop_in_the_middle)
    results = read_results(tmp_path / "out")
    assert 10 <= len(results) < 200
    assert all(result["error"] is None for result in results.values())
