"""Step programs over several chips compile for TPUs that are not there, and hide no copies of weights or caches."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import jax
import pytest

from paged.cli import parse_args
from scripts.tpu_check.__main__ import CheckArgs
from scripts.tpu_check.__main__ import main as tpu_check
from scripts.tpu_check.program import attention_costs, hidden_copies

needs_libtpu = pytest.mark.skipif(find_spec("libtpu") is None, reason="needs libtpu")
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
LAYERS = 2
FEW = [("llama-3.1-8b", "v6e:2x4", 8), ("qwen3-0.6b", "v5e:2x2", 4)]
MANY = [
    *(("llama-3.1-8b", name, n) for name, n in [("v5e:2x4", 8), ("v5e:2x2", 4), ("v5p:2x2x1", 4), ("v6e:1x1", 1)]),
    *(("qwen3-0.6b", name, n) for name, n in [("v5e:2x4", 8), ("v6e:2x4", 8), ("v5p:1x1x1", 1), ("v5e:1x1", 1)]),
]


def compiled(name: str, topology: str, shards: int, num_layers: int = LAYERS) -> list[dict]:
    command = [sys.executable, "-m", "tests.scripts.compile_sharded", name, topology, str(shards), str(num_layers)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **ENVIRONMENT})
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(name: str, topology: str, shards: int) -> None:
    """Two sums a layer, one for the embedding, and the sampler's small ones; nothing large is moved."""
    programs = compiled(name, topology, shards)
    assert [program["decode_only"] for program in programs] == [True, False]
    for program in programs:
        assert program["copies"] == []
        assert program["all_gathers"] == 0
        assert program["all_reduces"] >= 2 * LAYERS + 1 if shards > 1 else program["all_reduces"] == 0
        assert program["all_reduces"] <= 2 * LAYERS + 3


@needs_libtpu
@pytest.mark.parametrize(("name", "topology", "shards"), FEW)
def test_compiles(name: str, topology: str, shards: int) -> None:
    check(name, topology, shards)


@needs_libtpu
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("name", "topology", "shards"), MANY)
def test_compiles_for_more(name: str, topology: str, shards: int) -> None:
    check(name, topology, shards)


@needs_libtpu
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_llama_70b_fits_on_eight_chips() -> None:
    """32 GiB each: weights of 16.4 GiB, and room for a cache."""
    for program in compiled("llama-3.1-70b", "v6e:2x4", 8, num_layers=0):
        assert program["copies"] == []
        assert program["temporary"] < 2 << 30


@needs_libtpu
def test_a_model_that_does_not_fit_is_said_to(capsys) -> None:
    assert tpu_check(["configs/llama-3.1-70b", "--topology", "v5e:2x2"]) == 1
    [line] = capsys.readouterr().out.splitlines()
    assert "more chips are needed" in json.loads(line)["memory"]["error"]


@needs_libtpu
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology", "v9:2x2"], "is not of v5e, v5p, v6e"),
        (["--topology", "v5e:7x5"], "is not known to libtpu"),
        (
            ["--topology", "v5e:2x4", "--tensor-parallel-size", "6"],
            "neither divides the model's KV heads of 8 nor is a multiple of them; what does: 2, 4",
        ),
        (["--topology", "v5e:2x2", "--tensor-parallel-size", "8"], "needs as many devices, and there are 4"),
    ],
)
def test_refusals(arguments: list[str], message: str, capsys) -> None:
    assert tpu_check(["configs/qwen3-0.6b", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_a_topology_has_a_default() -> None:
    [args] = parse_args("check", "", CheckArgs, argv=["configs/qwen3-0.6b"])
    assert (args.topology, args.tensor_parallel_size) == ("v5e:1x1", None)


def test_what_is_read_from_a_compiled_module() -> None:
    mesh = jax.sharding.Mesh(jax.devices()[:1], ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    weights = jax.ShapeDtypeStruct((8, 4), "bfloat16", sharding=sharding)
    text = """
%fused.1 (p: bf16[8,4]) -> bf16[8,4] {
  %transpose.9 = bf16[8,4]{1,0} transpose(%p)
}
ENTRY %main.1 (p: bf16[8,4]) -> bf16[8,4] {
  %copy.1 = bf16[4,8]{1,0:T(8,128)} copy(%p), metadata={}
  %copy.2 = bf16[4,8]{1,0:T(8,128)S(1)} copy(%p)
  %copy.3 = bf16[5,8]{1,0} copy(%p)
  %transpose_fusion.4 = bf16[8,1,4]{2,1,0} fusion(%p), kind=kLoop, calls=%fused.1
  %attend_decodes.1 = bf16[8]{0} custom-call(%q), config={"cost_estimate":{"flops":"7","bytes_accessed":"9"}}
}
"""
    assert hidden_copies(text, weights) == ["copy to [4,8]", "fusion to [8,1,4]"]
    assert attention_costs(text) == [{"flops": 7, "bytes_accessed": 9}]
