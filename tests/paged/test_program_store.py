"""A second start finds every program, and whatever does not fit is compiled again."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from paged import SamplingParams, memory
from paged.program_store import ProgramStore
from tests.paged.tiny import make_engine, run, tokens, write_config

ASKED = {"a": ([1, 2, 3], SamplingParams(seed=1, max_tokens=9)), "b": ([4] * 20, SamplingParams(logprobs=2, seed=2))}


def start(folder: str, cache: Path, caplog: pytest.LogCaptureFixture, **options) -> tuple[list[list[int]], int]:
    """The tokens of ASKED, and how many programs were compiled."""
    caplog.clear()
    with caplog.at_level(logging.INFO, "paged"):
        engine = make_engine(folder, compilation_cache_dir=str(cache), **options)
    results = run(engine, ASKED)
    engine.close()
    compiled = sum(record.args[-1] for record in caplog.records if record.name == "paged.compiler")
    return [tokens(results[name]) for name in ASKED], compiled


def test_a_warm_start(tmp_path, caplog):
    folder = write_config(tmp_path)
    cold, compiled = start(folder, tmp_path / "cache", caplog)
    assert compiled > 0
    assert start(folder, tmp_path / "cache", caplog) == (cold, 0)
    for_another_pool = start(folder, tmp_path / "cache", caplog, num_gpu_blocks_override=81)[1]
    assert for_another_pool == 5 < compiled  # layers of three steps, what writes block tables, and clears
    files = list((tmp_path / "cache").rglob("decode-*"))
    for path in files:
        path.write_bytes(path.read_bytes()[:100])
    assert start(folder, tmp_path / "cache", caplog) == (cold, len(files) // 2)
    assert "cannot use the compiled program" in caplog.text


def test_a_pool_sized_by_its_programs(tmp_path, caplog, monkeypatch):
    """As on an accelerator: two steps over a small pool tell what is left for the cache. A warm start finds them."""
    limit = 640_000  # less than what all sequences at full length could use
    monkeypatch.setattr(memory, "usable_memory", lambda device, utilization: limit)
    folder, options = write_config(tmp_path), {"num_gpu_blocks_override": None, "max_model_len": 256}
    cold, compiled = start(folder, tmp_path / "cache", caplog, **options)
    [ledger] = [record.args[0] for record in caplog.records if record.msg == "memory: %s"]
    assert start(folder, tmp_path / "cache", caplog, **options) == (cold, 0) and compiled > 0
    used = ledger.weights + ledger.activations + ledger.slots + ledger.cache
    assert 0.99 * limit < used <= limit


def test_nothing_is_kept_without_a_folder(tmp_path):
    store = ProgramStore.of("", jax.devices(), "anything")
    store.save("name", object())
    assert store.load("name") is None and not list(tmp_path.iterdir())


def test_the_folder_depends_on_what_programs_are_made_from(tmp_path, monkeypatch):
    def folder(part):
        return ProgramStore.of(str(tmp_path), jax.devices(), part).directory

    one, same, other = map(folder, ("a", "a", "b"))
    assert one == same != other
    with monkeypatch.context() as patch:
        patch.setenv("XLA_FLAGS", "--xla_gpu_autotune_level=0")
        assert folder("a") != one
    before = jax.config.jax_default_matmul_precision
    jax.config.update("jax_default_matmul_precision", "highest")
    try:
        assert folder("a") != one
    finally:
        jax.config.update("jax_default_matmul_precision", before)
    assert folder("a") == one


def test_a_program_runs_on_the_devices_that_it_was_compiled_for(tmp_path):
    """Also where the machine has more of them."""
    script = """if True:
        import sys
        from paged import SamplingParams, memory
        from tests.paged.tiny import make_engine, run, tokens
        folder, cache = sys.argv[1:]
        asked = {"a": ([1, 2, 3], SamplingParams(temperature=0, max_tokens=9))}
        first, second = (tokens(run(make_engine(folder, compilation_cache_dir=cache), asked)["a"]) for _ in range(2))
        assert first == second and len(first) == 9
    """
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=3", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", script, write_config(tmp_path), str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=250)
    assert done.returncode == 0 and "cannot use" not in done.stderr, done.stderr[-2000:]
