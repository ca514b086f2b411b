"""A model split over virtual CPU devices says what it says on one."""

import json
import os
import subprocess
import sys

import pytest

from paged.config import EngineConfig
from paged.engine import Engine
from paged.errors import InvalidRequestError
from tests.paged.tiny import CONFIG, SMALL, write_config

WIDE = CONFIG | {
    "vocab_size": 160, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 16,
    "num_key_value_heads": 8, "max_position_embeddings": 128,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
FAMILIES = {
    "llama": (WIDE | {"attention_bias": True}, [1, 4]),
    "llama, every size": (WIDE, [1, 2, 8]),
    "few KV heads": (WIDE | {"num_key_value_heads": 2, "attention_bias": True}, [1, 8]),
    "four KV heads": (WIDE | {"num_key_value_heads": 4}, [1, 4, 8]),
    "one KV head, norms over all": (
        WIDE | {"architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2", "num_key_value_heads": 1},
        [1, 4],
    ),
    "gemma": (
        WIDE
        | {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "tie_word_embeddings": True}
        | {"sliding_window": 8, "query_pre_attn_scalar": 8},
        [1, 4],
    ),
    "eight-bit cache": (WIDE | {"num_key_value_heads": 2}, [1, 2, 4], {"kv_cache_dtype": "int8"}),
    "experts": (WIDE | {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"} | EXPERTS, [1, 4]),
}


DEFAULT = "few KV heads"  # than devices, and not


@pytest.mark.parametrize(
    "family", [DEFAULT, *(pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES if f != DEFAULT)]
)
def test_greedy_tokens_equal_one_device(family: str, tmp_path) -> None:
    config, sizes, *options = FAMILIES[family]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    command = [sys.executable, "-m", "tests.paged.greedy_by_devices", str(tmp_path)]
    request = json.dumps({"config": config, "sizes": sizes, **(options[0] if options else {})})
    done = subprocess.run([*command, request], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    one, *others = json.loads(done.stdout.splitlines()[-1]).values()
    assert len(set(map(tuple, one["tokens"].values()))) > 1
    for size, result in zip(sizes[1:], others, strict=True):
        assert result["tokens"] == one["tokens"]
        assert result["compiles_after_start"] == 0
        assert result["cache_devices"] == size
        heads = config["num_key_value_heads"]
        assert result["cache_bytes"] == one["cache_bytes"] // min(size, heads)
        repeated = head_bytes(config) * (1 - heads / size) if size > heads else 0
        assert 0 <= result["weight_bytes"] - repeated - one["weight_bytes"] / size < one["weight_bytes"] / size * 0.1


def head_bytes(config: dict) -> int:
    """Of the float32 weights that make one KV head's keys and values, in all layers."""
    width = config["hidden_size"] // config["num_attention_heads"]
    return config["num_hidden_layers"] * 2 * width * config["hidden_size"] * 4


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (0, "tensor_parallel_size must be at least 1"),
        (64, "tensor_parallel_size 64 needs as many devices, and there are"),
    ],
)
def test_sizes_that_cannot_be(size: int, message: str, tmp_path) -> None:
    options = SMALL | {"model": write_config(tmp_path), "load_format": "dummy", "tensor_parallel_size": size}
    with pytest.raises(InvalidRequestError, match=message) as e:
        Engine(EngineConfig.from_kwargs(**options))
    assert e.value.param == "tensor_parallel_size"
