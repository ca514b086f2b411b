"""Compiles the engine's programs for TPUs that are not there, on any x86 machine that has libtpu.

python -m tests.paged.compile_for_tpus '[{"model": "llama-3.1-8b", "topology": "v6e:2x4", "shards": 8, "layers": 2,
"programs": ["decode", "prompt", "sample:full", "admit"]}]' prints a line of JSON for each program. Layers: the first so
many; 0 is all.
"""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

from models import ModelConfig, build_model, make_mesh, param_shapes
from paged.runner import Runner
from paged.runner_shape import RunnerShape
from paged.sampler import VARIANTS
from scripts.bench.roofline import Cost
from scripts.tpu_check.chips import topology_devices
from scripts.tpu_check.program import Program, hidden_copies

KERNELS = ("attend_decodes", "attend_prompts", "write_cache")
CONFIGS = Path(__file__).parents[2] / "configs"
S, T, CONTEXT, BLOCK = 56, 520, 1024, 64  # no size of a weight, so that nothing is taken for one


def runner_of(model: str, topology: str, shards: int, layers: int) -> Runner:
    """A Runner of shapes."""
    config = ModelConfig.from_hf(json.loads((CONFIGS / model / "config.json").read_text()))
    if layers:
        config = replace(config, num_layers=layers, sliding_windows=config.sliding_windows[:layers])
    mesh = make_mesh(shards, topology_devices(topology)[1])
    built = build_model(config, dtype=jnp.bfloat16, attention_backend="mosaic_tpu", mesh=mesh)
    shape = RunnerShape(
        num_blocks=S * CONTEXT // BLOCK + 1,
        block_size=BLOCK,
        blocks_per_seq=CONTEXT // BLOCK,
        max_num_seqs=S,
        vocab_size=config.vocab_size,
        max_logprobs=20,
        decode_sizes=(S,),
        sampling_sizes=(S,),
        prompt_sizes=(T,),
        variants=VARIANTS,
        cache_dtype=jnp.bfloat16,
    )
    return Runner(built, param_shapes(built), shape)


def lowering(runner: Runner, name: str) -> Callable[[], jax.stages.Lowered]:
    """name: decode or prompt, the layers of a step; sample and a sampler's variant; admit; admit_full; score; clear."""
    kind, _, variant = name.partition(":")
    if kind == "sample":
        return partial(runner.lower_sampling, S, variant)
    decode, prompt = runner.shape.steps
    if kind in ("decode", "prompt"):
        return partial(runner.lower_forward, decode if kind == "decode" else prompt)
    return {found.split("-")[0]: lower for found, lower in runner.lowerings().items()}[kind]


def reports(model: str, topology: str, shards: int, layers: int, programs: list[str]) -> Iterator[dict]:
    runner = runner_of(model, topology, shards, layers)
    large = runner.params, runner.state_shapes().caches
    weight_bytes = Cost.of(runner.model.config, runner.params, "bfloat16", shards).weight_bytes
    for name in programs:
        program = Program.compile(lowering(runner, name), runner.model.compute.mesh)
        figures = {key: value for key, value in vars(program).items() if key != "text"}
        yield figures | {
            "model": model, "topology": topology, "shards": shards, "program": name, "weight_bytes": weight_bytes,
            "kernels": [kernel for kernel in KERNELS if kernel in program.text],
            "copies": hidden_copies(program.text, large),
            "all_reduces": program.text.count(" all-reduce("),
            "all_gathers": program.text.count(" all-gather("),
        }  # fmt: skip


if __name__ == "__main__":
    for case in json.loads(sys.argv[1]):
        for report in reports(**case):
            print(json.dumps(report), flush=True)
