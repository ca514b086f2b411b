"""Configurations with many unusual values at once, against what transformers' from_pretrained makes of them
(tests/fixtures/make_unusual.py)."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from models import build_model, open_checkpoint
from tests.fixtures.seeded_weights import seeded
from tests.models.paged_driver import PagedDriver, chosen_logprobs

UNUSUAL = sorted((Path(__file__).parent.parent / "fixtures" / "unusual").glob("*.json"))
TOLERANCE = 1e-4  # measured: below 4e-5


@pytest.mark.parametrize("file", UNUSUAL, ids=lambda file: file.stem)
def test_greedy_tokens_are_those_of_transformers(file: Path, tmp_path: Path) -> None:
    case = json.loads(file.read_text())
    (tmp_path / "config.json").write_text(json.dumps(case["config"]))
    weights = {name: seeded(name, tuple(s), case["config"]["model_type"]) for name, s in case["shapes"].items()}
    save_file(weights, tmp_path / "model.safetensors")

    checkpoint = open_checkpoint(str(tmp_path), skip_tokenizer=True)
    model = build_model(checkpoint.config.for_context(128), dtype=jnp.float32, attention_backend="reference")
    driver = PagedDriver(model, checkpoint.load_params(model, jnp.float32, progress=False))
    sequences = driver.greedy([prompt["prompt"] for prompt in case["prompts"]], 64, chunk=8)
    worst = 0.0
    for sequence, prompt in zip(sequences, case["prompts"], strict=True):
        assert sequence.tokens[-64:] == prompt["greedy"]
        worst = max(worst, float(np.abs(chosen_logprobs(sequence) - prompt["logprobs"]).max()))
    print(f"{file.stem}: largest logprob difference {worst:.2e}")
    assert worst < TOLERANCE
