"""LLM on the default model: what a notebook sees."""

import pytest

from paged import LLM, InvalidRequestError, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=24)
QUESTION = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]


@pytest.fixture(scope="module")
def llm():
    llm = LLM(dtype="float32", max_num_seqs=4, max_model_len=512, max_num_batched_tokens=128)
    yield llm
    llm.engine.close()


def generate(llm, *args, **kwargs):
    return llm.generate(*args, use_tqdm=False, **kwargs)


def test_chat_answers(llm):
    [result] = llm.chat(QUESTION, GREEDY, use_tqdm=False)
    assert "Paris" in result.outputs[0].text
    assert result.finished and result.outputs[0].finish_reason == "stop"
    assert llm.get_tokenizer().decode(result.prompt_token_ids).count("capital of France") == 1


def test_text_is_what_the_tokenizer_makes_of_the_tokens(llm):
    prompts = ["Three colours: red,", "El niño come", "数学は", "🙂 emoji and"]
    for result in generate(llm, prompts, SamplingParams(temperature=1.2, seed=4, max_tokens=40)):
        ids = result.outputs[0].token_ids
        whole = llm.get_tokenizer().decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert result.outputs[0].text == whole.rstrip("\N{REPLACEMENT CHARACTER}")


def test_results_are_in_the_order_of_the_prompts(llm):
    prompts = [f"Number {i} is" for i in range(9)]
    params = [SamplingParams(temperature=0, max_tokens=1 + (5 * i) % 7, ignore_eos=True) for i in range(9)]
    results = generate(llm, prompts, params)
    assert [r.prompt for r in results] == prompts
    assert [len(r.outputs[0].token_ids) for r in results] == [p.max_tokens for p in params]


def test_token_ids_and_dicts_are_prompts_too(llm):
    text = "The first prime numbers are"
    ids = llm.get_tokenizer().encode(text)
    results = generate(llm, [text, ids, {"prompt": text}, {"prompt_token_ids": ids}], GREEDY)
    assert len({r.outputs[0].text for r in results}) == 1
    assert generate(llm, ids, GREEDY)[0].outputs[0].text == results[0].outputs[0].text
    assert generate(llm, text, GREEDY)[0].prompt_token_ids == ids


@pytest.mark.parametrize("include", [False, True])
def test_stop_strings_cut_the_text(llm, include):
    free = generate(llm, "One, two, three,", GREEDY)[0].outputs[0].text
    stop = free[10:14]
    cut = free[: free.index(stop)] + (stop if include else "")
    params = SamplingParams(temperature=0, max_tokens=24, stop=["never ever", stop], include_stop_str_in_output=include)
    output = generate(llm, "One, two, three,", params)[0].outputs[0]
    assert (output.text, output.finish_reason, output.stop_reason) == (cut, "stop", stop)
    assert llm.engine.scheduler.usage == 0


def test_a_stop_token_is_not_text_unless_asked_for(llm):
    free = generate(llm, "One, two, three,", GREEDY)[0].outputs[0]
    stop = free.token_ids[4]
    before = llm.get_tokenizer().decode(free.token_ids[: free.token_ids.index(stop)])
    for include in (False, True):
        params = SamplingParams(temperature=0, max_tokens=24, stop_token_ids=[stop], include_stop_str_in_output=include)
        output = generate(llm, "One, two, three,", params)[0].outputs[0]
        assert output.text == before + (llm.get_tokenizer().decode([stop]) if include else "")
        assert output.stop_reason == stop


def test_several_completions_and_their_logprobs(llm):
    params = SamplingParams(n=3, temperature=1.0, seed=1, max_tokens=8, ignore_eos=True, logprobs=2)
    [result] = generate(llm, "My favourite animal is", params)
    assert [o.index for o in result.outputs] == [0, 1, 2] and len({o.text for o in result.outputs}) == 3
    for output in result.outputs:
        chosen = [lp[t].logprob for lp, t in zip(output.logprobs, output.token_ids, strict=True)]
        assert output.cumulative_logprob == pytest.approx(sum(chosen))
        assert all(lp[t].decoded_token is not None for lp, t in zip(output.logprobs, output.token_ids, strict=True))


def test_the_models_own_sampling_defaults_are_used_when_none_are_given(llm):
    assert llm.get_default_sampling_params() == SamplingParams(**llm.engine.default_sampling_params)
    [result] = generate(llm, "Hello")
    assert len(result.outputs[0].token_ids) <= llm.get_default_sampling_params().max_tokens


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        (["a", 3.5], GREEDY, "a prompt is text"),
        (["a", ""], GREEDY, "empty"),
        (["a", [10**6]], GREEDY, "token ids must be in"),
        (["a", "b"], [GREEDY], "1 sampling_params for 2 prompts"),
        ("word " * 600, GREEDY, "shorten"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(llm, prompts, params, message):
    with pytest.raises(InvalidRequestError, match=message):
        generate(llm, prompts, params)
    assert not llm.engine.has_unfinished_requests()


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{"role": "nobody", "content": "x"}],
        [{"role": "user"}],
        [{"role": "user", "content": [{"type": "image_url"}]}],
    ],
)
def test_bad_messages_are_refused(llm, messages):
    with pytest.raises(InvalidRequestError, match="messages"):
        llm.chat(messages, GREEDY, use_tqdm=False)


def test_unknown_and_impossible_options():
    with pytest.raises(TypeError, match="max_modle_len"):
        LLM(max_modle_len=3)
    with pytest.raises(InvalidRequestError, match="block_size"):
        LLM(block_size=17)
    with pytest.raises(InvalidRequestError, match="exceeds the model's 8,192"):
        LLM(max_model_len=100_000)
    with pytest.raises(InvalidRequestError, match="lower max_model_len"):
        LLM(max_model_len=4096, kv_cache_memory_bytes=1 << 20)
    with pytest.raises(InvalidRequestError, match="must not be below max_num_seqs"):
        LLM(max_num_seqs=64, max_num_batched_tokens=32)
