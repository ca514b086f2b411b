"""The engine against a forward pass that knows nothing of batches, blocks or steps."""

import random

import jax.numpy as jnp
import numpy as np
import pytest

from paged import InvalidRequestError, QueueFullError, SamplingParams, startup
from paged.packing import StepShape
from tests.paged.tiny import logits_of, make_engine, run, tokens, write_config

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def engine(folder):
    engine = make_engine(folder)
    yield engine
    engine.close()


def prompts(seed: int, count: int, longest: int = 90) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(199) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def assert_greedy(engine, prompt: list[int], output: list[int], atol: float = 1e-4) -> None:
    """Every token is the best, or ties with it to within rounding."""
    logits = logits_of(engine, prompt + output)[len(prompt) - 1 : -1]
    chosen = logits[np.arange(len(output)), output]
    np.testing.assert_allclose(chosen, logits.max(-1), atol=atol)


def idle(engine) -> None:
    scheduler = engine.scheduler
    assert not scheduler.has_unfinished and scheduler.usage == 0
    scheduler.pool.check()


def test_greedy_tokens_are_the_argmax_of_an_uncached_forward_pass(engine):
    asked = {str(i): (p, GREEDY) for i, p in enumerate(prompts(0, 11))}
    results = run(engine, asked)
    for request_id, (prompt, _) in asked.items():
        output = tokens(results[request_id])
        assert len(output) == 24
        assert results[request_id][-1].finish_reason == "length"
        assert_greedy(engine, prompt, output)
    idle(engine)


def test_nothing_compiles_after_start(engine):
    everything = SamplingParams(
        n=2, temperature=0.7, top_p=0.9, top_k=20, min_p=0.01, presence_penalty=0.5, frequency_penalty=0.1,
        repetition_penalty=1.1, seed=3, logit_bias={5: 2.0}, min_tokens=2, logprobs=3, prompt_logprobs=2, max_tokens=9,
    )  # fmt: skip
    engine.compiles.count = 0
    asked = {f"g{i}": (p, GREEDY) for i, p in enumerate(prompts(1, 5))}
    asked |= {f"r{i}": (p, SamplingParams(max_tokens=5)) for i, p in enumerate(prompts(2, 3))}
    run(engine, asked | {"all": (prompts(3, 1)[0], everything)})
    assert engine.compiles.count == 0


def test_the_counter_counts(engine):
    import jax

    before = engine.compiles.count
    jax.jit(lambda x: x * 3 + 1)(np.float32(before))
    assert engine.compiles.count > before


@pytest.mark.parametrize("pool", [13, 17])
def test_preemption_changes_no_token(folder, engine, pool):
    """A pool for a few sequences at most: they are preempted and computed again."""
    small = make_engine(folder, num_gpu_blocks_override=pool, max_model_len=96)
    asked = {str(i): (p, GREEDY) for i, p in enumerate(prompts(4, 9, longest=40))}
    expected, results = run(engine, asked), run(small, asked)
    assert {i: tokens(d) for i, d in results.items()} == {i: tokens(d) for i, d in expected.items()}
    if pool == 13:
        assert sum(d[-1].metrics.num_preemptions for d in results.values()) > 0
    idle(small)
    small.close()


def test_prefix_cache_changes_no_token(folder, engine):
    shared = prompts(5, 1, longest=70)[0] + [3] * 20
    asked = {str(i): (shared + p, GREEDY) for i, p in enumerate(prompts(6, 6, longest=9))}
    uncached = make_engine(folder, enable_prefix_caching=False)
    expected, first, second = run(uncached, asked), run(engine, asked), run(engine, asked)
    assert all(d[0].num_cached_tokens == 0 for d in expected.values())
    assert all(d[0].num_cached_tokens >= len(shared) // 8 * 8 for d in second.values())
    for results in (first, second):
        assert {i: tokens(d) for i, d in results.items()} == {i: tokens(d) for i, d in expected.items()}
    uncached.close()


@pytest.mark.parametrize(("dtype", "step"), [("int8", 0.02), pytest.param("fp8", 0.12, marks=pytest.mark.slow)])
def test_eight_bit_caches(folder, dtype, step):
    """In chunks, behind cached prefixes and after preemption every token is the best by a forward pass that rounds
    keys and values likewise, to within what a last bit that rounds otherwise can change."""
    options = {"num_gpu_blocks_override": None, "kv_cache_memory_bytes": 12_000, "max_model_len": 64}
    engine = make_engine(folder, kv_cache_dtype=dtype, max_num_batched_tokens=16, **options)
    per_token = 2 * 2 * 2 * (8 + 4)  # layers, keys and values, heads; elements and a scale
    assert 10_000 < engine.ledger.cache == engine.ledger.num_blocks * 8 * per_token <= 12_000
    shared = prompts(5, 1, longest=30)[0] + [3] * 10
    asked = {str(i): (shared * (i % 2) + p, GREEDY) for i, p in enumerate(prompts(4, 6, longest=12))}
    for _ in range(2):
        results = run(engine, asked)
        for request_id, (prompt, _) in asked.items():
            assert_greedy(engine, prompt, tokens(results[request_id]), atol=step)
    assert sum(d[0].num_cached_tokens for d in results.values()) > 0
    assert sum(d[-1].metrics.num_preemptions for d in results.values()) > 0
    idle(engine)
    engine.close()


def test_a_seed_gives_the_same_tokens_in_any_company(engine):
    params = [
        SamplingParams(seed=11, max_tokens=20, ignore_eos=True),
        SamplingParams(seed=12, max_tokens=20, ignore_eos=True, top_p=0.8, temperature=1.3),
        SamplingParams(seed=2**63 - 1, max_tokens=20, ignore_eos=True, top_k=9, repetition_penalty=1.2),
    ]
    prompt = prompts(7, 1)[0]
    alone = [tokens(run(engine, {"x": (prompt, p)})["x"]) for p in params]
    company = {f"c{i}": (p, SamplingParams(max_tokens=30, logprobs=i % 2)) for i, p in enumerate(prompts(8, 8))}
    together = run(engine, {**company, **{str(i): (prompt, p) for i, p in enumerate(params)}})
    assert [tokens(together[str(i)]) for i in range(3)] == alone
    assert len({tuple(a) for a in alone}) == 3


def test_without_a_seed_two_requests_differ(engine):
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    results = run(engine, {"a": ([1, 2, 3], params), "b": ([1, 2, 3], params)})
    assert tokens(results["a"]) != tokens(results["b"])


def test_n_completions_share_the_prompt_and_differ(engine):
    prompt = [9] * 50
    params = SamplingParams(n=3, seed=5, max_tokens=12, ignore_eos=True)
    deltas = run(engine, {"n": (prompt, params)})["n"]
    outputs = [tokens(deltas, i) for i in range(3)]
    assert [len(o) for o in outputs] == [12] * 3 and len({tuple(o) for o in outputs}) == 3
    assert {d.index: d.num_cached_tokens for d in deltas if d.index > 0} == {1: 48, 2: 48}
    assert outputs[0] == tokens(
        run(engine, {"1": (prompt, SamplingParams(seed=5, max_tokens=12, ignore_eos=True))})["1"]
    )
    again = run(engine, {"again": (prompt, params)})["again"]
    assert [tokens(again, i) for i in range(3)] == outputs
    idle(engine)


def test_logprobs_are_those_of_the_forward_pass(engine):
    prompt = prompts(9, 1, longest=90)[0] + [1] * 40  # more than one chunk
    params = SamplingParams(temperature=0.8, seed=1, max_tokens=10, ignore_eos=True, logprobs=4, prompt_logprobs=3)
    deltas = run(engine, {"x": (prompt, params), "other": (prompts(10, 1)[0], GREEDY)})["x"]
    output = tokens(deltas)
    logits = logits_of(engine, prompt + output).astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    chosen = [lp for d in deltas for lp in d.logprobs]
    assert deltas[0].prompt_logprobs[0] is None and len(deltas[0].prompt_logprobs) == len(prompt)
    rows = [(i, t, lp, 3) for i, (t, lp) in enumerate(zip(prompt[1:], deltas[0].prompt_logprobs[1:], strict=True))]
    rows += [(len(prompt) - 1 + i, t, lp, 4) for i, (t, lp) in enumerate(zip(output, chosen, strict=True))]
    for row, token, reported, wanted in rows:
        assert next(iter(reported)) == token
        assert reported[token].rank == 1 + (logits[row] > logits[row, token]).sum()
        best = np.argsort(-expected[row], kind="stable")[:wanted]
        assert set(reported) == {token, *best.tolist()}
        for t, logprob in reported.items():
            assert logprob.logprob == pytest.approx(expected[row, t], abs=1e-4)


def test_prompt_logprobs_are_whole_even_when_the_prompt_is_cached(engine):
    prompt = [5, 6] * 30
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
    first, second = (run(engine, {"x": (prompt, params)})["x"][0].prompt_logprobs for _ in range(2))
    assert [list(x) for x in first[1:]] == [list(x) for x in second[1:]] and len(second) == 60


def test_end_of_sequence_stop_ids_and_lengths(engine):
    free = tokens(run(engine, {"x": ([4] * 9, SamplingParams(temperature=0, max_tokens=40, ignore_eos=True))})["x"])
    stop = free[5]
    expected = free[: free.index(stop) + 1]
    stopped = run(engine, {"x": ([4] * 9, SamplingParams(temperature=0, max_tokens=40, stop_token_ids=[stop]))})["x"]
    assert tokens(stopped) == expected
    assert (stopped[-1].finish_reason, stopped[-1].stop_reason) == ("stop", stop)
    eos = SamplingParams(temperature=0, max_tokens=40, logit_bias={7: 100.0})
    ended = run(engine, {"x": ([4] * 9, eos)})["x"]
    assert tokens(ended) == [7] and (ended[-1].finish_reason, ended[-1].stop_reason) == ("stop", None)
    late = run(
        engine, {"x": ([4] * 9, SamplingParams(temperature=0, max_tokens=40, min_tokens=6, logit_bias={7: 100.0}))}
    )
    assert len(tokens(late["x"])) == 7 and 7 not in tokens(late["x"])[:-1]
    full = run(engine, {"x": ([4] * 100, SamplingParams(temperature=0, max_tokens=None, ignore_eos=True))})["x"]
    assert len(tokens(full)) == 28 and full[-1].finish_reason == "length"
    idle(engine)


def test_abort_at_any_moment_frees_everything(engine):
    rng = random.Random(3)
    for i, prompt in enumerate(prompts(11, 12)):
        engine.add_request(f"a{i}", prompt, SamplingParams(n=rng.randint(1, 3), max_tokens=30, ignore_eos=True))
    alive = {f"a{i}" for i in range(12)}
    ended: set[str] = set()
    while engine.has_unfinished_requests():
        if alive and rng.random() < 0.4:
            victim = rng.choice(sorted(alive))
            engine.abort(victim)
            alive.discard(victim)
        for delta in engine.step():
            assert delta.request_id in alive | ended
            if delta.finish_reason:
                ended.add(delta.request_id)
    idle(engine)


def test_a_failing_step_fails_its_requests_and_no_others(engine, monkeypatch):
    asked = {str(i): (p, GREEDY) for i, p in enumerate(prompts(12, 6, longest=20))}
    expected = run(engine, asked)
    key = StepShape(4, 4, decode_only=True)
    program, calls = engine.runner._forwards[key], []

    def fail_once(*args):
        out = program(*args)  # donates the caches: they are gone
        calls.append(1)
        if len(calls) == 5:
            raise RuntimeError("RESOURCE_EXHAUSTED: boom")
        return out

    monkeypatch.setitem(engine.runner._forwards, key, fail_once)
    results = run(engine, asked)
    failed = {i for i, deltas in results.items() if deltas[-1].finish_reason == "error"}
    assert 0 < len(failed) < 6
    for i, deltas in results.items():
        if i in failed:
            assert "boom" in deltas[-1].error
        else:
            assert tokens(deltas) == tokens(expected[i])
    idle(engine)
    assert {i: tokens(d) for i, d in run(engine, asked).items()} == {i: tokens(d) for i, d in expected.items()}


@pytest.mark.parametrize(
    ("prompt", "params", "param"),
    [
        ([], GREEDY, "prompt"),
        ([1] * 128, GREEDY, "prompt"),
        ([199], GREEDY, "prompt"),
        ([-1], GREEDY, "prompt"),
        ([1], SamplingParams(stop_token_ids=[500]), "stop_token_ids"),
        ([1], SamplingParams(logprobs=21), "logprobs"),
        ([1], SamplingParams(logit_bias={199: 1}), "logit_bias"),
        ([1], SamplingParams(stop="x"), "stop"),
    ],
)
def test_a_bad_request_is_refused_alone(engine, prompt, params, param):
    engine.add_request("good", [1, 2], GREEDY)
    with pytest.raises(InvalidRequestError) as error:
        engine.add_request("bad", prompt, params)
    assert error.value.param == param
    with pytest.raises(InvalidRequestError, match="in use"):
        engine.add_request("good", [1], GREEDY)
    assert len(tokens(finish(engine)["good"])) == 24
    idle(engine)


def finish(engine) -> dict:
    results: dict = {}
    while engine.has_unfinished_requests():
        for delta in engine.step():
            results.setdefault(delta.request_id, []).append(delta)
    return results


def test_a_full_queue_refuses(folder):
    engine = make_engine(folder, max_num_queued_requests=3)
    for i in range(3):
        engine.add_request(str(i), [1], GREEDY)
    with pytest.raises(QueueFullError) as error:
        engine.add_request("3", [1], GREEDY)
    assert error.value.retry_after > 0
    assert len(finish(engine)) == 3
    engine.close()


@pytest.fixture
def auto_is_hopper(monkeypatch):
    """As if this machine had kernels, none of which compiles."""
    for kernel in ("decode", "prefill", "linear"):
        monkeypatch.setattr(f"kernels_pallas.gpu.{kernel}.num_sms", lambda: 132)
    resolve = startup.attention_backend
    monkeypatch.setattr(startup, "attention_backend", lambda name: "mosaic_gpu" if name == "auto" else resolve(name))


def test_kernels_that_do_not_compile_are_replaced(tmp_path, auto_is_hopper, caplog):
    prompt = prompts(9, 1)[0]
    options = {"dtype": "bfloat16", "max_num_seqs": 1, "max_num_batched_tokens": 128}
    wide = write_config(tmp_path, head_dim=64)
    with caplog.at_level("WARNING"):
        replaced = make_engine(wide, **options)
    assert "plain XLA" in caplog.text and replaced.runner.model.compute.attention_backend == "reference"
    assert len(tokens(run(replaced, {"a": (prompt, GREEDY)})["a"])) == 24
    replaced.close()
    with pytest.raises(ValueError, match="on CPU backend"):  # whoever names a kernel gets the compiler's own error
        make_engine(wide, attention_backend="mosaic_gpu", **options)


@pytest.mark.parametrize("enable_prefix_caching", [False, True])
def test_a_request_of_nans_fails_alone(folder, enable_prefix_caching):
    """Who is beside it, shares the healthy blocks before its NaN, or is given its blocks later, is as without it."""
    options = {"num_gpu_blocks_override": 33, "enable_prefix_caching": enable_prefix_caching}
    engine, params = make_engine(folder, **options), SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    shared = list(range(20, 45))
    good = {"shares": (shared, params), "short": ([5, 6, 7], params)}
    expected = {i: tokens(deltas) for i, deltas in run(engine, good).items()}
    model = engine.runner.params["params"]
    embedding = model["embed"]["embedding"].at[13].set(jnp.nan)
    engine.runner.params = {"params": model | {"embed": {"embedding": embedding}}}
    for _ in range(3):
        bad = {f"bad {i}": ([*shared, *[13] * (60 * i + 1)], params) for i in range(2)}
        found = run(engine, bad | good)
        assert {i: tokens(found[i]) for i in good} == expected
        assert all("NaN" in found[i][-1].error and not tokens(found[i]) for i in bad)
        alone = run(engine, {"later": (shared, params)})
        assert tokens(alone["later"]) == expected["shares"]
    engine.scheduler.pool.check()
    engine.close()
