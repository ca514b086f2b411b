"""Compiles step programs for an H100, on any machine:

python -m tests.paged.compile_steps_for_h100 MODEL '{"deterministic": true}' decode-64 prompt-512

Prints how many calls of each of our kernels a program has, and its temporary memory.
"""

import json
import re
import sys
from collections import Counter
from dataclasses import replace

import jax.numpy as jnp

from models import build_model, make_mesh
from models.registry import param_shapes
from paged import startup
from paged.config import EngineConfig
from paged.packing import StepShape
from paged.runner import Runner
from tests.kernels.gpu.h100 import h100


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
            checkpoint.config,
            dtype=dtype,
            attention_backend="mosaic_gpu",
            mesh=make_mesh(1, sharding.mesh.devices.flat),
            deterministic=config.runner.deterministic,
        )
        sizes = replace(startup.runner_shape(config, checkpoint, dtype, "gpu"), num_blocks=500)
        runner = Runner(model, param_shapes(model), sizes)
        for name in names:
            kind, size = name.split("-")
            is_decode = kind == "decode"
            shape = StepShape(int(size), int(size) if is_decode else sizes.max_num_seqs, is_decode)
            compiled = runner.lower_step(shape, "random").compile()
            kernels = re.findall(r'target="mosaic_gpu.*?op_name="[^"]*/(\w+)/\w+"', compiled.as_text())
            memory = compiled.memory_analysis().temp_size_in_bytes
            print(json.dumps({"step": str(shape), "kernels": Counter(kernels), "temporary": memory}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
