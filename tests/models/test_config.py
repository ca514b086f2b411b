"""config.json and GGUF headers to ModelConfig: what is read, and what is refused in which words."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from models import ModelConfig, RopeScaling
from models.config import FAMILIES
from models.experts_config import ExpertsConfig
from models.latent_config import LatentConfig
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
        ({"rope_scaling": {"rope_type": "proportional", "factor": 4.0}}, ["proportional", "dynamic", "llama3", "yarn"]),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}, ["longrope", "short_factor"]),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, ["llama3", "low_freq_factor"]),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0}},
            ["high_freq_factor", "low_freq_factor of 4.0", "1.0"],
        ),
        ({"rope_scaling": {"type": "linear"}}, ["linear", "factor"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "0.5", "1.0"]),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, ["partial_rotary_factor"]),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, ["layer type"]),
        ({"hidden_act": "relu2"}, ["hidden_act", "relu2", "silu"]),
        ({"mlp_bias": True}, ["mlp_bias"]),
        ({"quantization_config": {"quant_method": "awq"}}, ["awq", "GGUF"]),
        ({"hidden_size": None}, ["hidden_size"]),
        ({"num_key_value_heads": 3}, ["16", "3"]),
        ({"use_sliding_window": True, "sliding_window": 0, "max_window_layers": 0}, ["sliding"]),
        ({"use_sliding_window": True, "sliding_window": 8, "layer_types": ["chunked_attention"] * 28}, ["chunked"]),
        ({"use_sliding_window": True, "sliding_window": 8, "layer_types": ["full_attention"]}, ["1", "28"]),
        ({"sliding_window": 8, "layer_types": ["sliding_attention"] * 28}, ["layer_types", "sliding_window"]),
        ({"architectures": ["LlamaForCausalLM"], "layer_types": ["sliding_attention"] * 28}, ["layer_types"]),
        ({"architectures": ["MistralForCausalLM"], "layer_types": ["sliding_attention"] * 28}, ["full_attention"]),
        ({"architectures": ["MistralForCausalLM"], "attention_bias": True}, ["attention_bias"]),
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


def test_gemma3_with_images_is_the_text_model_inside() -> None:
    """As published with 4B parameters."""
    text = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}  # fmt: skip
    published = {"architectures": ["Gemma3ForConditionalGeneration"], "eos_token_id": [1, 106], "text_config": text}
    config = ModelConfig.from_hf({**published, "vision_config": {"hidden_size": 1152, "num_attention_heads": 16}})
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.vocab_size) == (8, 4, 256, 262_208)
    assert config.rope_scaling == RopeScaling(kind="linear", factor=8.0) and config.eos_token_ids == (1, 106)
    assert config.sliding_windows[:6] == (1024,) * 5 + (None,) and config.tie_word_embeddings
    with pytest.raises(ValueError, match="final_logit_softcapping"):
        ModelConfig.from_hf({**published, "text_config": {**text, "final_logit_softcapping": 30.0}})


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
        ({"hidden_activation": "tanh"}, "hidden_activation"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"sliding_window": None}, "sliding_window"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "full_attention and sliding_attention"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": False}}, "truncate"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"layer_types": ["chunked"] * 26}, "chunked"),
        ({"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}}, "sliding_attention"),
    ],
)
def test_gemmas_that_are_refused(change: dict, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        ModelConfig.from_hf({**GEMMA3_1B, **change})


PHI3_128K = {
    "architectures": ["Phi3ForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "original_max_position_embeddings": 4096,
    "rope_scaling": {"type": "longrope", "short_factor": [1.5] * 48, "long_factor": [9.0] * 48},
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-05,
    "sliding_window": 262144,
    "vocab_size": 32064,
}


def test_phi3_serves_the_context_of_its_short_factors() -> None:
    config = ModelConfig.from_hf(PHI3_128K)
    assert config.max_position_embeddings == 4096 and config.rope_scaling is not None
    assert config.rope_scaling.factors == (1.5,) * 48 and config.rope_theta == 10_000.0
    assert config.rope_scaling.attention_factor == pytest.approx(np.sqrt(1 + np.log(32) / np.log(4096)))
    assert config.sliding_windows == (262144,) * 32 and config.rotary_dim is None
    assert config.for_context(4096) == config
    long = config.for_context(4097)
    assert long.max_position_embeddings == 131072 and long.rope_scaling is not None
    assert long.rope_scaling.factors == (9.0,) * 48
    assert long.rope_scaling.attention_factor == config.rope_scaling.attention_factor
    assert long.for_context(200_000) == long  # and is refused when the engine starts
    phi4_mini = ModelConfig.from_hf({**PHI3_128K, "partial_rotary_factor": 0.75, "rope_scaling": None})
    assert phi4_mini.rotary_dim == 72 and phi4_mini.rope_scaling is None
    assert phi4_mini.max_position_embeddings == 131072


GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "activation_function": "gelu_new",
    "bos_token_id": 50256,
    "eos_token_id": 50256,
    "layer_norm_epsilon": 1e-05,
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "vocab_size": 50257,
}


def test_gpt2_has_names_of_its_own() -> None:
    config = ModelConfig.from_hf(GPT2)
    assert (config.hidden_size, config.num_layers, config.num_heads, config.num_kv_heads) == (768, 12, 12, 12)
    assert (config.head_dim, config.intermediate_size, config.max_position_embeddings) == (64, 3072, 1024)
    assert config.rms_norm_eps == 1e-5 and config.tie_word_embeddings and config.eos_token_ids == (50256,)
    assert ModelConfig.from_hf({**GPT2, "n_inner": 1000}).intermediate_size == 1000


def test_olmo2_normalises_queries_and_keys() -> None:
    olmo = ModelConfig.from_hf({**QWEN3_0_6B, "architectures": ["Olmo2ForCausalLM"]})
    assert olmo.qk_norm and not olmo.qkv_bias and olmo.sliding_windows == (None,) * 28


MIXTRAL = {
    "architectures": ["MixtralForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "vocab_size": 32000,
}
QWEN3_30B_A3B = {
    **QWEN3_0_6B,
    "architectures": ["Qwen3MoeForCausalLM"],
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_experts": 128,
    "num_experts_per_tok": 8,
}


def test_experts_of_mixtral_and_qwen3() -> None:
    mixtral = ModelConfig.from_hf(MIXTRAL)
    assert mixtral.experts == ExpertsConfig(count=8, chosen=2, intermediate_size=14336, layers=(True,) * 32)
    assert mixtral.sliding_windows == (None,) * 32
    assert ModelConfig.from_hf({**MIXTRAL, "sliding_window": 4096}).sliding_windows == (4096,) * 32
    qwen = ModelConfig.from_hf(QWEN3_30B_A3B)
    assert qwen.experts == ExpertsConfig(count=128, chosen=8, intermediate_size=768, layers=(True,) * 28)
    assert qwen.qk_norm and qwen.intermediate_size == 3072
    mixed = ModelConfig.from_hf(
        {**QWEN3_30B_A3B, "mlp_only_layers": [3], "decoder_sparse_step": 2, "sliding_window": 9}
    )
    assert mixed.experts is not None and mixed.experts.layers == tuple(i % 2 == 1 and i != 3 for i in range(28))
    assert mixed.sliding_windows == (None,) * 28  # not switched on
    unscaled = ModelConfig.from_hf({k: v for k, v in QWEN3_30B_A3B.items() if k != "norm_topk_prob"})
    assert unscaled.experts is not None and not unscaled.experts.normalise


GPT_OSS_20B = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "eos_token_id": 200002,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "quantization_config": {"quant_method": "mxfp4"},
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "vocab_size": 201088,
}


def test_gpt_oss() -> None:
    config = ModelConfig.from_hf(GPT_OSS_20B)
    assert config.sliding_windows == (128, None) * 12
    assert config.attention_sinks and config.qkv_bias and config.out_bias
    assert config.experts == ExpertsConfig(
        count=32, chosen=4, intermediate_size=2880, layers=(True,) * 24, scoring="softmax_over_chosen", bias=True,
        swiglu_limit=7.0,
    )  # fmt: skip
    assert config.rope_scaling is not None and not config.rope_scaling.truncate
    assert (config.rope_theta, config.max_position_embeddings) == (150_000.0, 131072)
    left_out = (
        "rope_scaling",
        "rope_theta",
        "sliding_window",
        "swiglu_limit",
        "layer_types",
        "head_dim",
        "rms_norm_eps",
    )
    assert ModelConfig.from_hf({k: v for k, v in GPT_OSS_20B.items() if k not in left_out}) == config


DEEPSEEK_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "v_head_dim": 128,
    "vocab_size": 129280,
}
DEEPSEEK_V2_LITE = {
    **DEEPSEEK_V3,
    "architectures": ["DeepseekV2ForCausalLM"],
    "first_k_dense_replace": 1,
    "n_group": 1,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "q_lora_rank": None,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "topk_group": 1,
    "topk_method": "greedy",
}


def test_deepseek_caches_latent_vectors() -> None:
    config = ModelConfig.from_hf(DEEPSEEK_V3)
    assert (config.num_kv_heads, config.head_dim, config.rotary_dim) == (1, 576, 64)
    assert config.latent == LatentConfig(query_rank=1536, rank=512, nope_dim=128, rope_dim=64, value_dim=128)
    assert config.experts == ExpertsConfig(
        count=256, chosen=8, intermediate_size=2048, layers=(False,) * 3 + (True,) * 58, scoring="sigmoid",
        scale=2.5, groups=8, chosen_groups=4, shared=1,
    )  # fmt: skip
    assert config.rope_scaling is not None and config.rope_scaling.attention_factor == 1.0
    assert config.attention_scale == pytest.approx(192**-0.5 * (0.1 * np.log(40) + 1) ** 2)
    assert ModelConfig.from_hf({**DEEPSEEK_V3, "rope_scaling": None}).attention_scale == 192**-0.5
    lite = ModelConfig.from_hf(DEEPSEEK_V2_LITE)
    assert lite.latent is not None and lite.latent.query_rank is None
    assert lite.experts == ExpertsConfig(
        count=256, chosen=8, intermediate_size=2048, layers=(False,) + (True,) * 60, normalise=False, shared=2
    )


@pytest.mark.parametrize(
    ("config", "change", "words"),
    [
        (PHI3_128K, {"rope_scaling": {"type": "longrope"}}, ["longrope", "short_factor"]),
        (
            PHI3_128K,
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 9, "long_factor": [2.0] * 9}},
            ["9 factors", "48"],
        ),
        (
            PHI3_128K,
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 9}},
            ["9 long factors", "48"],
        ),
        (PHI3_128K, {"rope_scaling": {"type": "dynamic"}}, ["dynamic", "longrope"]),
        (PHI3_128K, {"attention_bias": True}, ["attention_bias"]),
        (GPT2, {"activation_function": "tanh"}, ["activation_function", "gelu_new"]),
        (GPT2, {"add_cross_attention": True}, ["add_cross_attention"]),
        (GPT2, {"n_embd": 770}, ["770", "12"]),
        (GPT2, {"n_layer": None}, ["num_hidden_layers"]),
        (MIXTRAL, {"num_local_experts": None}, ["num_local_experts"]),
        (MIXTRAL, {"num_experts_per_tok": 9}, ["9 of 8 experts"]),
        (MIXTRAL, {"attention_bias": True}, ["attention_bias"]),
        (MIXTRAL, {"quantization_config": {"quant_method": "mxfp4"}}, ["mxfp4"]),
        (QWEN3_30B_A3B, {"hidden_act": "tanh"}, ["hidden_act"]),
        (QWEN3_30B_A3B, {"decoder_sparse_step": 0}, ["decoder_sparse_step"]),
        (QWEN3_30B_A3B, {"moe_intermediate_size": 0}, ["inner width"]),
        (GPT_OSS_20B, {"quantization_config": {"quant_method": "gptq"}}, ["gptq"]),
        (GPT_OSS_20B, {"layer_types": ["sliding_attention"]}, ["1", "24"]),
        (GPT_OSS_20B, {"sliding_window": None}, ["layer_types", "sliding_window"]),
        (GPT_OSS_20B, {"experts_per_token": 2}, ["experts_per_token", "4"]),
        (DEEPSEEK_V3, {"scoring_func": "softmax"}, ["scoring_func", "sigmoid"]),
        (DEEPSEEK_V3, {"attention_bias": True}, ["attention_bias"]),
        (DEEPSEEK_V3, {"rope_interleave": False}, ["rope_interleave"]),
        (DEEPSEEK_V3, {"kv_lora_rank": None}, ["kv_lora_rank"]),
        (DEEPSEEK_V3, {"qk_rope_head_dim": 0}, ["rope_dim"]),
        (DEEPSEEK_V3, {"n_shared_experts": 0}, ["n_shared_experts"]),
        (DEEPSEEK_V3, {"moe_layer_freq": 2}, ["moe_layer_freq", "1"]),
        (DEEPSEEK_V3, {"n_group": 7}, ["256", "7 groups"]),
        (DEEPSEEK_V3, {"topk_group": 9}, ["9 of 8 groups"]),
        (DEEPSEEK_V3, {"n_group": 128, "num_experts_per_tok": 9}, ["4 groups of 2", "9 experts"]),
        (DEEPSEEK_V3, {"quantization_config": {"quant_method": "fp8"}}, ["fp8"]),
        (DEEPSEEK_V2_LITE, {"topk_method": "noaux_tc"}, ["topk_method", "greedy"]),
        (DEEPSEEK_V2_LITE, {"norm_topk_prob": True}, ["norm_topk_prob"]),
    ],
)
def test_what_the_other_families_refuse(config: dict, change: dict, words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        ModelConfig.from_hf({**config, **change})
    for word in words:
        assert word in str(caught.value)


def test_an_unknown_architecture_is_one_sentence_with_all_that_are_known() -> None:
    with pytest.raises(ValueError) as caught:
        ModelConfig.from_hf({"architectures": ["MambaForCausalLM"]})
    known = ", ".join(FAMILIES)
    assert str(caught.value) == f"architecture MambaForCausalLM is not supported; supported are: {known}"
