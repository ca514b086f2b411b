"""Incremental detokenization against the tokenizer's own decoding of everything at once."""

import itertools
import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from models import open_checkpoint
from paged.detokenizer import REPLACEMENT, IncrementalDetokenizer, StopMatcher, Vocabulary
from paged.sampling_params import SamplingParams

CORPUS = [
    "The quick brown fox jumps over the lazy dog. The dog sleeps; the fox doesn't.",
    "def stop(self): return [x for x in range(10)]\n\n\tUser: hello\nAssistant: hi there",
    "naïve café, Straße, кошка, 你好世界, こんにちは, 😀👩‍👩‍👧 ok",
] * 3
SPECIAL = ["<|end|>", "<|user|>"]


def byte_level() -> PreTrainedTokenizerFast:
    """GPT-2's kind, as Llama 3, Qwen and SmolLM2 have it: any character can be cut into its bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=SPECIAL)
    )
    tokenizer.add_tokens([AddedToken("<tool>", special=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def byte_fallback() -> PreTrainedTokenizerFast:
    """SentencePiece's kind, as Llama 2 and Mistral have it: spaces are in the words, unknown characters are byte
    tokens, and the first space of a text is dropped."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", *SPECIAL], limit_alphabet=60)
    tokenizer.train_from_iterator(CORPUS, trainer)
    vocab, merges = trained(tokenizer)
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    tokenizer.model = models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def trained(tokenizer: Tokenizer):
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


TOKENIZERS = {"byte_level": byte_level(), "byte_fallback": byte_fallback()}
every_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS.keys())
unicode_text = st.lists(
    st.one_of(
        st.characters(exclude_categories=["Cs"], exclude_characters=REPLACEMENT),
        st.sampled_from(
            ["😀", "👩‍👩‍👧", "e\u0301", "你好", "\u200d", "🇩🇪", " ", "\n", "the", "▁", "fox ", "\u0000", "ﷺ"]
        ),
    ),
    max_size=25,
).map("".join)


def encode(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


def decode(tokenizer, ids, skip_special_tokens=True):
    return tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)


def stream(tokenizer, ids, chunk=1, **params):
    """All deltas, and the stop string if one was hit."""
    detokenizer = IncrementalDetokenizer(tokenizer, SamplingParams(**params))
    deltas = []
    for i in range(0, len(ids), chunk):
        delta, stop = detokenizer.append(ids[i : i + chunk])
        deltas.append(delta)
        if stop is not None:
            return deltas, stop
    return [*deltas, detokenizer.finish()], None


@pytest.fixture(scope="session")
def smollm2() -> PreTrainedTokenizerFast:
    return open_checkpoint("smollm2-135m-instruct").tokenizer


# ---- text ----


@every_tokenizer
@settings(max_examples=200)
@given(text=unicode_text, chunk=st.integers(1, 4))
@example(text="👩‍👩‍👧😀" * 10, chunk=1)
@example(text="  two spaces  ", chunk=1)
def test_deltas_join_to_the_text_and_have_whole_characters_only(tokenizer, text, chunk):
    ids = encode(tokenizer, text)
    deltas, _ = stream(tokenizer, ids, chunk)
    assert "".join(deltas) == decode(tokenizer, ids)
    assert not any(REPLACEMENT in delta for delta in deltas)


@settings(max_examples=200)
@given(text=unicode_text, data=st.data())
def test_a_real_vocabulary(smollm2, text, data):
    ids = encode(smollm2, text)
    deltas, _ = stream(smollm2, ids)
    assert as_held_back("".join(deltas)) == as_held_back(decode(smollm2, ids))  # it lacks some bytes
    ids = data.draw(st.lists(st.integers(0, len(smollm2) - 1), max_size=60))
    assert as_held_back("".join(stream(smollm2, ids)[0])) == as_held_back(decode(smollm2, ids))


@every_tokenizer
@settings(max_examples=200)
@given(text=unicode_text, data=st.data())
def test_a_cut_character_is_never_shown(tokenizer, text, data):
    ids = encode(tokenizer, text)
    ids = ids[: data.draw(st.integers(0, len(ids)))]
    beginnings = [decode(tokenizer, ids[:i]).rstrip(REPLACEMENT) for i in range(len(ids) + 1)]
    deltas, _ = stream(tokenizer, ids)
    assert "".join(deltas) == max((b for b in beginnings if REPLACEMENT not in b), key=len)


@given(text=st.text(REPLACEMENT + "a\u0800😀", max_size=10))
def test_a_replacement_character_can_be_meant(text):
    tokenizer = TOKENIZERS["byte_level"]
    deltas, _ = stream(tokenizer, encode(tokenizer, text + "."))
    assert "".join(deltas) == text + "."


@every_tokenizer
@settings(max_examples=200)
@given(data=st.data(), skip=st.booleans())
def test_random_tokens_read_as_the_tokenizer_reads_them(tokenizer, data, skip):
    ids = [i for i in range(len(tokenizer)) if not tokenizer.convert_ids_to_tokens(i).startswith("<0x")]
    ids = data.draw(st.lists(st.sampled_from(ids), max_size=40))
    streamed, whole = "".join(stream(tokenizer, ids, skip_special_tokens=skip)[0]), decode(tokenizer, ids, skip)
    assert as_held_back(streamed) == as_held_back(whole)


def as_held_back(text):
    """What is broken at the end may be the beginning of a character."""
    return text.rstrip(REPLACEMENT)


BYTE_TOKENS = [i for i in range(400) if REPLACEMENT in decode(TOKENIZERS["byte_level"], [i])]


@settings(max_examples=200)
@given(ids=st.lists(st.sampled_from([*BYTE_TOKENS, 0, 400]), max_size=30), skip=st.booleans())
@example(ids=[128, 358, 158, 96, 0], skip=False)
def test_broken_characters_read_as_the_tokenizer_reads_them(ids, skip):
    """A token can be the end of one character and the beginning of another."""
    tokenizer = TOKENIZERS["byte_level"]
    streamed = "".join(stream(tokenizer, ids, skip_special_tokens=skip)[0])
    assert as_held_back(streamed) == as_held_back(decode(tokenizer, ids, skip))


@given(broken=st.binary(min_size=1, max_size=12))
@example(broken="你😀".encode() + b"\xff")
def test_broken_byte_tokens_spoil_nothing_around_them(broken):
    """This decoder gives up all characters in a run of byte tokens if one is broken; a stream has shown some."""
    tokenizer = TOKENIZERS["byte_fallback"]
    before, after = encode(tokenizer, "the fox"), encode(tokenizer, "the dog")
    ids = tokenizer.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in broken])
    text = "".join(stream(tokenizer, before + ids + after)[0])
    assert text.startswith("the fox")
    assert text.endswith(" the dog")
    try:
        assert text == "the fox" + broken.decode() + " the dog"
    except UnicodeDecodeError:
        assert REPLACEMENT in text


@every_tokenizer
def test_special_tokens_are_shown_or_not(tokenizer):
    user, end = tokenizer.convert_tokens_to_ids(["<|user|>", "<|end|>"])
    ids = [user, *encode(tokenizer, "hello"), end, *encode(tokenizer, "fox"), end]
    for skip in (True, False):
        text = "".join(stream(tokenizer, ids, skip_special_tokens=skip)[0])
        assert text == decode(tokenizer, ids, skip)
        assert ("<|end|>" in text) != skip


def test_added_tokens_that_are_not_special_are_text():
    tokenizer = TOKENIZERS["byte_level"]
    ids = encode(tokenizer, "call <tool> now")
    assert tokenizer.convert_tokens_to_ids("<tool>") in ids
    assert "".join(stream(tokenizer, ids)[0]) == "call <tool> now"


def test_spaces_between_special_tokens_can_be_left_out():
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "red": 1, "fox": 2}, unk_token="<unk>"))  # joins by spaces
    tokenizer.add_special_tokens([AddedToken("<a>", special=True), AddedToken("<b>", special=True)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    ids = [1, 3, 4, 3, 2, 4]
    spaced = {"skip_special_tokens": False, "spaces_between_special_tokens": True}
    joined = {"skip_special_tokens": False, "spaces_between_special_tokens": False}
    assert "".join(stream(tokenizer, ids, **spaced)[0]) == decode(tokenizer, ids, False) == "red <a> <b> <a> fox <b>"
    assert "".join(stream(tokenizer, ids, **joined)[0]) == "red <a><b><a> fox <b>"


def test_the_prompt_decides_about_the_first_space():
    tokenizer = TOKENIZERS["byte_fallback"]
    prompt, output = encode(tokenizer, "the quick"), encode(tokenizer, "fox")
    continued = IncrementalDetokenizer(tokenizer, SamplingParams(), prompt)
    assert continued.append(output) == (" fox", None)
    assert decode(tokenizer, prompt + output) == "the quick fox"
    assert IncrementalDetokenizer(tokenizer, SamplingParams()).append(output) == ("fox", None)
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert IncrementalDetokenizer(tokenizer, SamplingParams(), [end]).append(output) == ("fox", None)


def test_a_character_that_the_prompt_began_is_completed():
    tokenizer = TOKENIZERS["byte_level"]
    ids = encode(tokenizer, "hot 🌶 soup")
    for cut in range(len(ids)):
        detokenizer = IncrementalDetokenizer(tokenizer, SamplingParams(), ids[:cut])
        shown = decode(tokenizer, ids[:cut]).rstrip(REPLACEMENT)
        assert shown + detokenizer.append(ids[cut:])[0] + detokenizer.finish() == "hot 🌶 soup"


@pytest.mark.parametrize("kind", ["broken bytes", "special tokens", "unfinished characters", "words"])
@every_tokenizer
def test_work_is_linear_in_the_number_of_tokens(tokenizer, kind, monkeypatch):
    byte = {"byte_level": "ð", "byte_fallback": "<0xF0>"}
    name = next(name for name, known in TOKENIZERS.items() if known is tokenizer)
    tokens = {"broken bytes": [byte[name]], "special tokens": ["<|end|>"]}
    if kind in tokens:
        ids = tokenizer.convert_tokens_to_ids(tokens[kind]) * 2000
    else:
        ids = encode(tokenizer, {"unfinished characters": "😀", "words": "the fox"}[kind]) * 500
    decoded = []
    original = Vocabulary.decode
    monkeypatch.setattr(Vocabulary, "decode", lambda self, ids: decoded.append(len(ids)) or original(self, ids))
    deltas, _ = stream(tokenizer, ids)
    assert sum(decoded) <= 20 * len(ids)
    assert max(decoded, default=0) <= 8
    if kind == "broken bytes":
        assert "".join(deltas).count(REPLACEMENT) >= len(ids) - 4  # shown as they come, not kept for the end


def test_ids_without_a_token_add_nothing():
    tokenizer = TOKENIZERS["byte_fallback"]
    hello, fox = encode(tokenizer, "hello"), encode(tokenizer, "fox")
    deltas, _ = stream(tokenizer, hello + [len(tokenizer) + 7] * 30 + fox)
    assert "".join(deltas) == "hello fox"


# ---- stop strings ----


@every_tokenizer
@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("stop", ["f", "quick", " brown fox", "😀", "k br", ".", "\n\nUser:"])
def test_a_stop_string_is_found_wherever_tokens_split_it(tokenizer, stop, include):
    text = "The quick brown fox 😀 jumps.\n\nUser: no"
    pieces = [encode(tokenizer, char) for char in text]  # one character a token or less
    for ids in (encode(tokenizer, text), [i for piece in pieces for i in piece if i]):
        whole = decode(tokenizer, ids)
        for chunk in (1, 2, 3, len(ids)):
            deltas, hit = stream(tokenizer, ids, chunk, stop=[stop, "never"], include_stop_str_in_output=include)
            if stop not in whole:
                assert hit is None
                continue
            assert hit == stop
            assert "".join(deltas) == whole.split(stop)[0] + (stop if include else "")


def pieces_of(alphabet: str, length: int) -> PreTrainedTokenizerFast:
    """Every string of up to `length` letters is a token."""
    words = ["".join(w) for n in range(1, length + 1) for w in itertools.product(alphabet, repeat=n)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


PIECES = pieces_of("ab", 4)


@settings(max_examples=200)
@given(
    pieces=st.lists(st.text("ab", min_size=1, max_size=4), max_size=15),
    stops=st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=4),
    include=st.booleans(),
)
def test_stops_depend_on_the_text_alone_and_nothing_more_is_held_back(pieces, stops, include):
    """The oracle cuts the whole text at the match that is complete first, the longest of several."""
    text = "".join(pieces)
    matches = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    detokenizer = IncrementalDetokenizer(PIECES, SamplingParams(stop=stops, include_stop_str_in_output=include))
    shown, seen, hit = "", "", None
    for piece in pieces:
        seen += piece
        delta, hit = detokenizer.append([PIECES.convert_tokens_to_ids(piece)])
        shown += delta
        if hit is not None:
            break
        beginnings = [stop[:k] for stop in stops for k in range(len(stop))]
        assert seen == shown + max((b for b in beginnings if seen.endswith(b)), key=len)
    if matches:
        end, _, stop = min(matches)
        assert hit == stop
        assert shown == text[: end if include else end - len(stop)]
        assert detokenizer.append([1, 2, 3]) == ("", None)
        assert detokenizer.finish() == ""
    else:
        assert hit is None
        assert shown + detokenizer.finish() == text


def test_stop_strings_count_only_after_min_tokens():
    tokenizer = TOKENIZERS["byte_level"]
    ids = [encode(tokenizer, char)[0] for char in "xyabxyab"]
    for min_tokens in range(9):
        deltas, hit = stream(tokenizer, ids, stop="ab", min_tokens=min_tokens)
        text = "xy" if min_tokens < 4 else "xyabxy" if min_tokens < 8 else "xyabxyab"
        assert ("".join(deltas), hit) == (text, "ab" if min_tokens < 8 else None)


def test_a_stop_inside_what_min_tokens_exempts_is_not_found_later():
    tokenizer = TOKENIZERS["byte_level"]
    ids = [encode(tokenizer, char)[0] for char in "xabzq"]
    deltas, hit = stream(tokenizer, ids, stop=["xaby", "ab"], min_tokens=3)
    assert ("".join(deltas), hit) == ("xabzq", None)


@given(pattern=st.text("ab", min_size=1, max_size=6), text=st.text("ab", max_size=40))
def test_the_matcher_finds_every_occurrence(pattern, text):
    matcher = StopMatcher(pattern)
    found = [end for end, char in enumerate(text, start=1) if matcher.advance(char)]
    assert found == [end for end in range(len(text) + 1) if text[:end].endswith(pattern)]
