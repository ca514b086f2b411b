"""The whole engine on the GPU's kernels, against the engine on reference attention, in bfloat16."""

import json
import random

import pytest

from paged import SamplingParams
from tests.paged.tiny import CONFIG, make_engine, run, tokens

pytestmark = pytest.mark.gpu

SHAPE = CONFIG | {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3,
                  "head_dim": 64, "num_hidden_layers": 6, "vocab_size": 4096,
                  "max_position_embeddings": 2048}  # fmt: skip
OPTIONS = {"dtype": "bfloat16", "max_num_seqs": 16, "max_num_batched_tokens": 512, "max_model_len": 1024,
           "block_size": 16, "num_gpu_blocks_override": 900, "gpu_memory_utilization": 0.1}  # fmt: skip
CLOSE = 0.15  # of a logprob in bfloat16: a token this far from the best may be chosen instead


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2-shaped")
    (folder / "config.json").write_text(json.dumps(SHAPE))
    return str(folder)


def test_every_greedy_token_is_the_references_best(folder):
    """Prompts in chunks, mixed steps, single decodes and chains of them; what they gave is scored as a prompt."""
    kernels = make_engine(folder, attention_backend="mosaic_gpu", **OPTIONS)
    rng = random.Random()
    greedy = {
        str(i): ([rng.randrange(4096) for _ in range(rng.randint(1, 700))], rng.randint(8, 90)) for i in range(20)
    }
    asked = {
        name: (prompt, SamplingParams(temperature=0, max_tokens=length, ignore_eos=True))
        for name, (prompt, length) in greedy.items()
    }
    answers = {name: tokens(deltas) for name, deltas in run(kernels, asked).items()}
    kernels.close()
    del kernels
    reference = make_engine(folder, attention_backend="reference", **OPTIONS)
    scored = {name: (asked[name][0] + answers[name], SamplingParams(max_tokens=1, prompt_logprobs=1)) for name in asked}
    differences = []
    for name, deltas in run(reference, scored).items():
        [logprobs] = [d.prompt_logprobs for d in deltas if d.prompt_logprobs]
        for position, token in enumerate(answers[name], start=len(asked[name][0])):
            best = max(x.logprob for x in logprobs[position].values())
            differences.append(best - logprobs[position][token].logprob)
    reference.close()
    assert max(differences) < CLOSE and sum(d > 0 for d in differences) < len(differences) / 10


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
