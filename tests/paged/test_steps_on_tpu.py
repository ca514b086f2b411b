"""The engine's own programs compile for TPUs, given libtpu and no TPU, on one chip and over several, without hidden
copies of cache or weights."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from tests.kernels.tpu.compile_for_tpu import ENVIRONMENT

pytestmark = pytest.mark.skipif(find_spec("libtpu") is None, reason="needs libtpu")
LAYERS = 2  # the others are the same program again
STEPS = ["decode", "prompt", "sample:greedy"]
ALL = [*STEPS, "sample:random", "sample:full", "admit", "admit_full", "score", "clear"]
TOPOLOGIES = {
    "v5e": [("v5e:1x1", 1), ("v5e:2x2", 4), ("v5e:2x4", 8)],
    "v6e": [("v6e:1x1", 1), ("v6e:2x2", 4), ("v6e:2x4", 8)],
    "v5p": [("v5p:1x1x1", 1)],
}


def case(model: str, topology: str, shards: int, layers: int = LAYERS, programs: list[str] = STEPS) -> dict:
    return {"model": model, "topology": topology, "shards": shards, "layers": layers, "programs": programs}


def compiled(*cases: dict) -> list[dict]:
    """In a process of its own: some errors of the compiler end it."""
    command = [sys.executable, "-m", "tests.paged.compile_for_tpus", json.dumps(cases)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **ENVIRONMENT})
    assert done.returncode == 0, done.stderr[-3000:]
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [r["program"] for r in results] == [name for c in cases for name in c["programs"]]
    for result in results:
        assert result["copies"] == [], result
    return results


@pytest.mark.timeout(600)
@pytest.mark.parametrize("generation", TOPOLOGIES)
def test_steps_compile(generation: str) -> None:
    """A small model and an 8B one. Over several chips there are two sums a layer, one for the embedding and the
    sampler's small ones, and nothing large is moved."""
    models = ("qwen3-0.6b", "llama-3.1-8b")
    cases = [case(model, *topology) for topology in TOPOLOGIES[generation] for model in models]
    kernels = {
        "decode": ["attend_decodes", "write_cache"],
        "prompt": ["attend_decodes", "attend_prompts", "write_cache"],
        "sample:greedy": [],
    }
    for result in compiled(*cases):
        program, split = result["program"], result["shards"] > 1
        assert result["kernels"] == kernels[program]
        assert result["all_gathers"] == 0, result
        least, most = (0, 2) if program == "sample:greedy" else (2 * LAYERS + 1, 2 * LAYERS + 1)
        assert least * split <= result["all_reduces"] <= most * split, result


def test_a_decode_step_reads_little_more_than_it_must() -> None:
    """Llama-3.1-8B, all layers, on a v6e, a step bound by memory: by the compiled program's own count of bytes, without
    the cache, within 1.05 times the weights; and no array of a weight's size is made."""
    step = compiled(case("llama-3.1-8b", "v6e:1x1", 1, layers=0, programs=["decode", "sample:greedy"]))
    weights, read = step[0]["weight_bytes"], sum(program["bytes"] for program in step)
    assert weights < read < 1.05 * weights
    assert all(program["temporary"] < 32 << 20 for program in step)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("generation", ["v5e", "v5p", "v6e"])
def test_every_program_compiles(generation: str) -> None:
    [(topology, shards), *_] = TOPOLOGIES[generation]
    results = compiled(case("qwen3-0.6b", topology, shards, programs=ALL))
    assert all(result["temporary"] < 512 << 20 for result in results)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("topology", "shards"), [("v5e:2x4", 8), ("v5e:4x4", 16), ("v5p:2x2x1", 4), ("v6e:2x4", 8)])
def test_every_program_compiles_over_several_chips(topology: str, shards: int) -> None:
    compiled(case("llama-3.1-8b", topology, shards, programs=ALL))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("topology", "shards"), [("v6e:2x4", 8), ("v6e:4x4", 16), ("v5p:2x2x2", 8)])
def test_llama_70b(topology: str, shards: int) -> None:
    """All layers; 8 KV heads, which over 16 chips lie on two each."""
    for result in compiled(case("llama-3.1-70b", topology, shards, layers=0)):
        assert result["temporary"] < 1 << 30
