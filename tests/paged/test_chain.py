"""Several decode steps in a call: the same tokens, whoever ends or is preempted on the way."""

import random

import pytest

from paged import SamplingParams, startup
from paged.sampler import VARIANTS
from tests.paged.tiny import make_engine, run, tokens, write_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def plain(folder):
    engine = make_engine(folder)
    yield engine
    engine.close()


def chained(folder, **options):
    """An engine as on a GPU: four variants, up to three steps in a call, one row of a decode sampled from as two; and
    how long its calls were."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(
            startup.DEFAULTS, "cpu", startup.DEFAULTS["cpu"]._replace(variants=VARIANTS, chain=3, sampling_sizes=(2,))
        )
        engine = make_engine(folder, **options)
    execute, lengths = engine.runner.execute, []

    def counted(steps):
        handles = execute(steps)
        lengths.extend(len(handle.plans) for handle in handles)
        return handles

    engine.runner.execute = counted
    return engine, lengths


def requests(seed: int, count: int):
    rng = random.Random(seed)
    return {
        f"{seed}-{i}": (
            [rng.randrange(199) for _ in range(rng.randint(1, 40))],
            SamplingParams(
                temperature=rng.choice([0, 0.9]), top_k=rng.choice([0, 0, 0, 5]), seed=rng.randrange(1000),
                max_tokens=rng.randint(1, 30),
                logprobs=rng.choice([None] * 9 + [1]),
            ),
        )
        for i in range(count)
    }  # fmt: skip


@pytest.mark.parametrize(
    "options", [{}, {"num_gpu_blocks_override": 13, "max_model_len": 96}], ids=["room", "preempts"]
)
def test_same_tokens(folder, plain, options):
    engine, lengths = chained(folder, **options)
    engine.compiles.count = 0
    for seed in range(4):
        asked = requests(seed, 7)
        expected, results = run(plain, asked), run(engine, asked)
        for name in asked:
            assert tokens(results[name]) == tokens(expected[name])
            assert results[name][-1].finish_reason == expected[name][-1].finish_reason
    assert 3 in lengths and 1 in lengths and engine.compiles.count == 0
    engine.scheduler.pool.check()
    assert engine.scheduler.usage == 0
    engine.close()


def test_who_comes_right_behind_a_prompt_waits_for_one_step(folder):
    engine, lengths = chained(folder)
    run(engine, {"a": ([5] * 4, SamplingParams(max_tokens=9, ignore_eos=True))})
    assert lengths == [1, 1, 3, 3, 1]  # the prompt, whose token is the first of nine
    engine.close()


def test_a_failed_call_fails_all_its_requests(folder):
    engine, _ = chained(folder)
    execute = engine.runner.execute
    asked = {name: ([5] * 4, SamplingParams(max_tokens=40, ignore_eos=True)) for name in "ab"}
    for name, (prompt, params) in asked.items():
        engine.add_request(name, prompt, params)
    for _ in range(4):
        engine.step()

    def fail(steps):
        raise RuntimeError("the device is on fire")

    engine.runner.execute = fail
    deltas = engine.step()
    engine.runner.execute = execute
    assert {d.request_id for d in deltas if d.finish_reason == "error"} == {"a", "b"}
    assert not engine.has_unfinished_requests()
    assert len(tokens(run(engine, asked)["a"])) == 40
    engine.close()


def test_warming_up_runs_every_program_and_changes_no_token(folder):
    engine, _ = chained(folder)
    runner, asked = engine.runner, requests(1, 7)
    expected, ran = run(engine, asked), set()
    programs = {"admit": "_admit", "full row": "_admit_full", "score": "_score", "clear": "_clear"}

    def noted(key, program):
        def call(*args):
            ran.add(key)
            return program(*args)

        return call

    for key, name in programs.items():
        setattr(runner, name, noted(key, getattr(runner, name)))
    for group in (runner._forwards, runner._samplings, runner._chains):
        group |= {key: noted((id(group), key), program) for key, program in group.items()}
    engine.compiles.count = 0
    runner.warm_up()
    count = len(runner._forwards) + len(runner._samplings) + len(runner._chains)
    assert len(ran) == len(programs) + count and engine.compiles.count == 0
    again = run(engine, {f"again {name}": request for name, request in asked.items()})
    for name, deltas in expected.items():
        assert tokens(again[f"again {name}"]) == tokens(deltas)
    engine.close()
