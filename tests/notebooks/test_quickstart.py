"""The quickstart notebook runs as it is committed, and is committed with what it printed."""

import base64
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "notebooks" / "quickstart.ipynb"
MODEL_CELL = 'MODEL = "smollm2-135m-instruct"'


def execute(model: str | None) -> Any:
    """Runs every cell in a fresh kernel, with another model if one is named; an exception in a cell is raised."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    if model is not None:
        (cell,) = [cell for cell in notebook.cells if cell.source == MODEL_CELL]
        cell.source = f"MODEL = {model!r}"
    resources = {"metadata": {"path": str(ROOT)}}
    NotebookClient(notebook, timeout=280, kernel_name="python3", resources=resources).execute()
    return notebook


def check_outputs(notebook: Any) -> None:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(output.text for output in outputs if output.output_type == "stream")
    assert "'The capital of France is' ->" in text
    assert text.count(" tokens in blocks ") == 8
    assert "blocks in use: 0 of 95" in text
    (picture,) = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert base64.b64decode(picture).startswith(b"\x89PNG")
    assert check_tables(text) >= 2, "the common beginning is stored once"


def check_tables(text: str) -> int:
    """Every printed table has as many blocks as its tokens need; returns how many blocks all tables begin with."""
    tables = []
    for line in text.splitlines():
        if " tokens in blocks " in line:
            head, _, blocks = line.partition(" tokens in blocks ")
            tables.append(blocks.split())
            assert len(tables[-1]) == -(-int(head.split(":")[1]) // 16)
    return sum(len(set(column)) == 1 for column in zip(*tables, strict=False))


def test_it_was_committed_with_its_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not any(output.output_type == "error" for cell in code for output in cell.outputs)
    check_outputs(notebook)


def test_it_runs_on_a_tiny_model() -> None:
    check_outputs(execute(str(ROOT / "tests" / "fixtures" / "llama3")))


@pytest.mark.slow
def test_it_runs_as_it_is() -> None:
    check_outputs(execute(None))
