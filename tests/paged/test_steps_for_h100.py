"""Whole step programs compile for an H100 on a machine without one, and run through the kernels that they should."""

import json
import subprocess
import sys
from importlib.util import find_spec

import pytest

from tests.kernels.gpu.h100 import ENVIRONMENT
from tests.paged.tiny import write_config

pytestmark = pytest.mark.skipif(find_spec("jax_cuda13_plugin") is None, reason="needs jax-cuda13-plugin")
SHAPE = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3,
         "head_dim": 64, "num_hidden_layers": 2, "vocab_size": 4096, "max_position_embeddings": 2048}  # fmt: skip
LAYERS = SHAPE["num_hidden_layers"]
DECODE = {"decode_attention": LAYERS}
MERGE = {"decode_attention_merge": LAYERS}  # of few sequences and heads, see gpu/decode.py
PROMPT = {"rotate_and_write": LAYERS, "prefill_attention": LAYERS}
LINEAR = {"linear": 4 * LAYERS}  # qkv, out, gate and up, down
HEAD = {"head": 1}  # and the sampler
UNIFORM_HEAD = {"linear": 1}
NORMS = {"add_rms_norm": 2 * LAYERS + 1}
UNIFORM = PROMPT | {"linear": 4 * LAYERS} | NORMS


def kernels_of(folder: str, options: dict, *programs: str) -> dict[str, dict[str, int]]:
    """Of ours."""
    return {line["program"]: line["kernels"] for line in compile_steps(folder, options, *programs)}


def compile_steps(folder: str, options: dict, *programs: str) -> list[dict]:
    command = [sys.executable, "-m", "tests.paged.compile_steps_for_h100", folder, json.dumps(options), *programs]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_steps(tmp_path):
    """One row of a product is faster as a sum in XLA, and products of many are as fast there, but for gate and up; of
    a prompt's tokens few go through the last layer's down."""
    programs = ("decode-1", "decode-64", "prompt-512", "sample-1", "sample-64")
    lines = compile_steps(write_config(tmp_path, **SHAPE), {}, *programs)
    assert {line["program"]: line["kernels"] for line in lines} == {
        "decode-1": DECODE | MERGE | NORMS,
        "decode-64": DECODE | MERGE | NORMS | LINEAR,
        "prompt-512": DECODE | NORMS | PROMPT | {"linear": LAYERS + 1},
        "sample-1": HEAD,
        "sample-64": HEAD,
    }
    # Of a prompt qkv, out, and all but the last down are cuBLAS's: XLA has nothing to choose by time.
    assert not any(line["products"]["triton"] for line in lines)
    cublas = {line["program"]: line["products"]["cublas"] for line in lines}
    assert cublas == dict.fromkeys(programs, 0) | {"prompt-512": 3 * LAYERS - 1}
    others = {line["program"]: line["all"] - sum(line["kernels"].values()) for line in lines}
    # Each takes 1.3 to 2.3 us. Those of one row have XLA's products among them.
    assert others["decode-64"] <= 10 and others["sample-1"] <= 5 and others["sample-64"] <= 3
    assert others["decode-1"] <= 7 + 4 * LAYERS


def test_wide_layers_norm_and_add_on_their_way(tmp_path):
    """Without kernels of their own but for the first norm, which no product comes before; XLA makes of the last what no
    product follows. With many rows a kernel adds and norms, and what takes the gate's activation along is faster than
    XLA."""
    wide = {"hidden_size": 4096, "intermediate_size": 6144, "num_attention_heads": 32, "num_key_value_heads": 8}
    found = kernels_of(write_config(tmp_path, **SHAPE | wide | {"head_dim": 128}), {}, "decode-64", "prompt-1024")
    assert found == {
        "decode-64": DECODE | LINEAR | {"add_rms_norm": 1},
        "prompt-1024": DECODE | NORMS | PROMPT | {"linear": LAYERS + 1},
    }


@pytest.mark.slow
def test_deterministic_steps_have_one_kernel_for_each_operation(tmp_path):
    steps = ("decode-1", "decode-64", "prompt-512")
    found = kernels_of(write_config(tmp_path, **SHAPE), {"deterministic": True}, *steps, "sample-1", "sample-64")
    assert found == dict.fromkeys(steps, UNIFORM) | dict.fromkeys(("sample-1", "sample-64"), UNIFORM_HEAD)


def test_steps_over_eight_bits(tmp_path):
    found = kernels_of(write_config(tmp_path, **SHAPE), {"kv_cache_dtype": "int8"}, "decode-1", "prompt-512")
    expected = {"rotate_and_write": LAYERS, "decode_eight_bits": LAYERS, "decode_attention_merge": LAYERS} | NORMS
    prompt = expected | PROMPT | {"linear": LAYERS + 1}
    assert found == {"decode-1": expected, "prompt-512": prompt}
