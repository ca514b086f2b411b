"""Compiles step programs for an H100, on any machine:

python -m tests.paged.compile_steps_for_h100 MODEL '{"deterministic": true}' decode-64 prompt-512 sample-64

Prints how many calls of each of our kernels a program has, how many kernels there are in all, its temporary memory,
and how many products without a kernel of ours are cuBLAS's and XLA's own.
decode, prompt: the layers of a step; sample: its head and "random" sampler.
"""

import json
import re
import sys
from collections import Counter
from dataclasses import replace

import jax
import jax.numpy as jnp

from models import build_model, make_mesh
from models.registry import param_shapes
from paged import startup
from paged.config import EngineConfig
from paged.packing import StepShape
from paged.runner import Runner
from tests.kernels.gpu.h100 import h100

KERNELS = "fusion|custom-call|copy|dynamic-update-slice|scatter|gather|reduce|sort|broadcast|convert"  # outside loops


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
            compiled = lowered(runner, kind, int(size)).compile()
            text, memory = compiled.as_text(), compiled.memory_analysis().temp_size_in_bytes
            kernels = re.findall(r'target="mosaic_gpu.*?op_name="[^"]*/(\w+)/\w+"', text)
            of_all = len(re.findall(rf" = .* (?:{KERNELS})\(", text[text.index("\nENTRY ") :]))
            xlas = {"cublas": text.count('custom_call_target="__cublas'), "triton": text.count("gemm_fusion")}
            line = {"program": name, "kernels": Counter(kernels), "all": of_all, "temporary": memory, "products": xlas}
            print(json.dumps(line), flush=True)


def lowered(runner: Runner, kind: str, size: int) -> jax.stages.Lowered:
    if kind == "sample":
        return runner.lower_sampling(size, "random")
    is_decode = kind == "decode"
    return runner.lower_forward(StepShape(size, size if is_decode else runner.shape.max_num_seqs, is_decode))


if __name__ == "__main__":
    main(*sys.argv[1:])
