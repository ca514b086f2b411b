"""The check itself: what it refuses, what it says, and how it reads compiled modules."""

import json
from importlib.util import find_spec

import jax
import pytest

from paged.cli import parse_args
from paged.config import CacheArgs, SchedulerArgs
from paged.memory import Probe
from scripts.tpu_check.__main__ import CheckArgs, make_runner
from scripts.tpu_check.__main__ import main as tpu_check
from scripts.tpu_check.chips import topology_devices
from scripts.tpu_check.program import attention_flops, hidden_copies
from scripts.tpu_check.traffic import Module

needs_libtpu = pytest.mark.skipif(find_spec("libtpu") is None, reason="needs libtpu")


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
    assert attention_flops(text) == [7]


def test_only_what_lies_in_hbm_counts_as_traffic() -> None:
    """A weight that is read where it lies, one that is fetched to vector memory first, an embedding of which rows are
    gathered, a cache that is written in place, a kernel, and a branch that nothing asks for."""
    text = """
%gathered (table: bf16[1000,64], ids: s32[8]) -> bf16[8,64] {
  %table = bf16[1000,64]{1,0} parameter(0)
  %ids = s32[8]{0} parameter(1)
  %same = bf16[1000,64]{1,0} bitcast(%table)
  ROOT %rows = bf16[8,64]{1,0:S(1)} gather(%same, %ids), offset_dims={1}
}
%updated (cache: bf16[100,64], row: bf16[1,64], at: s32[]) -> bf16[100,64] {
  %cache = bf16[100,64]{1,0} parameter(0)
  %row = bf16[1,64]{1,0:S(1)} parameter(1)
  %at = s32[]{:S(6)} parameter(2)
  ROOT %new = bf16[100,64]{1,0} dynamic-update-slice(%cache, %row, %at, %at)
}
%dear (x: f32[8,64]) -> f32[8,64] {
  %x = f32[8,64]{1,0} parameter(0)
  ROOT %twice = f32[8,64]{1,0} add(%x, %x)
}
%cheap (x: f32[8,64]) -> f32[8,64] {
  ROOT %x = f32[8,64]{1,0} parameter(0)
}
ENTRY %main (p: bf16[64,64], q: bf16[64,64], t: bf16[1000,64], i: s32[8], c: bf16[100,64]) -> f32[8,64] {
  %p = bf16[64,64]{1,0:T(8,128)(2,1)} parameter(0)
  %q = bf16[64,64]{1,0:T(8,128)(2,1)} parameter(1)
  %t = bf16[1000,64]{1,0} parameter(2)
  %i = s32[8]{0:S(1)} parameter(3)
  %c = bf16[100,64]{1,0} parameter(4)
  %n = s32[]{:S(6)} constant(3)
  %early = (bf16[64,64]{1,0:S(1)}, bf16[64,64]{1,0}, u32[]{:S(2)}) copy-start(%q), cross_program_prefetch_index=0
  %rows = bf16[8,64]{1,0:S(1)} fusion(%t, %i), kind=kCustom, calls=%gathered
  %start = (bf16[64,64]{1,0:S(1)}, bf16[64,64]{1,0}, u32[]{:S(2)}) copy-start(%q)
  %done = bf16[64,64]{1,0:S(1)} copy-done(%start)
  %y = f32[8,64]{1,0:S(1)} convolution(%rows, %p), dim_labels=bf_oi->bf
  %z = f32[8,64]{1,0} convolution(%rows, %done), dim_labels=bf_oi->bf
  %cache = bf16[100,64]{1,0} fusion(%c, %rows, %n), kind=kLoop, calls=%updated
  %kernel = bf16[100,64]{1,0} custom-call(%cache), backend_config={"cost_estimate":{"bytes_accessed":"77"}}
  %attend_decodes.1 = bf16[8,64]{1,0} custom-call(%kernel), backend_config={"cost_estimate":{"bytes_accessed":"999"}}
  ROOT %out = f32[8,64]{1,0} conditional(%n, %z, %z), branch_computations={%cheap, %dear}
}
"""
    gathered, fetched, read, written, updated = 8 * 64 * 2, 64 * 64 * 2, 64 * 64 * 2, 8 * 64 * 4, 64 * 2
    assert Module(text).hbm_bytes == gathered + fetched + read + written + updated + 77


@needs_libtpu
def test_a_start_compiles_few_programs() -> None:
    """The layers of six steps, three samplers, the four small ones, and the two that the pool is sized by."""
    _, devices = topology_devices("v6e:1x1")
    runner, _ = make_runner(CheckArgs(model="configs/llama-3.1-8b"), CacheArgs(), SchedulerArgs(), devices)
    probe = Probe(runner.model, runner.params, runner.shape)
    assert len(runner.forward_lowerings(runner.shape.steps)) == 6
    assert len(runner.lowerings() | probe.lowerings) == 15
