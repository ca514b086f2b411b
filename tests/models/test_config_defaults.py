"""A config.json means what transformers takes it for: its classes fill up what is missing and rename what is old."""

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import transformers

from models import ModelConfig
from models.config import FAMILIES
from tests.models.test_config import (
    DEEPSEEK_V2_LITE,
    DEEPSEEK_V3,
    GEMMA3_1B,
    GPT2,
    GPT_OSS_20B,
    MIXTRAL,
    PHI3_128K,
    QWEN3_0_6B,
    QWEN3_30B_A3B,
)

CLASSES: dict[str, Any] = {
    "LlamaForCausalLM": transformers.LlamaConfig,
    "MistralForCausalLM": transformers.MistralConfig,
    "Qwen2ForCausalLM": transformers.Qwen2Config,
    "Qwen3ForCausalLM": transformers.Qwen3Config,
    "MixtralForCausalLM": transformers.MixtralConfig,
    "Qwen3MoeForCausalLM": transformers.Qwen3MoeConfig,
    "GptOssForCausalLM": transformers.GptOssConfig,
    "DeepseekV2ForCausalLM": transformers.DeepseekV2Config,
    "DeepseekV3ForCausalLM": transformers.DeepseekV3Config,
    "Gemma2ForCausalLM": transformers.Gemma2Config,
    "Gemma3ForCausalLM": transformers.Gemma3TextConfig,
    "Gemma3ForConditionalGeneration": transformers.Gemma3Config,
    "Olmo2ForCausalLM": transformers.Olmo2Config,
    "Phi3ForCausalLM": transformers.Phi3Config,
    "GPT2LMHeadModel": transformers.GPT2Config,
}
NEEDED = {  # without them transformers refuses the config, or the default does not go with the others
    "architectures",
    "num_attention_heads",
    "num_experts_per_tok",
    "num_hidden_layers",
    "num_key_value_heads",
    "original_max_position_embeddings",
}
ROPES = [
    {},
    {"rope_theta": 500.0},
    {"rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_theta": 500.0},
    {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    {"rope_scaling": {"type": "yarn", "factor": 4.0, "mscale": 1.0}, "original_max_position_embeddings": 1024},
    {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "beta_fast": 16}},
    {
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "original_max_position_embeddings": 1024,
    },
]


def meaning(config: dict[str, Any]) -> ModelConfig:
    """End tokens aside: where config.json has none, generation_config.json and the tokenizer say which they are."""
    return replace(ModelConfig.from_hf(config), bos_token_id=None, eos_token_ids=())


def check(config: dict[str, Any]) -> None:
    """As it is, and as transformers 5 writes it after reading it."""
    architecture = config["architectures"][0]
    assert meaning(config) == meaning(CLASSES[architecture].from_dict(deepcopy(config)).to_dict())


@pytest.mark.parametrize("architecture", FAMILIES)
def test_an_empty_config_is_the_class_itself(architecture: str) -> None:
    chosen = {"num_experts_per_tok": 2} if architecture == "DeepseekV2ForCausalLM" else {}  # has no default
    check({"architectures": [architecture], **chosen})


@pytest.mark.parametrize(
    "published",
    [
        QWEN3_0_6B,
        {**QWEN3_0_6B, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 3},
        {**QWEN3_0_6B, "architectures": ["LlamaForCausalLM"]},
        {**QWEN3_0_6B, "architectures": ["MistralForCausalLM"], "sliding_window": 8},
        {**QWEN3_0_6B, "architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True},
        {**QWEN3_0_6B, "architectures": ["Olmo2ForCausalLM"]},
        GEMMA3_1B,
        {**GEMMA3_1B, "architectures": ["Gemma2ForCausalLM"]},
        PHI3_128K,
        GPT2,
        MIXTRAL,
        {**QWEN3_30B_A3B, "decoder_sparse_step": 2},
        {k: v for k, v in GPT_OSS_20B.items() if k != "quantization_config"},
        DEEPSEEK_V3,
        DEEPSEEK_V2_LITE,
    ],
    ids=lambda config: config["architectures"][0],
)
def test_whatever_is_left_out_of_a_published_config(published: dict[str, Any]) -> None:
    check(published)
    for name in published.keys() - NEEDED:
        check({key: value for key, value in published.items() if key != name})


@pytest.mark.parametrize("architecture", [a for a in FAMILIES if a not in ("Phi3ForCausalLM", "GPT2LMHeadModel")])
def test_rope_in_old_and_new_names(architecture: str) -> None:
    chosen = {"num_experts_per_tok": 2} if architecture == "DeepseekV2ForCausalLM" else {}
    for rope in ROPES:
        if architecture.startswith("Gemma3") and "type" in rope.get("rope_scaling", {}):
            continue  # refused: transformers takes no notice of it
        if architecture.startswith("Gemma3") and (parameters := rope.get("rope_parameters")):
            rope = {"rope_parameters": {"full_attention": parameters}}
        if architecture == "Gemma3ForConditionalGeneration":
            rope = {"text_config": {**rope, "max_position_embeddings": 4096}}
        check({"architectures": [architecture], "max_position_embeddings": 4096, **chosen, **rope})
