"""The kernels compile for an H100 on a machine without one, given jax's CUDA plugin and nothing else of CUDA."""

import json
import subprocess
import sys
from importlib.util import find_spec

import pytest

from tests.kernels.gpu.h100 import ENVIRONMENT

pytestmark = pytest.mark.skipif(find_spec("jax_cuda13_plugin") is None, reason="needs jax-cuda13-plugin")

FEW = [
    {"H": 32, "K": 8, "D": 128, "N": 16, "T": 64, "S": 64, "decode_only": True},
    {"H": 9, "K": 3, "D": 64, "N": 16, "T": 128, "S": 8},
    {"H": 16, "K": 8, "D": 128, "N": 16, "T": 64, "S": 64, "decode_only": True, "fused": 1, "norms": True},
    {"H": 4, "K": 1, "D": 256, "N": 32, "T": 128, "S": 8, "window": 512, "fused": 1, "norms": True},
    {"H": 64, "K": 8, "D": 64, "N": 64, "T": 128, "S": 8, "window": 128, "sinks": True, "soft_cap": 30.0},
]
EIGHT_BITS = {"D": 128, "N": 64, "T": 64, "S": 64, "fused": 4, "norms": True}
FEW += [
    {"H": 32, "K": 8, **EIGHT_BITS, "decode_only": True, "cache_dtype": "int8"},
    {"H": 16, "K": 8, **EIGHT_BITS, "cache_dtype": "float8_e4m3fn", "window": 512, "soft_cap": 30.0},
]
MANY = [
    {"H": 16 if G > 8 else 24, "K": (16 if G > 8 else 24) // G, "D": D, "N": N, "T": 200, "S": 7, **options}
    for G, D, N in [(1, 64, 16), (3, 64, 32), (4, 128, 64), (6, 128, 128), (8, 128, 16), (16, 128, 32), (2, 256, 16)]
    for options in ({}, {"window": 300, "soft_cap": 30.0, "sinks": True}, {"dtype": "float16"}, {"fused": 1})
]
EXPERTS = [  # of Qwen3-30B-A3B, 64 tokens and 4,096, and of gpt-oss
    {"X": 128, "M": 512, "F": 1536, "C": 2048, "activation": "silu"},
    {"X": 128, "M": 512, "F": 2048, "C": 768},
    {"X": 128, "M": 32768, "F": 1536, "C": 2048, "activation": "gelu_tanh"},
    {"X": 128, "M": 32768, "F": 2048, "C": 768, "dtype": "float16"},
    {"X": 32, "M": 4, "F": 5760, "C": 2880},
]

HEADS = [  # of Qwen3-0.6B, for few rows and many, of Llama 3.1 and of SmolLM2
    {"M": 3, "V": 151936, "C": 1024},
    {"M": 256, "V": 151936, "C": 1024},
    {"M": 128, "V": 128256, "C": 4096, "greedy": True},
    {"M": 700, "V": 49152, "C": 576, "dtype": "float16"},
]

NORMS = [  # of more parts than there ever are; of gpt-oss, whose rows are not a multiple of 1,024; the longest rows
    {"M": 64, "E": 4096, "parts": 8},
    {"M": 1, "E": 2880, "parts": 1, "dtype": "float16"},
    {"M": 256, "E": 16384, "parts": 1},
]


def compiles(case, expected=None):
    command = [sys.executable, "-m", "tests.kernels.gpu.compile_for_h100", json.dumps(case)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-2000:]
    if expected is None:
        eight_bits = "cache_dtype" in case
        expected = ["decode_eight_bits" if eight_bits else "decode_attention"]
        in_runs = case["S"] * case["K"] > 1.4 * 132 * (1 if case["D"] == 256 else 2)  # workers merge on their way
        expected += ["decode_attention_merge"] if eight_bits or not in_runs else []
        expected += [] if case.get("decode_only") else ["prefill_attention"]
        from_projection = case.get("decode_only") and not eight_bits  # decode attention rotates and writes itself
        expected += ["rotate_and_write"] if case.get("fused") and not from_projection else []
    assert json.loads(done.stdout.splitlines()[-1])["kernels"] == sorted(expected)


@pytest.mark.parametrize("case", FEW, ids=str)
def test_compiles(case):
    compiles(case)


@pytest.mark.parametrize(
    "case", EXPERTS[:2] + [pytest.param(case, marks=pytest.mark.slow) for case in EXPERTS[2:]], ids=str
)
def test_experts_compile(case):
    compiles(case, ["grouped_matmul"])


@pytest.mark.parametrize(
    "case", HEADS[:2] + [pytest.param(case, marks=pytest.mark.slow) for case in HEADS[2:]], ids=str
)
def test_heads_compile(case):
    compiles(case, ["head"])


@pytest.mark.parametrize(
    "case", NORMS[:1] + [pytest.param(case, marks=pytest.mark.slow) for case in NORMS[1:]], ids=str
)
def test_norms_compile(case):
    compiles(case, ["add_rms_norm"])


@pytest.mark.slow
@pytest.mark.parametrize("case", MANY, ids=str)
def test_compiles_in_every_shape(case):
    compiles(case)


@pytest.mark.slow
@pytest.mark.parametrize("cache_dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("G", "D", "N"), [(1, 64, 8), (3, 64, 128), (4, 128, 16), (16, 128, 32), (2, 256, 8), (1, 256, 128)]
)
def test_compiles_in_every_shape_over_eight_bits(G, D, N, dtype, cache_dtype):
    compiles({"H": 2 * G, "K": 2, "D": D, "N": N, "T": 200, "S": 7, "dtype": dtype, "cache_dtype": cache_dtype})
