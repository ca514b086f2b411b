"""What a checkpoint's generation_config.json and tokenizer say about sampling and stopping."""

import json
import shutil
from pathlib import Path

import pytest

from paged import LLM, SamplingParams

LLAMA3 = Path(__file__).parent.parent / "fixtures" / "llama3"  # its tokenizer's end-of-sequence token is 1
SMALL = {"dtype": "float32", "max_num_seqs": 2, "max_model_len": 64, "max_num_batched_tokens": 64}


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("model") / "llama3"
    shutil.copytree(LLAMA3, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": 5}))
    recommended = {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.05, "max_new_tokens": 9}
    (folder / "generation_config.json").write_text(
        json.dumps({**recommended, "eos_token_id": [6, 7], "do_sample": True, "pad_token_id": 0})
    )
    llm = LLM(str(folder), **SMALL)
    yield llm
    llm.engine.close()


def test_sampling_defaults(llm: LLM) -> None:
    assert llm.get_default_sampling_params() == SamplingParams(
        temperature=0.6, top_p=0.9, top_k=20, repetition_penalty=1.05, max_tokens=9
    )


@pytest.mark.parametrize("eos", [1, 5, 6, 7])
def test_every_end_of_sequence_token_ends(llm: LLM, eos: int) -> None:
    """The tokenizer's, config.json's and those of generation_config.json; not where they are to be ignored."""
    forced = SamplingParams(temperature=0, max_tokens=4, logit_bias={eos: 100.0})
    [result] = llm.generate("the cat", forced, use_tqdm=False)
    assert result.outputs[0].token_ids == [eos] and result.outputs[0].finish_reason == "stop"
    ignored = SamplingParams(temperature=0, max_tokens=4, logit_bias={eos: 100.0}, ignore_eos=True)
    [result] = llm.generate("the cat", ignored, use_tqdm=False)
    assert result.outputs[0].token_ids == [eos] * 4 and result.outputs[0].finish_reason == "length"
