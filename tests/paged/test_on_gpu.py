"""The whole engine on the GPU's kernels, against the engine on reference attention, in bfloat16."""

import json
import random
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from models import open_checkpoint
from models.default_model import default_model_path
from paged import SamplingParams
from paged.sampler import sample, slot_state_shapes
from tests.paged.test_sampler import awkward_logits, random_rows
from tests.paged.tiny import CONFIG, make_engine, run, tokens, write_config

pytestmark = pytest.mark.gpu

SHAPE = CONFIG | {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3,
                  "head_dim": 64, "num_hidden_layers": 6, "vocab_size": 4096,
                  "max_position_embeddings": 2048}  # fmt: skip
WIDE = SHAPE | {"hidden_size": 2560, "intermediate_size": 6912, "num_attention_heads": 20, "num_key_value_heads": 4,
                "head_dim": 128, "num_hidden_layers": 4}  # fmt: skip
OPTIONS = {"dtype": "bfloat16", "max_num_seqs": 16, "max_num_batched_tokens": 512, "max_model_len": 1024,
           "block_size": 16, "num_gpu_blocks_override": 900, "gpu_memory_utilization": 0.1}  # fmt: skip
CLOSE = 0.15  # of a logprob in bfloat16: a token this far from the best may be chosen instead
CLOSE_OF_SMOLLM2 = 0.3  # with its real weights, whose logits are larger
FIXTURES = Path(__file__).parent.parent / "fixtures"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("smollm2-shaped"), **SHAPE)


def behind_the_best(model, prompts, lengths, **options):
    """How far below the reference's best logprob each greedy token of the engine on kernels is: its answers are scored
    by the engine on reference attention, as prompts."""
    kernels = make_engine(model, attention_backend="mosaic_gpu", **OPTIONS | options)
    asked = {
        str(i): (prompt, SamplingParams(temperature=0, max_tokens=length, ignore_eos=True))
        for i, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
    }
    answers = {name: tokens(deltas) for name, deltas in run(kernels, asked).items()}
    kernels.close()
    del kernels
    reference = make_engine(model, attention_backend="reference", **OPTIONS | options)
    scored = {name: (asked[name][0] + answers[name], SamplingParams(max_tokens=1, prompt_logprobs=1)) for name in asked}
    differences = []
    for name, deltas in run(reference, scored).items():
        [logprobs] = [d.prompt_logprobs for d in deltas if d.prompt_logprobs]
        for position, token in enumerate(answers[name], start=len(asked[name][0])):
            best = max(x.logprob for x in logprobs[position].values())
            differences.append(best - logprobs[position][token].logprob)
    reference.close()
    others = sum(d > 0 for d in differences)
    print(f"{len(differences)} tokens, {others} not the best, the largest difference {max(differences):.4f}")
    assert len(differences) == sum(lengths)
    return differences


@pytest.mark.parametrize("shape", [SHAPE, WIDE], ids=["as SmolLM2", "wide"])
def test_every_greedy_token_is_the_references_best(shape, tmp_path):
    """Prompts in chunks, mixed steps, single decodes and chains of them; wide layers norm and add on their way."""
    rng, folder = random.Random(), write_config(tmp_path, **shape)
    prompts = [[rng.randrange(4096) for _ in range(rng.randint(1, 700))] for _ in range(20)]
    differences = behind_the_best(folder, prompts, [rng.randint(8, 90) for _ in prompts])
    assert max(differences) < CLOSE and sum(d > 0 for d in differences) < len(differences) / 10


@pytest.fixture(scope="module")
def smollm2():
    """The real one's file. Where it is not in the cache folder and cannot be fetched, the words say how to get it."""
    pytest.importorskip("gguf", reason="reading its weights needs the gguf package: pip install gguf")
    try:
        return str(default_model_path(progress=False))
    except RuntimeError as error:
        pytest.skip(str(error))


def test_every_greedy_token_of_smollm2_is_the_references_best(smollm2):
    """Its real weights: texts, a chat, and pages of a book."""
    cases = json.loads((FIXTURES / "smollm2.json").read_text())["cases"]
    book = open_checkpoint(smollm2).tokenizer((FIXTURES / "alice.txt").read_text()).input_ids
    prompts = [case["prompt"] for case in cases] + [book[:200], book[700:1000], book[2000:2900]]
    differences = behind_the_best(smollm2, prompts, [100] * len(prompts), load_format="auto")
    assert max(differences) < CLOSE_OF_SMOLLM2 and sum(d > 0 for d in differences) < len(differences) / 20


def test_deterministic_tokens_are_the_same_in_any_company(folder):
    """Each of a few requests alone, and in 100 random mixes, which cut its prompt elsewhere and have other buckets."""
    rng = random.Random()
    sampling = [
        {"temperature": 0}, {"temperature": 1.0}, {"temperature": 0.8, "top_p": 0.9}, {"temperature": 1.2, "top_k": 40}
    ]  # fmt: skip
    watched = {
        f"watched-{i}": ([rng.randrange(4096) for _ in range(rng.randint(1, 400))], options | {"max_tokens": 24})
        for i, options in enumerate(sampling)
    }
    params = lambda options, seed: SamplingParams(**options, seed=seed, ignore_eos=True)  # noqa: E731
    engine = make_engine(
        folder, attention_backend="mosaic_gpu", deterministic=True, enable_prefix_caching=False, **OPTIONS
    )
    alone = {}
    for name, (prompt, options) in watched.items():
        [answer] = run(engine, {name: (prompt, params(options, 7))}).values()
        alone[name] = tokens(answer)
    differences = []
    for i in range(100):
        names = rng.sample(list(watched), rng.randint(1, 4))
        mix = {name: (watched[name][0], params(watched[name][1], 7)) for name in names}
        for j in range(rng.randint(0, 14)):
            prompt = [rng.randrange(4096) for _ in range(rng.randint(1, 300))]
            mix[f"other-{j}"] = prompt, params(rng.choice(sampling) | {"max_tokens": rng.randint(1, 40)}, j)
        answers = run(engine, {name: mix[name] for name in rng.sample(list(mix), len(mix))})
        for name in names:
            wrong = [
                at for at, pair in enumerate(zip(tokens(answers[name]), alone[name], strict=True)) if len(set(pair)) > 1
            ]
            if wrong:
                differences.append((i, len(mix), name, len(watched[name][0]), wrong))
    engine.close()
    assert not differences, "mix, its size, request, its prompt's length, tokens that differ"


@pytest.mark.parametrize("vocab_size", [1000, 40_001, 151_936])
def test_a_full_sampler_takes_the_tokens_that_it_takes_on_a_cpu(vocab_size):
    """There it searches whole rows, and is held against numpy by test_sampler."""
    rng, rows = np.random.default_rng(), 64
    state = random_slots(rng, rows, vocab_size)
    arguments = awkward_logits(rng, rows, vocab_size), state, rng.permutation(rows), np.arange(rows)
    take = jax.jit(partial(sample, variant="full"))
    tokens = [take(*jax.device_put(arguments, device)).tokens for device in (jax.devices()[0], jax.devices("cpu")[0])]
    assert sum(np.asarray(tokens[0]) != np.asarray(tokens[1])) <= 1  # rounding may decide between two


def random_slots(rng, rows, vocab_size):
    """Filters, and for half of the rows penalties, a bias, and tokens that are banned or end nothing yet."""
    shapes = slot_state_shapes(rows, vocab_size)
    state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    scalars = random_rows(rng, rows)
    del scalars["position"]
    penalties = {name: rng.uniform(-1, 1, rows).astype(np.float32) for name in ("presence", "frequency")}
    return replace(
        state,
        **scalars,
        **penalties,
        repetition=rng.uniform(0.7, 1.5, rows).astype(np.float32),
        full=rng.integers(0, 2, rows, dtype=np.int32),
        min_length=rng.choice([0, 1000], rows).astype(np.int32),
        counts=np.where(rng.random(state.counts.shape) < 0.02, rng.integers(1, 8, state.counts.shape), 0),
        bias_ids=rng.integers(0, vocab_size, state.bias_ids.shape, dtype=np.int32),
        bias_values=rng.normal(size=state.bias_values.shape).astype(np.float32),
        allowed=rng.integers(0, 1 << 32, state.allowed.shape, np.uint32),
        stop_mask=rng.integers(0, 1 << 32, state.stop_mask.shape, np.uint32) & np.uint32(1 << 5),
    )
