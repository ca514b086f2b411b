"""Converted checkpoints: the same model again, sharded if asked for, and every way in which a directory is not one."""

import json
import os
import shutil
import subprocess
import sys
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


def test_orbax_restores_it(converted: Path) -> None:
    import orbax.checkpoint as ocp

    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        restored = checkpointer.restore((converted / "params").absolute())
    jax.tree.map(np.testing.assert_array_equal, restored["params"], load(FIXTURES / "llama3")[1])


def test_a_start_does_without_orbax(converted: Path) -> None:
    code = (
        "import sys, jax.numpy as jnp; from models import build_model, open_checkpoint; "
        "checkpoint = open_checkpoint(sys.argv[1]); "
        "checkpoint.load_params(build_model(checkpoint.config, dtype=jnp.float32), jnp.float32, progress=False); "
        "print([name for name in sys.modules if name.startswith(('orbax', 'tensorstore'))])"
    )
    run = subprocess.run([sys.executable, "-c", code, str(converted)], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


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
    size = file.stat().st_size
    os.truncate(file, size // 2)
    fails(copied, f"{file.relative_to(copied)} has {size // 2:,} bytes instead of {size:,}")


def test_a_missing_file_is_named(copied: Path) -> None:
    file = largest_file(copied)
    file.unlink()
    fails(copied, f"{file.relative_to(copied)} is missing")


def test_a_file_too_many_is_named(copied: Path) -> None:
    (largest_file(copied).parent / "1.0").write_bytes(b"more")
    fails(copied, "/1.0 does not belong to it")


def test_a_file_that_shrinks_after_it_was_opened_is_named(copied: Path) -> None:
    checkpoint = open_checkpoint(str(copied))
    os.truncate(largest_file(copied), 100)
    with pytest.raises(ValueError, match=r"cannot read parameter .*bytes too early"):
        checkpoint.load_params(build_model(checkpoint.config, dtype=jnp.float32), jnp.float32, progress=False)


@pytest.mark.parametrize(
    "change",
    [
        {"compressor": {"id": "zlib", "level": 1}},
        {"chunks": [1, 48]},
        {"dtype": ">f4"},
        {"dtype": "<f8"},
        {"order": "F"},
        {"filters": [{"id": "delta"}]},
        {"zarr_format": 3},
        {"dimension_separator": "/"},
    ],
    ids=lambda change: "-".join(map(str, change)),
)
def test_arrays_that_are_not_plain_are_refused(copied: Path, change: dict) -> None:
    meta = copied / "params" / "params.embed.embedding" / ".zarray"
    rewrite(copied, meta, json.dumps(json.loads(meta.read_text()) | change))
    fails(copied, r"params\.embed\.embedding is not a single chunk of plain")


def test_a_shape_that_is_not_the_files_is_refused(copied: Path) -> None:
    meta = copied / "params" / "params.embed.embedding" / ".zarray"
    rewrite(copied, meta, json.dumps(json.loads(meta.read_text()) | {"shape": [4, 4], "chunks": [4, 4]}))
    fails(copied, "should have 64 bytes")
    rewrite(copied, meta, "{}")
    fails(copied, "zarray is damaged")


def rewrite(directory: Path, file: Path, text: str) -> None:
    """A file of weights and, as it should be found out by what it says, its size in the manifest."""
    file.write_text(text)
    files = json.loads((directory / MANIFEST).read_text())["files"]
    rewrite_manifest(directory, files=files | {str(file.relative_to(directory)): len(text)})


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
    with pytest.raises(
        ValueError, match=r"the checkpoint lacks 3 tensors that the model needs, such as layers_0\.attention"
    ):
        checkpoint.load_params(build_model(other.config, dtype=jnp.float32), jnp.float32)
