"""DeepSeek's and gpt-oss's tensors as checkpoints have them beyond what the tiny ones show."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from models import build_model, open_checkpoint
from models.expert_tensors import dequantize_mxfp4

FIXTURES = Path(__file__).parent.parent / "fixtures"


def changed(name: str, folder: Path, change) -> Path:
    """A copy of a fixture whose dict of tensors went through `change`."""
    shutil.copytree(FIXTURES / name, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def load(folder: Path, dtype=jnp.float32):
    checkpoint = open_checkpoint(str(folder), skip_tokenizer=True)
    return checkpoint.load_params(build_model(checkpoint.config, dtype=dtype), dtype, progress=False)["params"]


def test_layers_that_predict_further_tokens_are_left_out(tmp_path: Path) -> None:
    def add_predictor(tensors: dict) -> None:
        for part in ("eh_proj", "enorm", "mlp.gate", "self_attn.kv_b_proj", "shared_head.head"):
            tensors[f"model.layers.3.{part}.weight"] = np.zeros((4, 4), np.float32)

    folder = changed("deepseek-v3", tmp_path / "model", add_predictor)
    jax.tree.map(np.testing.assert_array_equal, load(folder), load(FIXTURES / "deepseek-v3"))

    def add_layer(tensors: dict) -> None:
        tensors["model.layers.3.mlp.gate.weight"] = np.zeros((4, 4), np.float32)

    with pytest.raises(ValueError, match=r"does not mention, such as model\.layers\.3"):
        load(changed("deepseek-v3", tmp_path / "other", add_layer))


def test_what_chooses_experts_stays_in_float32() -> None:
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    bias = load(FIXTURES / "deepseek-v3", jnp.bfloat16)["layers_1"]["mlp"]["choice_bias"]
    assert bias.dtype == jnp.float32
    np.testing.assert_array_equal(bias, load_file(FIXTURES / "deepseek-v3" / "model.safetensors")[name])


def test_a_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.kv_b_proj.weight"
    folder = changed("deepseek-v2", tmp_path / "model", lambda tensors: tensors.update({name: tensors[name][:-1]}))
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.kv_b_proj\.weight has 87 rows, .* needs 88"):
        load(folder)


def test_blocks_without_their_scales_are_refused(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.experts.down_proj"
    folder = changed("gpt-oss-mxfp4", tmp_path / "model", lambda tensors: tensors.pop(f"{name}_scales"))
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts\.down_proj_blocks, but not the scales"):
        load(folder)


def test_mxfp4_of_known_numbers() -> None:
    """The format's sixteen numbers, times powers of two."""
    numbers = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    numbers = np.concatenate([numbers, -numbers])
    codes = np.arange(32, dtype=np.uint8) % 16
    blocks = (codes[0::2] | codes[1::2] << 4)[None, None].repeat(2, axis=1)
    read = dequantize_mxfp4(blocks, np.array([[127, 124]], np.uint8))
    np.testing.assert_array_equal(read, np.concatenate([np.tile(numbers, 2), np.tile(numbers, 2) / 8])[None])
