"""Compiles greedy step programs for a TPU topology, a line of JSON each.

python -m tests.scripts.compile_sharded llama-3.1-8b v6e:2x4 8 2 is of 8 chips and the first 2 layers; 0 is all layers.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp

from models import ModelConfig, build_model, make_mesh, param_shapes
from paged.runner import Runner, RunnerShape
from scripts.tpu_check.chips import topology_devices
from scripts.tpu_check.program import Program, hidden_copies

CONFIGS = Path(__file__).parents[2] / "configs"
S, T, CONTEXT, BLOCK = 56, 520, 2048, 16  # no size of a weight, so that nothing is taken for one


def runner_of(name: str, topology: str, shards: int, num_layers: int) -> Runner:
    config = ModelConfig.from_hf(json.loads((CONFIGS / name / "config.json").read_text()))
    if num_layers:
        config = replace(config, num_layers=num_layers, sliding_windows=config.sliding_windows[:num_layers])
    mesh = make_mesh(shards, topology_devices(topology)[1])
    model = build_model(config, dtype=jnp.bfloat16, attention_backend="mosaic_tpu", mesh=mesh)
    shape = RunnerShape(
        num_blocks=S * CONTEXT // BLOCK + 1,
        block_size=BLOCK,
        blocks_per_seq=CONTEXT // BLOCK,
        max_num_seqs=S,
        vocab_size=config.vocab_size,
        max_logprobs=20,
        decode_sizes=(S,),
        prompt_sizes=(T,),
        variants=("greedy",),
        cache_dtype=jnp.bfloat16,
    )
    return Runner(model, param_shapes(model), shape)


def main(name: str, topology: str, shards: str, num_layers: str) -> None:
    runner = runner_of(name, topology, int(shards), int(num_layers))
    for shape in runner.shape.steps:
        program = Program.compile(runner, shape, "greedy")
        figures = {k: v for k, v in vars(program).items() if k not in ("text", "shape")}
        found = {
            "decode_only": shape.decode_only,
            "copies": hidden_copies(program.text, (runner.params, runner.state_shapes().caches)),
        }
        collectives = {
            "all_reduces": program.text.count(" all-reduce("),
            "all_gathers": program.text.count(" all-gather("),
        }
        print(json.dumps(found | collectives | figures), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
