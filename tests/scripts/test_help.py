"""What --help says: every option on one line of a terminal of 100 columns, in groups."""

import importlib
import re

import pytest

PROGRAMS = ["scripts.batch.__main__", "scripts.compare_transformers", "scripts.convert", "scripts.evaluate"]
PROGRAMS += ["scripts.tpu_check.__main__"]
PROGRAMS += [f"scripts.bench.{name}" for name in ("throughput", "latency", "prefill", "host", "serve")]


@pytest.mark.parametrize("module", PROGRAMS)
def test_every_option_has_a_line(module: str, monkeypatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as e:
        importlib.import_module(module).main(["--help"])
    assert e.value.code == 0
    text = capsys.readouterr().out
    usage, *parts = text.split("\n\n")
    assert usage.startswith("usage: python -m scripts.")
    groups = [part.splitlines() for part in parts if re.fullmatch(r"\w+:", part.splitlines()[0])]
    assert len(groups) >= 2
    for _, *lines in groups:
        for line in lines:
            assert line.startswith(("  -", "  INPUT", "  OUTPUT", "  TEXT_FILE", "  SRC", "  DST", "  MODEL")), (
                f"it runs over: {line}"
            )
            assert len(line) <= 100


def test_the_list_of_benchmarks(capsys) -> None:
    with pytest.raises(SystemExit) as e:
        importlib.import_module("scripts.bench.__main__").main(["--help"])
    assert e.value.code == 0
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in ("throughput", "latency", "prefill", "host", "serve"))
    assert max(map(len, text.splitlines())) <= 100
