"""The engine's own programs compile for TPUs, given libtpu and no TPU, without hidden copies of cache or weights."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from tests.kernels.tpu.compile_for_tpu import ENVIRONMENT

pytestmark = pytest.mark.skipif(find_spec("libtpu") is None, reason="needs libtpu")


def compile_programs(generation: str, model: str, num_layers: int, names: list[str]) -> dict[str, dict]:
    command = [sys.executable, "-m", "tests.paged.compile_steps_for_tpu", generation, model, str(num_layers), *names]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **ENVIRONMENT})
    assert done.returncode == 0, done.stderr[-2000:]
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    for name, result in zip(names, results, strict=True):
        assert result["copies"] == [], name
        assert result["not_aliased"] < 4 << 20, name  # hidden states and tokens: nothing of the caches or slots
    return dict(zip(names, results, strict=True))


def test_a_decode_step_reads_little_more_than_it_must():
    """Llama-3.1-8B, batch 64, context 1,024 on a v6e, a step bound by memory: by the compiled program's own count of
    bytes within 1.3 times the weights and the cache; and no array of a weight's size is made."""
    step = compile_programs("v6e", "llama-3.1-8b", 32, ["decode:greedy"])["decode:greedy"]
    assert step["bytes"] < 1.3 * step["least_bytes"]
    assert step["temporary"] < 32 << 20


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("generation", ["v5e", "v5p", "v6e"])
def test_every_program_compiles(generation):
    steps = [f"{kind}:{variant}" for kind in ("decode", "prefill") for variant in ("greedy", "random", "full")]
    results = compile_programs(generation, "qwen3-0.6b", 2, [*steps, "admit", "admit_full", "score"])
    assert all(result["temporary"] < 512 << 20 for result in results.values())
