"""The kernels compile by the real TPU compiler, given libtpu and no TPU; the cache is updated in place."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from tests.kernels.tpu.compile_for_tpu import ENVIRONMENT

pytestmark = pytest.mark.skipif(find_spec("libtpu") is None, reason="needs libtpu")
GENERATIONS = ["v5e", "v5p", "v6e"]
LLAMA_8B = {"H": 32, "K": 8, "D": 128, "N": 16}
QWEN3_600M = {"H": 16, "K": 8, "D": 128, "N": 16}
SMOLLM2 = {"H": 9, "K": 3, "D": 64, "N": 16}
GEMMA3_270M = {"H": 4, "K": 1, "D": 256, "N": 16}
GEMMA3_4B = {"H": 8, "K": 4, "D": 256, "N": 64, "window": 1024}
GPT_OSS = {"H": 64, "K": 8, "D": 64, "N": 32, "window": 128, "sinks": True}
LLAMA_8B_SHARD = {"H": 4, "K": 1, "D": 128, "N": 128}
EIGHT_BITS = [LLAMA_8B | {"N": 128, "cache_dtype": "int8"}, SMOLLM2 | {"N": 128, "cache_dtype": "float8_e4m3fn"}]
DECODES = {"T": 64, "S": 64, "P": 128, "decode_only": True}
PROMPTS = {"T": 1024, "S": 64, "P": 128}


def compile_all(generation: str, cases: list[dict]) -> list[dict]:
    """In a process of its own: some errors of the compiler end it."""
    command = [sys.executable, "-m", "tests.kernels.tpu.compile_for_tpu", generation, json.dumps(cases)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **ENVIRONMENT})
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def check(generation: str, cases: list[dict]) -> None:
    for case, result in zip(cases, compile_all(generation, cases), strict=True):
        assert "refused" not in result, (case, result["refused"])
        prompts = [] if case.get("decode_only") else ["attend_prompts"]
        assert result["kernels"] == ["attend_decodes", *prompts, "write_cache"]
        assert result["copies"] == [], case
        assert result["aliased"] == 1, case
        assert result["temporary"] < 16 * case["T"] * case["H"] * max(128, case["D"]) * 2 + (1 << 20), case


@pytest.mark.parametrize("generation", GENERATIONS)
def test_compiles(generation):
    check(generation, [LLAMA_8B | DECODES, SMOLLM2 | DECODES, GEMMA3_270M | PROMPTS])


@pytest.mark.parametrize("generation", GENERATIONS)
def test_compiles_in_eight_bits(generation):
    llama, smollm2 = EIGHT_BITS
    check(generation, [llama | DECODES, smollm2 | PROMPTS])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("cache_dtype", ["int8", "float8_e4m3fn"])
def test_compiles_in_every_shape_in_eight_bits(generation, cache_dtype):
    models = [LLAMA_8B, SMOLLM2, GEMMA3_270M, GEMMA3_4B, GPT_OSS, LLAMA_8B_SHARD]
    steps = [DECODES, PROMPTS, DECODES | {"T": 256, "S": 256}]
    check(generation, [m | step | {"N": 128, "cache_dtype": cache_dtype} for m in models for step in steps])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_compiles_in_every_shape(generation, dtype):
    models = [LLAMA_8B, QWEN3_600M, SMOLLM2, GEMMA3_270M, GEMMA3_4B, GPT_OSS, LLAMA_8B_SHARD]
    steps = [DECODES, PROMPTS, DECODES | {"T": 1, "S": 1}, DECODES | {"T": 256, "S": 256}, PROMPTS | {"T": 8192}]
    check(generation, [model | step | {"dtype": dtype} for model in models for step in steps])


def test_a_cache_that_is_not_donated_is_found_to_be_copied():
    """What the search for copies rests on."""
    [result] = compile_all("v5e", [SMOLLM2 | DECODES | {"donated": False}])
    assert result["copies"]


def test_the_estimate_of_vector_memory_is_near_what_the_compiler_takes():
    """The block sizes keep to a budget of half the limit by this estimate, so what they choose is never refused."""
    cases = [LLAMA_8B | DECODES, GEMMA3_270M | PROMPTS, EIGHT_BITS[0] | DECODES]
    results = compile_all("v5e", [case | {"vmem": limit} for limit in (1.3, 0.5) for case in cases])
    enough, too_little = results[: len(cases)], results[len(cases) :]
    assert all("refused" not in result for result in enough), enough
    assert all("vmem" in result.get("refused", "") for result in too_little), too_little
