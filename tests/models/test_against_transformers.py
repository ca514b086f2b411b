"""Models against transformers on the same weights (tests/fixtures), through the paged cache."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from models import Checkpoint, build_model, open_checkpoint
from tests.models.gemma3_270m import fetch_gemma3_270m
from tests.models.paged_driver import PagedDriver, Running, chosen_logprobs

FIXTURES = Path(__file__).parent.parent / "fixtures"
DENSE = ["llama3", "llama-mqa", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "olmo2", "phi3", "gpt2"]
SPARSE = ["mixtral", "qwen3-moe", "gpt-oss", "gpt-oss-mxfp4", "deepseek-v2", "deepseek-v3"]
TINY = DENSE + SPARSE
FLOAT32_TOLERANCE = 1e-4  # measured: below 5e-5 for the tiny models
BFLOAT16_MEAN_TOLERANCE, BFLOAT16_TOLERANCE = 0.1, 1.0  # measured: 0.045 and 0.44


def open_tiny(name: str, dtype) -> tuple[PagedDriver, dict[str, np.ndarray]]:
    checkpoint = open_checkpoint(str(FIXTURES / name), skip_tokenizer=True)
    model = build_model(checkpoint.config, dtype=dtype, attention_backend="reference")
    params = checkpoint.load_params(model, dtype, progress=False)
    return PagedDriver(model, params), dict(np.load(FIXTURES / name / "expected.npz"))


def prompts_of(expected: dict[str, np.ndarray]) -> list[list[int]]:
    return [expected[f"prompt_{i}"].tolist() for i in range(3)]


@pytest.mark.parametrize("name", TINY)
def test_greedy_tokens_are_those_of_transformers(name: str) -> None:
    driver, expected = open_tiny(name, jnp.float32)
    sequences = driver.greedy(prompts_of(expected), 64, chunk=8)
    worst = 0.0
    for i, sequence in enumerate(sequences):
        assert sequence.tokens[-64:] == expected[f"greedy_{i}"].tolist()
        worst = max(worst, float(np.abs(chosen_logprobs(sequence) - expected[f"logprobs_{i}"]).max()))
    print(f"{name}: largest logprob difference {worst:.2e}")
    assert worst < FLOAT32_TOLERANCE


@pytest.mark.parametrize("name", TINY)
def test_whole_distribution_agrees_in_one_prefill(name: str) -> None:
    driver, expected = open_tiny(name, jnp.float32)
    tokens = expected["prompt_0"].tolist() + expected["greedy_0"].tolist()
    sequence = Running(tokens)
    driver.step([(sequence, len(tokens))], num_tokens=96, num_seqs=2)
    difference = np.abs(np.stack(sequence.logprobs) - expected["distribution"]).max()
    print(f"{name}: largest logprob difference over the vocabulary {difference:.2e}")
    assert difference < FLOAT32_TOLERANCE


@pytest.mark.parametrize("name", [name for name in TINY if name != "gpt-oss-mxfp4"])  # as gpt-oss, once it is read
def test_bfloat16_stays_near_float32(name: str) -> None:
    """The tokens are given: what is compared is each step's logprob."""
    driver, expected = open_tiny(name, jnp.bfloat16)
    tokens = expected["prompt_0"].tolist() + expected["greedy_0"].tolist()
    sequence = Running(tokens)
    driver.step([(sequence, 9)], num_tokens=96, num_seqs=2)
    driver.step([(sequence, len(tokens) - 10)], num_tokens=96, num_seqs=2)
    driver.step([(sequence, 1)], num_tokens=2, num_seqs=2)
    differences = np.abs(np.stack(sequence.logprobs) - expected["distribution"])
    print(f"{name}: bfloat16 logprob difference: mean {differences.mean():.3f}, largest {differences.max():.3f}")
    if name in SPARSE:  # a router may choose another expert where two score nearly the same
        differences = np.sort(differences.mean(axis=1))[: len(differences) * 3 // 4]  # three quarters of the positions
    assert differences.mean() < BFLOAT16_MEAN_TOLERANCE and differences.max() < BFLOAT16_TOLERANCE


def test_smollm2_continues_as_in_transformers() -> None:
    """The default model from its GGUF: text to tokens, 64 greedy tokens a prompt, their logprobs, the chat."""
    checkpoint = open_checkpoint("smollm2-135m-instruct")
    fixture = json.loads((FIXTURES / "smollm2.json").read_text())
    cases = fixture["cases"]
    tokenizer = checkpoint.tokenizer
    for case in cases:
        assert tokenizer(case["text"], add_special_tokens=False).input_ids == case["prompt"]
    chat = tokenizer.apply_chat_template(fixture["chat"], add_generation_prompt=True, tokenize=False)
    assert chat == cases[-1]["text"]

    check_cases("SmolLM2", checkpoint, cases)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_gemma3_270m_continues_as_in_transformers(tmp_path: Path) -> None:
    """From its real GGUF, in Q4_K, Q5_0, Q6_K and Q8_0: text to tokens as SentencePiece does, 64 greedy tokens each."""
    checkpoint = open_checkpoint(str(fetch_gemma3_270m(tmp_path)))
    fixture = json.loads((FIXTURES / "gemma3-270m.json").read_text())
    tokenizer = checkpoint.tokenizer
    assert tokenizer is not None
    for case in fixture["texts"]:
        assert tokenizer(case["text"], add_special_tokens=False).input_ids == case["ids"]
        assert tokenizer(case["text"]).input_ids == [2, *case["ids"]]
        assert tokenizer.decode(case["ids"]) == case["text"].replace("▁", " ")  # SentencePiece cannot tell them apart
    check_cases("Gemma 3 270M", checkpoint, fixture["cases"])


def check_cases(name: str, checkpoint: Checkpoint, cases: list[dict]) -> None:
    """Greedy tokens exactly, and logprobs nearly, as each case has them."""
    model = build_model(checkpoint.config, dtype=jnp.float32, attention_backend="reference")
    driver = PagedDriver(model, checkpoint.load_params(model, jnp.float32, progress=False))
    sequences = driver.greedy([case["prompt"] for case in cases], 64, chunk=16)
    worst = 0.0
    for sequence, case in zip(sequences, cases, strict=True):
        assert sequence.tokens[-64:] == case["greedy"]
        worst = max(worst, float(np.abs(chosen_logprobs(sequence) - case["logprobs"]).max()))
    print(f"{name}: largest logprob difference {worst:.2e}")
    assert worst < FLOAT32_TOLERANCE
