"""Compiles the engine's programs for a TPU, on any x86 machine that has libtpu.

python -m tests.paged.compile_steps_for_tpu v6e llama-3.1-8b 32 decode:greedy admit prints a line of JSON for each.
"""

import json
import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

from models import ModelConfig, build_model, param_shapes
from paged import sampler
from paged.packing import StepShape
from paged.runner import ADMIT_ROWS, SCORE_ROWS, Runner, RunnerShape, admit_program, score_program, step_program
from tests.kernels.tpu.compile_for_tpu import ENVIRONMENT, compile_for, copies_of

CONFIGS = Path(__file__).parents[2] / "configs"
S, T, CONTEXT, BLOCK = 64, 1024, 1024, 16


def runner_of(model_name: str, num_layers: int) -> Runner:
    """A Runner of shapes: 64 sequences of 1,024 tokens."""
    config = ModelConfig.from_hf(json.loads((CONFIGS / model_name / "config.json").read_text()))
    config = replace(config, num_layers=num_layers, sliding_windows=config.sliding_windows[:num_layers])
    model = build_model(config, dtype=jnp.bfloat16, attention_backend="mosaic_tpu")
    shape = RunnerShape(
        num_blocks=S * CONTEXT // BLOCK + 1,
        block_size=BLOCK,
        blocks_per_seq=CONTEXT // BLOCK,
        max_num_seqs=S,
        vocab_size=config.vocab_size,
        max_logprobs=20,
        decode_sizes=(S,),
        prompt_sizes=(T,),
        variants=sampler.VARIANTS,
        cache_dtype=jnp.bfloat16,
    )
    return Runner(model, param_shapes(model), shape)


def compile_program(generation: str, runner: Runner, name: str):
    """name: decode or prefill and a sampler's variant; admit; admit_full; score."""
    model, params, sizes, state = runner.model, runner.params, runner.shape, runner.state_shapes()
    kind, _, variant = name.partition(":")

    def array(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    if kind == "admit":
        packed = array(ADMIT_ROWS, sampler.PACKED_WIDTH + sizes.blocks_per_seq)
        return compile_for(generation, admit_program, state.block_tables, state.sampling, packed, donate=(0, 1))
    if kind == "admit_full":
        row = sampler.full_row_shapes(sizes.vocab_size)
        return compile_for(generation, sampler.write_full_slot, state.sampling, array(), row, donate=(0,))
    if kind == "score":
        hidden = jax.ShapeDtypeStruct((T, model.config.hidden_size), jnp.bfloat16)
        score = partial(score_program, model, sizes.max_logprobs)
        return compile_for(generation, score, params, hidden, array(2, SCORE_ROWS), donate=())
    shape = StepShape(S, S, decode_only=True) if kind == "decode" else StepShape(T, S, decode_only=False)
    step = partial(step_program, model, sizes, shape, variant)
    return compile_for(generation, step, params, state, array(shape.packed_size), donate=(1,))


def least_bytes(runner: Runner) -> int:
    """What a full decode step must read: every weight but the embedding's other rows, and the whole cache."""
    config = runner.model.config
    table = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size * 2
    leaves = jax.tree.leaves((runner.params, runner.state_shapes().caches))
    return sum(x.size * x.dtype.itemsize for x in leaves) - table


if __name__ == "__main__":
    os.environ.update(ENVIRONMENT)
    generation, model_name, num_layers, *names = sys.argv[1:]
    runner = runner_of(model_name, int(num_layers))
    cache = runner.state_shapes().caches[0]
    for name in names:
        compiled = compile_program(generation, runner, name)
        memory = compiled.memory_analysis()
        result = {
            "copies": copies_of(compiled.as_text(), cache),
            "temporary": memory.temp_size_in_bytes,
            "not_aliased": memory.output_size_in_bytes - memory.alias_size_in_bytes,
            "bytes": compiled.cost_analysis()["bytes accessed"],
            "least_bytes": least_bytes(runner),
        }
        print(json.dumps(result), flush=True)
