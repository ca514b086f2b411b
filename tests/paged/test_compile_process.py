"""Programs that other processes compile are those that this one would have, and none is missed when they fail."""

import logging
import shutil
import sys

import jax
import jax.numpy as jnp
import pytest

from models import build_model, make_mesh, open_checkpoint, param_shapes
from paged import SamplingParams, startup
from paged.compile_process import CompileProcess, compile_processes
from paged.compiler import Compiler
from paged.config import EngineConfig
from paged.program_store import ProgramStore
from paged.runner import Runner
from paged.startup import runner_shape
from tests.paged.tiny import SMALL, make_engine, run, tokens, write_config

ASKED = {"a": ([1, 2, 3], SamplingParams(seed=1, max_tokens=9)), "b": ([4] * 20, SamplingParams(logprobs=2, seed=2))}


def start(folder, cache):
    """The tokens of ASKED."""
    engine = make_engine(folder, compilation_cache_dir=str(cache))
    results = run(engine, ASKED)
    engine.close()
    return [tokens(results[name]) for name in ASKED]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A model's folder, the programs that one process has compiled for it, and its tokens."""
    folder, cache = (tmp_path_factory.mktemp(name) for name in ("model", "alone"))
    results = start(write_config(folder), cache)
    return str(folder), stored(cache), results


def stored(cache):
    return {path.name for path in cache.rglob("*") if path.is_file()}


@pytest.fixture
def two_processes(monkeypatch, caplog):
    monkeypatch.setattr(startup, "num_compile_processes", lambda model, store: 2)
    caplog.set_level(logging.INFO, "paged")


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def num_compiled(caplog):
    return [record.args[-1] for record in caplog.records if record.name == "paged.compiler"]


@pytest.fixture
def futures(monkeypatch):
    """Of what is asked of processes, by name."""
    asked, compile_there = {}, CompileProcess.compile

    def compile_and_tell(self, shape, names):
        answers = compile_there(self, shape, names)
        asked.update(answers)
        return answers

    monkeypatch.setattr(CompileProcess, "compile", compile_and_tell)
    return asked


def test_an_engine_whose_programs_others_compile(alone, tmp_path, two_processes, caplog, futures):
    folder, programs, results = alone
    assert start(folder, tmp_path) == results and stored(tmp_path) == programs
    assert len(futures) == len(programs) * 2 // 3 and all(future.result() for future in futures.values())
    futures.clear()
    assert start(folder, tmp_path) == results and not futures
    assert num_compiled(caplog) == [len(programs), 0] and not warnings(caplog)


@pytest.mark.parametrize("python", [shutil.which("false"), "/no/such/python"])
def test_processes_that_die_or_cannot_begin(python, alone, tmp_path, two_processes, caplog, monkeypatch):
    folder, programs, results = alone
    monkeypatch.setattr(sys, "executable", python)
    assert start(folder, tmp_path) == results and stored(tmp_path) == programs
    assert num_compiled(caplog) == [len(programs)]
    assert len(warnings(caplog)) == 2 and all("they are compiled here" in text for text in warnings(caplog))


@pytest.fixture
def runner(tmp_path):
    options = SMALL | {"model": write_config(tmp_path), "load_format": "dummy", "skip_tokenizer_init": True}
    config = EngineConfig.from_kwargs(**options)
    checkpoint = open_checkpoint(config.model.model, load_format="dummy", skip_tokenizer=True)
    dtype = jnp.dtype("bfloat16")  # float32 says itself how precise its products are
    model = build_model(checkpoint.config, dtype=dtype, mesh=make_mesh(1))
    return Runner(model, param_shapes(model), runner_shape(config, checkpoint, dtype, "cpu"))


@pytest.fixture
def store(tmp_path):
    return ProgramStore(tmp_path / "store", (jax.devices()[0],))


def test_what_a_process_cannot_make(runner, store):
    """It answers, and goes on."""
    name = next(iter(runner.score_lowering()))
    with compile_processes(1, runner.model, store) as [process]:
        futures = process.compile(runner.shape, ["no such program", name])
        assert futures["no such program"].result(60) is None
        assert futures[name].result(60) is not None
        assert process.compile(runner.shape, ["nor this"])["nor this"].result(60) is None


def test_what_another_engine_has_stored_meanwhile(runner, store):
    names = ["admit_full", *runner.score_lowering()]
    with compile_processes(2, runner.model, store) as processes:
        for process in processes:
            futures = process.compile(runner.shape, names)
            assert all(future.result(60) for future in futures.values())


def test_a_failure_is_found_by_who_asked(runner, store):
    """Another process that cannot trace a program leaves it to this one, whose error is the one that is seen."""

    def fails():
        raise ValueError("as here")

    with compile_processes(1, runner.model, store) as processes, Compiler(store, processes) as compiler:
        compiler.prepare({"no such program": fails}, runner.shape)
        with pytest.raises(ValueError, match="as here"):
            compiler.get(["no such program"])


def test_options_of_jax_are_the_same_there(runner, store):
    [(name, lower)] = runner.score_lowering().items()
    with jax.default_matmul_precision("default"):
        usual = lower().compile().as_text()
    before = jax.config.jax_default_matmul_precision
    jax.config.update("jax_default_matmul_precision", "highest")
    try:
        with compile_processes(1, runner.model, store) as [process]:
            elsewhere = process.compile(runner.shape, [name])[name].result(60).as_text()
        here = lower().compile().as_text()
    finally:
        jax.config.update("jax_default_matmul_precision", before)
    assert elsewhere.count("highest") == here.count("highest") > usual.count("highest")


def test_none_is_left_running(runner, store):
    CompileProcess(runner.model, store).close()  # which never began
    with compile_processes(1, runner.model, store) as [process]:
        process.compile(runner.shape, runner.lowerings())
        child = process._process
        assert child.poll() is None
    assert child.poll() is not None


def test_none_outlives_an_engine_that_was_killed(runner, store):
    process = CompileProcess(runner.model, store)
    [future] = process.compile(runner.shape, ["admit_full"]).values()
    assert future.result(60)
    process.compile(runner.shape, runner.lowerings())
    process._process.stdin.close()  # as the system does then
    assert process._process.wait(5) == 0
    process.close()
