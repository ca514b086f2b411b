"""Opening and loading checkpoints: every format, and every way in which one can be broken."""

import json
import os
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from models import build_model, open_checkpoint, param_shapes
from models.params import random_params

FIXTURES = Path(__file__).parent.parent / "fixtures"
MESSAGES = [{"role": "user", "content": "the cat"}]


@pytest.fixture
def copied(tmp_path: Path):
    def copy(name: str) -> Path:
        return Path(shutil.copytree(FIXTURES / name, tmp_path / name))

    return copy


def load(path: Path, dtype=jnp.float32, **kwargs):
    checkpoint = open_checkpoint(str(path), skip_tokenizer=True, **kwargs)
    model = build_model(checkpoint.config, dtype=dtype)
    return model, checkpoint.load_params(model, dtype, progress=False)["params"]


def test_fused_weights_are_the_checkpoints_in_order() -> None:
    tensors = load_file(FIXTURES / "llama3" / "model.safetensors")
    _, params = load(FIXTURES / "llama3")
    parts = [tensors[f"model.layers.1.self_attn.{p}_proj.weight"] for p in "qkv"]
    np.testing.assert_array_equal(params["layers_1"]["attention"]["qkv"]["kernel"], np.concatenate(parts))
    parts = [tensors[f"model.layers.2.mlp.{p}_proj.weight"] for p in ("gate", "up")]
    np.testing.assert_array_equal(params["layers_2"]["mlp"]["gate_up"]["kernel"], np.concatenate(parts))
    np.testing.assert_array_equal(params["head"]["kernel"], tensors["lm_head.weight"])


def test_weights_are_cast_on_the_way() -> None:
    stored = load(FIXTURES / "qwen3", jnp.bfloat16)[1]  # stored in bfloat16
    widened = load(FIXTURES / "qwen3", jnp.float32)[1]
    assert {x.dtype for x in jax.tree.leaves(stored)} == {jnp.dtype(jnp.bfloat16)}
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.astype(jnp.float32), b), stored, widened)


def test_tokenizer_and_generation_config_come_along() -> None:
    checkpoint = open_checkpoint(str(FIXTURES / "llama3"))
    assert checkpoint.generation_config["eos_token_id"] == [1, 2]
    assert checkpoint.tokenizer.decode(checkpoint.tokenizer("the cat").input_ids) == "the cat"
    text = checkpoint.tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert text == "user: the cat<|end|>\nassistant: "


def test_generation_config_extends_the_end_tokens(copied) -> None:
    path = copied("mistral")
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 1], "temperature": 0.7}))
    checkpoint = open_checkpoint(str(path), skip_tokenizer=True)
    assert checkpoint.config.eos_token_ids == (1, 5)
    assert checkpoint.generation_config["temperature"] == 0.7


def test_a_tokenizer_from_elsewhere() -> None:
    checkpoint = open_checkpoint(str(FIXTURES / "mistral"), tokenizer=str(FIXTURES / "llama3"))
    assert checkpoint.tokenizer.eos_token == "<|eos|>"


def test_no_tokenizer_is_an_error_unless_skipped() -> None:
    with pytest.raises(ValueError, match="has no tokenizer"):
        open_checkpoint(str(FIXTURES / "mistral"))
    assert open_checkpoint(str(FIXTURES / "mistral"), skip_tokenizer=True).tokenizer is None


def test_dummy_needs_only_config_json(tmp_path: Path) -> None:
    shutil.copy(FIXTURES / "qwen2" / "config.json", tmp_path)
    checkpoint = open_checkpoint(str(tmp_path), load_format="dummy")
    assert checkpoint.tokenizer is None and checkpoint.generation_config == {}
    model = build_model(checkpoint.config, dtype=jnp.bfloat16)
    params = checkpoint.load_params(model, jnp.bfloat16, seed=3)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(
        lambda s: (s.shape, s.dtype), param_shapes(model)
    )
    with pytest.raises(ValueError, match="safetensors"):
        open_checkpoint(str(tmp_path), skip_tokenizer=True)


def test_dummy_weights_follow_the_seed_and_keep_the_variance() -> None:
    model = build_model(open_checkpoint(str(FIXTURES / "llama3")).config, dtype=jnp.float32)
    first, again, other = (random_params(model, jnp.float32, seed)["params"] for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    kernel = first["layers_0"]["mlp"]["down"]["kernel"]
    assert not np.array_equal(kernel, other["layers_0"]["mlp"]["down"]["kernel"])
    assert not np.array_equal(kernel, first["layers_1"]["mlp"]["down"]["kernel"])
    assert np.std(kernel) * kernel.shape[1] ** 0.5 == pytest.approx(1, rel=0.1)
    assert np.all(np.asarray(first["norm"]["scale"]) == 1)


def rewrite(path: Path, change) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def fails(path: Path, *words: str) -> None:
    with pytest.raises(ValueError, match=".*".join(re.escape(w) for w in words)):
        load(path)


def test_a_tied_head_may_be_stored_as_well(copied) -> None:
    path = copied("llama-mqa")
    rewrite(path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))
    model, params = load(path)
    assert model.config.tie_word_embeddings and "head" not in params


def test_a_head_that_is_another_is_not_tied(copied, caplog: pytest.LogCaptureFixture) -> None:
    path = copied("llama-mqa")
    rewrite(path, lambda t: t.update({"lm_head.weight": 2 * t["model.embed_tokens.weight"]}))
    model, params = load(path)
    assert not model.config.tie_word_embeddings and "has another one, which is used" in caplog.text
    np.testing.assert_array_equal(params["head"]["kernel"], 2 * params["embed"]["embedding"])


def test_a_head_that_is_not_tied_must_be_there(copied) -> None:
    path = copied("llama3")
    rewrite(path, lambda t: t.pop("lm_head.weight"))
    fails(path, "lacks", "lm_head.weight")


def test_a_missing_tensor_is_named(copied) -> None:
    path = copied("llama3")
    rewrite(path, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    fails(path, "lacks", "model.layers.1.mlp.up_proj.weight")


def test_a_tensor_without_a_place_is_named(copied) -> None:
    path = copied("llama3")
    rewrite(path, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": np.zeros(48, np.float32)}))
    fails(path, "model.layers.0.self_attn.q_proj.bias")


@pytest.mark.parametrize(
    ("tensor", "shape"),
    [
        ("model.layers.0.self_attn.k_proj.weight", (24, 48)),  # too many rows
        ("model.layers.0.self_attn.v_proj.weight", (8, 48)),  # too few
        ("model.layers.0.mlp.down_proj.weight", (96, 48)),  # transposed
        ("model.norm.weight", (1, 48)),
    ],
)
def test_an_unexpected_shape_is_named(copied, tensor: str, shape: tuple[int, ...]) -> None:
    path = copied("llama3")
    rewrite(path, lambda t: t.update({tensor: np.zeros(shape, np.float32)}))
    fails(path, tensor, str(list(shape)))


def test_a_truncated_file_names_the_tensor_it_breaks_off_in(copied) -> None:
    path = copied("llama3")
    file = path / "model.safetensors"
    header_size = int.from_bytes(file.read_bytes()[:8], "little")
    offsets = json.loads(file.read_bytes()[8 : 8 + header_size])
    name = "model.layers.1.mlp.up_proj.weight"
    os.truncate(file, 8 + header_size + offsets[name]["data_offsets"][1] - 4)
    fails(path, "model.safetensors", name)


@pytest.mark.parametrize("size", [0, 5, 100])
def test_a_file_cut_in_its_header_is_damaged(copied, size: int) -> None:
    path = copied("llama3")
    os.truncate(path / "model.safetensors", size)
    fails(path, "model.safetensors is damaged")


def test_a_missing_shard_is_named(copied) -> None:
    path = copied("mistral")
    (path / "model-00002-of-00004.safetensors").unlink()
    fails(path, "model-00002-of-00004.safetensors")


def test_a_stale_index_names_the_tensor(copied) -> None:
    path = copied("mistral")
    index = json.loads((path / "model.safetensors.index.json").read_text())
    index["weight_map"]["lm_head.weight"] = index["weight_map"]["model.layers.2.mlp.down_proj.weight"]
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    fails(path, "lm_head.weight")


def test_shards_without_an_index_are_refused(copied) -> None:
    path = copied("mistral")
    (path / "model.safetensors.index.json").unlink()
    fails(path, "no model.safetensors.index.json")


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("./no/such/directory", "does not exist"),
        ("no-such.gguf", "does not exist"),
        ("not a hub id!", "neither a file or directory"),
    ],
)
def test_models_that_are_nowhere(model: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        open_checkpoint(model)


def test_hub_when_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"some/model.*cannot be reached"):
        open_checkpoint("some/model")


def test_directories_that_are_no_models(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config\.json"):
        open_checkpoint(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        open_checkpoint(str(tmp_path))
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"not a \.gguf"):
        open_checkpoint(str(tmp_path / "weights.bin"))


def test_a_model_in_the_hubs_cache_needs_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "models--some--model"
    shutil.copytree(FIXTURES / "llama3", repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    (repo / "refs" / "v2").write_text(commit)
    for revision in (None, "v2", commit):
        checkpoint = open_checkpoint("some/model", revision=revision)
        assert checkpoint.tokenizer("the cat").input_ids
        assert "model.norm.weight" in checkpoint.source.names
    with pytest.raises(ValueError, match=r"some/model.*cannot be reached"):
        open_checkpoint("some/model", revision="v3")


def test_pickles_are_refused(copied) -> None:
    path = copied("llama3")
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    fails(path, "no *.safetensors", "pytorch_model.bin", "pickle")


def test_code_in_a_checkpoint_is_refused(copied) -> None:
    path = copied("llama3")
    config = json.loads((path / "config.json").read_text())
    (path / "modeling.py").write_text("raise SystemExit('this ran')")
    auto_map = {"AutoModelForCausalLM": "modeling.Model", "AutoConfig": "modeling.Config"}
    (path / "config.json").write_text(json.dumps(config | {"architectures": ["OwnModel"], "auto_map": auto_map}))
    fails(path, "architecture OwnModel is not supported", "modeling.Model", "never run")
