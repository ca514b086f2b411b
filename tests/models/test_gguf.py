"""GGUF files: written by the gguf package from a tiny checkpoint, as llama.cpp's converter would, and read back."""

import json
import os
import sys
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import AutoTokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from models import build_model, open_checkpoint
from models.config import RopeScaling
from models.tokenizer import QWEN2_SPLIT, load_tokenizer, tokenizer_from_gguf

LLAMA3 = Path(__file__).parent.parent / "fixtures" / "llama3"
NAMES = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 3)
HEADS = {"q_proj": 6, "k_proj": 2}


def interleave(weights: np.ndarray, num_heads: int) -> np.ndarray:
    """What llama.cpp's converter does to the rows of Llama's queries and keys."""
    return (
        weights.reshape(num_heads, 2, weights.shape[0] // num_heads // 2, *weights.shape[1:])
        .swapaxes(1, 2)
        .reshape(weights.shape)
    )


def write(path: Path, *, rope_factors: np.ndarray | None = None, quantization=None) -> Path:
    config = json.loads((LLAMA3 / "config.json").read_text())
    vocabulary = json.loads((LLAMA3 / "tokenizer.json").read_text())["model"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    tokens = sorted(vocabulary["vocab"], key=vocabulary["vocab"].get)
    tokens += [f"<unused{i}>" for i in range(config["vocab_size"] - len(tokens))]
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(tokens) - 3))
    writer.add_token_merges([" ".join(merge) for merge in vocabulary["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template("{{ messages[0]['content'] }}<|end|>")
    for name, values in load_file(LLAMA3 / "model.safetensors").items():
        for projection, num_heads in HEADS.items():
            if projection in name:
                values = interleave(values, num_heads)
        new_name = NAMES.get_name(name, try_suffixes=(".weight",))
        if quantization is not None and values.ndim == 2 and values.shape[1] % 32 == 0:
            writer.add_tensor(new_name, gguf.quants.quantize(values, quantization), raw_dtype=quantization)
        else:
            writer.add_tensor(new_name, values)
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", rope_factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def params_of(path: Path):
    checkpoint = open_checkpoint(str(path), skip_tokenizer=True)
    model = build_model(checkpoint.config, dtype=jnp.float32)
    return checkpoint.load_params(model, jnp.float32, progress=False)


def test_reads_what_was_written(tmp_path: Path) -> None:
    """The same parameters as from safetensors: names mapped, queries and keys put back in order."""
    path = write(tmp_path / "model.gguf")
    jax.tree.map(np.testing.assert_array_equal, params_of(path), params_of(LLAMA3))
    config = open_checkpoint(str(path)).config
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (3, 6, 2, 8)
    assert config.bos_token_id == 0 and config.eos_token_ids == (1,) and not config.tie_word_embeddings


def test_a_directory_with_one_gguf_is_it(tmp_path: Path) -> None:
    write(tmp_path / "model.gguf")
    assert open_checkpoint(str(tmp_path)).config.hidden_size == 48
    with pytest.raises(ValueError, match=r"no config\.json|safetensors"):
        open_checkpoint(str(tmp_path), load_format="safetensors")
    write(tmp_path / "second.gguf")
    with pytest.raises(ValueError, match=r"2 \.gguf files"):
        open_checkpoint(str(tmp_path))


def test_quantized_tensors_are_dequantized(tmp_path: Path) -> None:
    exact, read = params_of(LLAMA3), params_of(write(tmp_path / "q8.gguf", quantization=gguf.GGMLQuantizationType.Q8_0))
    kernel = [p["params"]["layers_0"]["mlp"]["down"]["kernel"] for p in (exact, read)]
    assert 0 < np.abs(kernel[0] - kernel[1]).max() < np.abs(kernel[0]).max() / 127


def test_rope_factors_are_read(tmp_path: Path) -> None:
    factors = np.array([1, 1, 2, 8], np.float32)
    config = open_checkpoint(str(write(tmp_path / "model.gguf", rope_factors=factors))).config
    assert config.rope_scaling == RopeScaling(kind="factors", factors=(1.0, 1.0, 2.0, 8.0))


def test_tokenizer_of_the_header(tmp_path: Path) -> None:
    tokenizer = open_checkpoint(str(write(tmp_path / "model.gguf"))).tokenizer
    original = AutoTokenizer.from_pretrained(LLAMA3)
    for text in ["the cat", " Dogs went\n\n  12 x 345", "naïve 🎉 世界", "<|bos|>a<|end|>", "it's"]:
        assert tokenizer(text).input_ids == original(text).input_ids
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.decode([0, *tokenizer("cat").input_ids, 2], skip_special_tokens=True) == "cat"
    assert tokenizer.eos_token_id == 1
    messages = [{"role": "user", "content": "the cat"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "the cat<|end|>"


def header(pre: str, **more) -> dict:
    tokens = ["<|bos|>", "1", "2", "3", "Ġ", "12", "Ġ1", "123", "ab"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] + [1] * (len(tokens) - 1),
        "tokenizer.ggml.merges": ["1 2", "Ġ 1", "12 3"],
        "tokenizer.ggml.bos_token_id": 0,
        **more,
    }


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["Ġ", "123"]),  # merges run over all of " 123", best first: "1 2", then "12 3"
        ("smollm", ["Ġ", "1", "2", "3"]),  # every digit by itself
        ("qwen2", ["Ġ", "1", "2", "3"]),
        ("llama-bpe", ["<|bos|>", "Ġ", "123"]),  # up to three digits together, and a BOS
    ],
)
def test_how_digits_are_cut(pre: str, pieces: list[str]) -> None:
    tokenizer = tokenizer_from_gguf(header(pre))
    assert tokenizer.convert_ids_to_tokens(tokenizer(" 123").input_ids) == pieces


def test_qwen2_cuts_as_transformers_does() -> None:
    assert QWEN2_SPLIT == PRETOKENIZE_REGEX


def test_bos_follows_the_header() -> None:
    assert tokenizer_from_gguf(header("smollm", **{"tokenizer.ggml.add_bos_token": True}))("1").input_ids == [0, 1]
    assert tokenizer_from_gguf(header("llama-bpe", **{"tokenizer.ggml.add_bos_token": False}))("1").input_ids == [1]


def test_other_tokenizers_are_refused_with_a_way_out() -> None:
    with pytest.raises(ValueError, match=r"bert.*tokenizer=<hub id or directory>"):
        tokenizer_from_gguf({"tokenizer.ggml.model": "bert"})
    with pytest.raises(ValueError, match="unheard-of"):
        tokenizer_from_gguf(header("unheard-of"))


def test_a_directory_without_a_fast_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot load a tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("size", [0, 3, 1000, 200_000])
def test_a_truncated_file_is_said_to_be_so(tmp_path: Path, size: int) -> None:
    path = write(tmp_path / "model.gguf")
    os.truncate(path, size)
    with pytest.raises(ValueError, match=r"model\.gguf is not a whole GGUF file"):
        open_checkpoint(str(path), skip_tokenizer=True)


def test_without_the_gguf_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "model.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModuleNotFoundError, match="pip install gguf"):
        open_checkpoint(str(path))
