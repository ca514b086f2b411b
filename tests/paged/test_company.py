"""The same seed gives the same tokens, alone and in any company, in float32 on a CPU."""

import json
import random

import numpy as np
import pytest

from paged import SamplingParams
from tests.paged.tiny import CONFIG, make_engine, run, tokens

WIDE = CONFIG | {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3,
                 "head_dim": 64, "vocab_size": 1999}  # fmt: skip


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wide")
    (folder / "config.json").write_text(json.dumps(WIDE))
    engine = make_engine(
        str(folder), max_num_seqs=16, max_num_batched_tokens=64, max_model_len=128,
        num_gpu_blocks_override=300, enable_prefix_caching=False,
    )  # fmt: skip
    yield engine
    engine.close()


def request(rng: random.Random):
    prompt = [rng.randrange(1999) for _ in range(rng.randint(1, 70))]
    params = SamplingParams(
        temperature=rng.choice([0, 0.8, 1.3]), top_p=rng.choice([1, 0.9]), seed=rng.randrange(1 << 30),
        max_tokens=rng.randint(8, 40), ignore_eos=True, logprobs=2,
    )  # fmt: skip
    return prompt, params


@pytest.mark.parametrize("seed", range(6))
def test_company_changes_no_token(engine, seed):
    rng = random.Random(seed)
    asked = {f"{seed}-{i}": request(rng) for i in range(rng.randint(3, 16))}
    together = run(engine, asked)
    for name, (prompt, params) in asked.items():
        alone = run(engine, {f"alone-{name}": (prompt, params)})[f"alone-{name}"]
        assert tokens(alone) == tokens(together[name])
        for a, b in zip(logprobs(alone), logprobs(together[name]), strict=True):
            np.testing.assert_allclose(a, b, atol=5e-5)  # measured: 4e-6


def logprobs(deltas) -> list[float]:
    return [logprobs[token].logprob for d in deltas for token, logprobs in zip(d.token_ids, d.logprobs, strict=True)]
