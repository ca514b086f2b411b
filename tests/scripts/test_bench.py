"""python -m scripts.bench: each benchmark once, small, on random weights or a real server."""

import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scripts.bench.__main__ import main

ROOT = Path(__file__).parents[2]
MODEL = str(ROOT / "tests" / "fixtures" / "llama3")
SMALL = [
    "--dtype",
    "float32",
    "--max-num-seqs",
    "4",
    "--max-num-batched-tokens",
    "32",
    "--num-gpu-blocks-override",
    "80",
]
ENGINE = ["--model", MODEL, "--load-format", "dummy", *SMALL]
LENGTHS = ["--input-len", "6", "--output-len", "5", "--max-token-id", "200"]
CEILINGS = ["--bandwidth", "1e10", "--peak-flops", "1e11"]


def bench(capsys: pytest.CaptureFixture, *argv: str) -> tuple[list[dict[str, Any]], str]:
    """The measurements, and what was said to people."""
    capsys.readouterr()
    assert main(list(argv)) == 0
    out, err = capsys.readouterr()
    return [json.loads(line) for line in out.splitlines()], err


def check_engine_measurement(line: dict[str, Any], benchmark: str) -> None:
    assert line["benchmark"] == benchmark
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", line["time"])
    assert {"device", "platform", "jax", "jaxlib", "flax", "python", "commit"} <= line["machine"].keys()
    assert line["engine"]["model"] == MODEL
    assert (line["engine"]["dtype"], line["engine"]["max_num_seqs"]) == ("float32", 4)
    roofline = line["roofline"]
    assert (roofline["bandwidth_bytes_per_s"], roofline["peak_flops_per_s"]) == (1e10, 1e11)
    assert 0 < roofline["floor_ms"] < roofline["measured_ms"]
    assert roofline["fraction"] == pytest.approx(roofline["floor_ms"] / roofline["measured_ms"])


def check_repeats(figure: dict[str, Any], count: int) -> None:
    assert len(figure["values"]) == count
    assert figure["min"] == min(figure["values"]) <= figure["median"] <= max(figure["values"]) == figure["max"]


@pytest.mark.parametrize("device", ["instant", "real"])
def test_host_work(capsys, tmp_path, device) -> None:
    workload = ["--batch", "3", "--input-len", "5", "--steps", "12", "--max-model-len", "64", "--device", device]
    picture = tmp_path / "host.png"
    [line], _ = bench(capsys, "host", *ENGINE, *workload, "--timeline", str(picture))
    micros = line["microseconds"]
    assert {"schedule", "pack", "dispatch", "wait", "outputs", "publish", "engine", "receive", "text"} == micros.keys()
    for part in micros.values():
        assert 0 <= part["min"] <= part["median"] <= part["max"]
    parts = sum(micros[part]["median"] for part in ("schedule", "pack", "dispatch", "outputs", "publish"))
    assert parts <= 1.5 * micros["engine"]["max"]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_throughput_of_a_fixed_workload(capsys) -> None:
    lengths = ["--num-prompts", "6", "--input-len", "10", "--output-len", "9", "--repeats", "2"]
    (line,), err = bench(capsys, "throughput", *lengths, *CEILINGS, *ENGINE)
    check_engine_measurement(line, "throughput")
    assert line["workload"] == {
        "name": "fixed", "num_prompts": 6, "prompt_tokens": 60, "output_tokens": 54, "temperature": 0.6
    }  # fmt: skip
    check_repeats(line["seconds"], 2)
    check_repeats(line["output_tokens_per_second"], 2)
    assert line["output_tokens_per_second"]["max"] == pytest.approx(54 / line["seconds"]["min"])
    # 18 or 19 of a table's 32 slots are written (the token under way when a request ends may be).
    assert 13 / 32 - 1e-9 <= line["kv_slots_wasted"] <= 14 / 32 + 1e-9
    assert "out tok/s" in err


def test_latency_by_batch_and_context(capsys) -> None:
    what = ["--batch", "1", "4", "--context", "16", "40", "--steps", "5", "--repeats", "2"]
    lines, err = bench(capsys, "latency", *what, *CEILINGS, *ENGINE)
    for line in lines:
        check_engine_measurement(line, "latency")
        check_repeats(line["seconds_per_step"], 2)
        batch = line["workload"]["batch"]
        assert line["output_tokens_per_second"] == pytest.approx(batch / line["seconds_per_step"]["median"])
    shapes = [(line["workload"]["batch"], line["workload"]["context"]) for line in lines]
    assert [batch for batch, _ in shapes] == [1, 4, 1, 4]
    for (_, context), asked in zip(shapes, [16, 16, 40, 40], strict=True):
        assert asked < context < asked + 30
    table = err.split("\n\n")[-1].splitlines()
    assert len(table) == 2 + 4
    assert len({len(row) for row in table}) == 1


def test_a_batch_that_does_not_fit_is_refused(capsys) -> None:
    argv = ["latency", "--batch", "4", "--context", "400", *CEILINGS, *ENGINE, "--max-model-len", "256"]
    assert main(argv) == 1
    assert "need --max-model-len" in capsys.readouterr().err


def test_prefill_by_number_and_length(capsys) -> None:
    what = ["--num-prompts", "1", "3", "--input-len", "20", "--repeats", "2"]
    lines, _ = bench(capsys, "prefill", *what, *CEILINGS, *ENGINE)
    assert [line["workload"] for line in lines] == [{"num_prompts": n, "input_len": 20} for n in (1, 3)]
    for line in lines:
        check_engine_measurement(line, "prefill")
        check_repeats(line["seconds"], 2)


def test_several_over_one_engine(capsys) -> None:
    runs = ["prefill --num-prompts 2 --input-len 20", "latency --batch 2 --context 16 --steps 3"]
    lines, _ = bench(capsys, "several", "--run", *runs, "--repeats", "1", *CEILINGS, *ENGINE)
    for line, name in zip(lines, ("prefill", "latency"), strict=True):
        check_engine_measurement(line, name)
    assert lines[0]["engine"] == lines[1]["engine"]
    with pytest.raises(SystemExit):
        main(["several", "--run", "serving", *ENGINE])
    assert "must begin with one of latency, prefill, throughput; 'serving' does not" in capsys.readouterr().err


def test_a_folder_with_only_a_config_and_measured_ceilings_in_a_process_of_its_own(tmp_path) -> None:
    config = json.loads((Path(MODEL) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    command = [sys.executable, "-m", "scripts.bench", "prefill", "--num-prompts", "1", "--input-len", "8"]
    command += ["--model", str(tmp_path), "--load-format", "dummy", *SMALL]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    (line,) = map(json.loads, done.stdout.splitlines())
    assert 1e8 < line["roofline"]["bandwidth_bytes_per_s"] < 1e14
    assert 1e8 < line["roofline"]["peak_flops_per_s"] < 1e17
    assert "GB/s" in done.stderr


def test_an_unknown_model_is_an_error_in_words(capsys, tmp_path) -> None:
    assert main(["prefill", *CEILINGS, "--model", str(tmp_path / "none"), "--load-format", "dummy"]) == 1
    assert "error: the engine could not be loaded: model" in capsys.readouterr().err


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("server") / "log"
    command = [sys.executable, "-m", "server", "--port", "0", "--model", MODEL, *SMALL, "--api-key", "sesame"]
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 250
    while not (ready := re.search(r"ready on (http://\S+)", log.read_text())):
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    yield ready.group(1)
    process.terminate()
    assert process.wait(60) == 0, log.read_text()


def test_serve_measures_a_server(server, capsys) -> None:
    load = ["--rate", "30", "inf", "--num-prompts", "8", *LENGTHS]
    limits = ["--ttft-limit-ms", "60000", "--e2e-limit-ms", "0.001"]
    lines, err = bench(capsys, "serve", "--url", server, "--api-key", "sesame", *load, *limits)
    assert [line["workload"]["rate"] for line in lines] == [30, "inf"]
    for line in lines:
        assert line["benchmark"] == "serve"
        assert line["server"] == {"url": server, "model": MODEL}
        assert line["requests"] == {"ok": 8, "failed": 0, "good": 0}
        assert line["output_tokens_per_second"] == pytest.approx(8 * 5 / line["seconds"])
        for name in ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms"):
            p = line[name]
            assert 0 <= p["p50"] <= p["p95"] <= p["p99"] <= p["max"]
            assert math.isfinite(p["mean"])
        assert line["ttft_ms"]["p50"] < line["e2e_ms"]["p50"]
    assert lines[0]["seconds"] > 7 / 30 / 4, "arrivals are spread out"
    assert "goodput" in err


def test_serve_with_several_processes_and_a_fixed_concurrency(server, capsys) -> None:
    load = ["--rate", "inf", "--num-prompts", "9", "--max-concurrency", "3", "--processes", "2", *LENGTHS]
    (line,), err = bench(capsys, "serve", "--url", server, "--api-key", "sesame", *load)
    assert line["requests"] == {"ok": 9, "failed": 0, "good": 9}
    assert line["workload"]["max_concurrency"] == 3
    assert line["client"]["processes"] == 2 and 0 < line["client"]["busy"] < 1.1
    assert line["e2e_ms"]["max"] / 1e3 < line["seconds"], "waiting for a turn is not the server's time"
    assert "client busy" in err


def test_serve_counts_refused_requests(server, capsys) -> None:
    load = ["--rate", "inf", "--num-prompts", "3", "--input-len", "300", "--output-len", "5", "--max-token-id", "200"]
    (line,), err = bench(capsys, "serve", "--url", server, "--api-key", "sesame", *load)
    assert line["requests"] == {"ok": 0, "failed": 3, "good": 0}
    assert line["ttft_ms"] is None
    assert "failed: HTTP 400" in err


@pytest.mark.parametrize(
    ("argv", "word"),
    [([], "HTTP 401"), (["--url", "http://127.0.0.1:9"], "no answer"), (["--url", "x"], "must be like")],
)
def test_serve_says_why_there_is_no_answer(server, capsys, argv: list[str], word: str) -> None:
    assert main(["serve", *(argv or ["--url", server])]) == 1
    assert word in capsys.readouterr().err
