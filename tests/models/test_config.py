"""config.json and GGUF headers to ModelConfig: what is read, and what is refused in which words."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from models import ModelConfig, RopeScaling
from models.layers import rotary_frequencies

FIXTURES = Path(__file__).parent.parent / "fixtures"

QWEN3_0_6B = {
    "architectures": ["Qwen3ForCausalLM"],
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def fixture_config(name: str) -> dict:
    return json.loads((FIXTURES / name / "config.json").read_text())


def test_reads_an_older_config() -> None:
    config = ModelConfig.from_hf(QWEN3_0_6B)
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (28, 16, 8, 128)
    assert config.rope_theta == 1e6 and config.rope_scaling is None
    assert config.qk_norm and config.tie_word_embeddings and not config.qkv_bias
    assert config.eos_token_ids == (151645,) and config.bos_token_id == 151643
    assert config.sliding_windows == (None,) * 28


def test_rope_scaling_is_read_alike_from_old_and_new_names() -> None:
    old = fixture_config("llama3")
    assert "rope_scaling" in old
    new = {k: v for k, v in old.items() if k not in ("rope_scaling", "rope_theta")}
    new["rope_parameters"] = {**old["rope_scaling"], "rope_theta": old["rope_theta"]}
    assert ModelConfig.from_hf(new) == ModelConfig.from_hf(old)
    assert ModelConfig.from_hf(old).rope_scaling == RopeScaling(
        kind="llama3", factor=8.0, original_context=32, low_freq_factor=1.0, high_freq_factor=4.0
    )


def test_windows_by_layer() -> None:
    assert ModelConfig.from_hf(fixture_config("mistral")).sliding_windows == (24, 24, 24)
    qwen2 = fixture_config("qwen2")
    assert ModelConfig.from_hf(qwen2).sliding_windows == (None, 20, 20)
    del qwen2["layer_types"]
    assert ModelConfig.from_hf(qwen2).sliding_windows == (None, 20, 20)
    assert ModelConfig.from_hf({**qwen2, "use_sliding_window": False}).sliding_windows == (None, None, None)


def test_flags_follow_the_architecture() -> None:
    qwen2 = ModelConfig.from_hf(fixture_config("qwen2"))
    assert qwen2.qkv_bias and not qwen2.out_bias and not qwen2.qk_norm
    llama = ModelConfig.from_hf(fixture_config("llama-mqa"))
    assert llama.qkv_bias and llama.out_bias and llama.num_kv_heads == 1
    assert ModelConfig.from_hf(fixture_config("llama3")).eos_token_ids == (1, 2)


def test_a_config_is_hashable_and_frozen() -> None:
    config = ModelConfig.from_hf(QWEN3_0_6B)
    assert hash(config) == hash(ModelConfig.from_hf(QWEN3_0_6B))
    with pytest.raises(AttributeError):
        config.num_layers = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": ["MambaForCausalLM"]}, ["MambaForCausalLM", "Qwen3ForCausalLM", "LlamaForCausalLM"]),
        ({"architectures": None, "model_type": "mamba"}, ["mamba", "LlamaForCausalLM"]),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}, ["longrope", "llama3"]),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, ["llama3", "low_freq_factor"]),
        ({"rope_scaling": {"type": "linear"}}, ["linear", "factor"]),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, ["layer type"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "gelu", "silu"]),
        ({"mlp_bias": True}, ["mlp_bias"]),
        ({"quantization_config": {"quant_method": "awq"}}, ["awq", "GGUF"]),
        ({"hidden_size": None}, ["hidden_size"]),
        ({"num_key_value_heads": 3}, ["16", "3"]),
        ({"use_sliding_window": True, "sliding_window": 0, "max_window_layers": 0}, ["sliding"]),
        ({"use_sliding_window": True, "sliding_window": 8, "layer_types": ["chunked_attention"] * 28}, ["chunked"]),
        ({"use_sliding_window": True, "sliding_window": 8, "layer_types": ["full_attention"]}, ["1", "28"]),
    ],
)
def test_what_is_not_supported_is_refused_by_name(change: dict, words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        ModelConfig.from_hf({**QWEN3_0_6B, **change})
    for word in words:
        assert word in str(caught.value)


def test_yarn_extends_the_context() -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config = ModelConfig.from_hf({**QWEN3_0_6B, "max_position_embeddings": 32768, "rope_scaling": scaling})
    assert config.max_position_embeddings == 131072


def test_gguf_frequency_factors_are_llama3_scaling_written_out() -> None:
    """llama.cpp stores, per frequency, what Hugging Face's formula divides it by."""
    llama3 = RopeScaling(kind="llama3", factor=8.0, original_context=8192, low_freq_factor=1.0, high_freq_factor=4.0)
    plain, _ = rotary_frequencies(128, 5e5, None)
    scaled, _ = rotary_frequencies(128, 5e5, llama3)
    factors = RopeScaling(kind="factors", factors=tuple(float(f) for f in plain / scaled))
    np.testing.assert_allclose(rotary_frequencies(128, 5e5, factors)[0], scaled, rtol=1e-6)
    assert scaled[0] == plain[0] and np.isclose(scaled[-1], plain[-1] / 8)


GGUF_HEADER = {
    "general.architecture": "qwen2",
    "qwen2.block_count": 2,
    "qwen2.context_length": 4096,
    "qwen2.embedding_length": 64,
    "qwen2.feed_forward_length": 128,
    "qwen2.attention.head_count": 4,
    "qwen2.attention.head_count_kv": 2,
    "qwen2.attention.layer_norm_rms_epsilon": 1e-6,
    "qwen2.rope.freq_base": 1e6,
    "tokenizer.ggml.tokens": ["a", "b", "c"],
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.eot_token_id": 1,
}


def test_reads_a_gguf_header() -> None:
    config = ModelConfig.from_gguf(GGUF_HEADER, ["blk.0.attn_q.bias", "output.weight"])
    assert config == ModelConfig(
        architecture="Qwen2ForCausalLM",
        vocab_size=3,
        hidden_size=64,
        intermediate_size=128,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        max_position_embeddings=4096,
        rope_theta=1e6,
        rms_norm_eps=1e-6,
        qkv_bias=True,
        eos_token_ids=(2, 1),
    )
    assert ModelConfig.from_gguf(GGUF_HEADER, []) == replace(config, qkv_bias=False, tie_word_embeddings=True)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"general.architecture": "rwkv6"}, "rwkv6"),
        ({"qwen2.block_count": None}, "qwen2.block_count"),
        ({"qwen2.rope.scaling.type": "longrope"}, "longrope"),
    ],
)
def test_gguf_headers_that_are_refused(change: dict, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        ModelConfig.from_gguf({**GGUF_HEADER, **change}, [])


GEMMA3_1B = {  # as on the hub
    "architectures": ["Gemma3ForCausalLM"],
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "vocab_size": 262144,
}


def test_gemma3_windows_and_rotary_bases() -> None:
    old = ModelConfig.from_hf(GEMMA3_1B)
    assert old.sliding_windows == ((512,) * 5 + (None,)) * 4 + (512, 512)
    assert (old.rope_theta, old.local_rope_theta, old.attention_scale) == (1e6, 1e4, 1 / 16)
    assert old.tie_word_embeddings and old.qk_norm and old.logits_soft_cap is None
    new = {k: v for k, v in GEMMA3_1B.items() if not k.startswith(("rope", "sliding_window_pattern"))}
    new["rope_parameters"] = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    assert ModelConfig.from_hf(new) == replace(old, rope_scaling=RopeScaling(kind="linear", factor=8.0))


def test_gemma2_caps_by_default_and_alternates() -> None:
    config = ModelConfig.from_hf(
        {**GEMMA3_1B, "architectures": ["Gemma2ForCausalLM"], "query_pre_attn_scalar": 144, "rope_theta": 10000.0}
    )
    assert (config.attention_soft_cap, config.logits_soft_cap, config.attention_scale) == (50.0, 30.0, 1 / 12)
    assert config.sliding_windows == (512, None) * 13
    assert config.local_rope_theta is None and not config.qk_norm


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"hidden_activation": "gelu"}, "hidden_activation"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"layer_types": ["chunked"] * 26}, "chunked"),
        ({"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}}, "sliding_attention"),
    ],
)
def test_gemmas_that_are_refused(change: dict, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        ModelConfig.from_hf({**GEMMA3_1B, **change})
