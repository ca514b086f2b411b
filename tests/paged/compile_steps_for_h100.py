"""Compiles step programs for an H100, on any machine:

python -m tests.paged.compile_steps_for_h100 MODEL '{"deterministic": true}' decode-64 prompt-512

Prints how many calls of each of our kernels a program has, and its temporary memory.
"""

import json
import re
import sys
from collections import Counter
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp

from models import build_model
from models.registry import param_shapes
from paged import startup
from paged.config import EngineConfig
from paged.packing import StepShape
from paged.runner import Runner, step_program
from tests.kernels.gpu.h100 import compile_for, h100


def main(folder: str, options: str, *names: str) -> None:
    config = EngineConfig.from_kwargs(
        model=folder,
        load_format="dummy",
        skip_tokenizer_init=True,
        attention_backend="mosaic_gpu",
        **json.loads(options),
    )
    checkpoint, dtype = startup.open_model(config.model), jnp.dtype("bfloat16")
    with h100() as sharding:
        model = build_model(
            checkpoint.config, dtype=dtype, attention_backend="mosaic_gpu", deterministic=config.runner.deterministic
        )
        sizes = replace(startup.runner_shape(config, checkpoint, dtype, "gpu"), num_blocks=500)
        params = param_shapes(model)
        state = Runner(model, params, sizes).state_shapes()
        for name in names:
            kind, size = name.split("-")
            is_decode = kind == "decode"
            shape = StepShape(int(size), int(size) if is_decode else sizes.max_num_seqs, is_decode)
            packed = jax.ShapeDtypeStruct((shape.packed_size,), jnp.int32)
            step = partial(step_program, model, sizes, shape, "random")
            compiled = compile_for(sharding, step, params, state, packed, donate=1)
            kernels = re.findall(r'target="mosaic_gpu.*?op_name="[^"]*/(\w+)/\w+"', compiled.as_text())
            memory = compiled.memory_analysis().temp_size_in_bytes
            print(json.dumps({"step": str(shape), "kernels": Counter(kernels), "temporary": memory}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
