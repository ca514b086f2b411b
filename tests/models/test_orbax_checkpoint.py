"""Converted checkpoints: the same model again, sharded if asked for, and every way in which a directory is not one."""

import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import build_model, open_checkpoint
from models.orbax_checkpoint import MANIFEST, VERSION
from paged import LLM, SamplingParams
from scripts.convert import main
from tests.models.test_checkpoint import FIXTURES, MESSAGES, load

SMALL = {"max_num_seqs": 2, "max_num_batched_tokens": 32, "max_model_len": 64, "num_gpu_blocks_override": 20}


def convert(source: str, target: Path, *options: str) -> Path:
    assert main([str(FIXTURES / source), str(target), "--dtype", "float32", *options]) == 0
    return target


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert("llama3", tmp_path_factory.mktemp("orbax") / "llama3")


@pytest.fixture
def copied(converted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(converted, tmp_path / "copy"))


def largest_file(directory: Path) -> Path:
    return max((p for p in (directory / "params").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def rewrite_manifest(directory: Path, **changes) -> None:
    manifest = json.loads((directory / MANIFEST).read_text())
    (directory / MANIFEST).write_text(json.dumps(manifest | changes))


def test_the_same_model_comes_back(converted: Path) -> None:
    before, after = open_checkpoint(str(FIXTURES / "llama3")), open_checkpoint(str(converted))
    assert after.config == before.config
    assert after.generation_config == before.generation_config
    chats = [c.tokenizer.apply_chat_template(MESSAGES, tokenize=False) for c in (before, after)]
    assert chats[0] == chats[1]
    assert after.tokenizer("the cat").input_ids == before.tokenizer("the cat").input_ids
    jax.tree.map(np.testing.assert_array_equal, load(converted)[1], load(FIXTURES / "llama3")[1])


def test_experts_and_windows_come_back(tmp_path: Path) -> None:
    target = convert("mixtral", tmp_path / "mixtral", "--skip-tokenizer-init")
    assert (
        open_checkpoint(str(target), skip_tokenizer=True).config
        == open_checkpoint(str(FIXTURES / "mixtral"), skip_tokenizer=True).config
    )
    jax.tree.map(np.testing.assert_array_equal, load(target)[1], load(FIXTURES / "mixtral")[1])


def test_it_is_served(converted: Path) -> None:
    greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    outputs = [
        LLM(str(model), dtype="float32", load_format=how, **SMALL).chat(MESSAGES, greedy, use_tqdm=False)[0].outputs[0]
        for model, how in ((FIXTURES / "llama3", "auto"), (converted, "orbax"))
    ]
    assert outputs[0].token_ids == outputs[1].token_ids


def test_another_dtype_is_cast_on_the_way(converted: Path) -> None:
    expected = load(FIXTURES / "llama3", jnp.bfloat16)[1]
    jax.tree.map(np.testing.assert_array_equal, load(converted, jnp.bfloat16)[1], expected)


def test_parameters_go_where_their_shardings_say(converted: Path) -> None:
    checkpoint = open_checkpoint(str(converted))
    model = build_model(checkpoint.config, dtype=jnp.float32)
    mesh = jax.make_mesh((1,), ("tensor",))
    split = jax.NamedSharding(mesh, jax.P("tensor"))
    plain = checkpoint.load_params(model, jnp.float32)
    params = checkpoint.source.load_params(model, jnp.float32, jax.tree.map(lambda _: split, plain))
    assert all(leaf.sharding == split for leaf in jax.tree.leaves(params))
    jax.tree.map(np.testing.assert_array_equal, params, plain)


def test_an_existing_target_is_refused(converted: Path, capsys) -> None:
    assert main([str(FIXTURES / "llama3"), str(converted)]) == 1
    assert "exists" in capsys.readouterr().err


def test_what_breaks_off_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr("models.orbax_checkpoint._sizes", lambda directory: (_ for _ in ()).throw(OSError("disk full")))
    assert main([str(FIXTURES / "llama3"), str(tmp_path / "target")]) == 1
    assert "disk full" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def fails(directory: Path, words: str, **options) -> None:
    with pytest.raises(ValueError, match=words):
        open_checkpoint(str(directory), **options)


def test_a_truncated_file_is_named(copied: Path) -> None:
    file = largest_file(copied)
    os.truncate(file, file.stat().st_size // 2)
    fails(copied, f"not whole: .*{file.name} has")


def test_a_missing_file_is_named(copied: Path) -> None:
    file = largest_file(copied)
    file.unlink()
    fails(copied, f"{file.name} is missing")


def test_damaged_weights_are_said_to_be_so(copied: Path) -> None:
    for file in (copied / "params").rglob("manifest.ocdbt"):
        file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(ValueError, match="cannot be read: convert again"):
        load(copied)


def test_other_versions_are_refused(copied: Path) -> None:
    rewrite_manifest(copied, version=VERSION + 1)
    fails(copied, f"format version {VERSION + 1}, and this engine reads {VERSION}")
    rewrite_manifest(copied, version=VERSION, config={"heads": 3})
    fails(copied, "configuration of another version")


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_damaged_manifest_is_refused(copied: Path, text: str) -> None:
    (copied / MANIFEST).write_text(text)
    fails(copied, "is damaged")


def test_a_checkpoint_of_another_program_is_refused(copied: Path) -> None:
    (copied / MANIFEST).unlink()
    fails(copied, "was not written by scripts.convert")
    fails(FIXTURES / "llama3", "was not written by scripts.convert", load_format="orbax")


def test_weights_of_another_model_are_refused(converted: Path) -> None:
    checkpoint = open_checkpoint(str(converted))
    other = open_checkpoint(str(FIXTURES / "qwen2"), skip_tokenizer=True)
    with pytest.raises(ValueError, match="cannot be read"):
        checkpoint.load_params(build_model(other.config, dtype=jnp.float32), jnp.float32)
