"""Tokens of pieces of characters, for which the text of a token is not enough."""

from tokenizers import pre_tokenizers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from paged.outputs import Logprob
from server.logprobs import LogprobFormat, _byte_alphabet
from tests.server.tiny import write_model


def load(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(write_model(folder))


def test_byte_alphabet():
    assert _byte_alphabet() == {char: byte for byte, char in bytes_to_unicode().items()}
    assert _byte_alphabet().keys() == set(pre_tokenizers.ByteLevel.alphabet())


def test_bytes_of_pieces(tmp_path):
    tokenizer = load(tmp_path)
    text = "a🌍é"
    ids = tokenizer.encode(text, add_special_tokens=False)
    logprobs = [{token: Logprob(-1.0, 1, tokenizer.decode([token]))} for token in ids]
    content = LogprobFormat(tokenizer).chat(logprobs, ids, 1)["content"]
    assert b"".join(bytes(token["bytes"]) for token in content) == text.encode()
    assert [token["token"] for token in content] == ["a", *["\ufffd"] * 6]


def test_minus_infinity_can_be_written_as_json():
    content = LogprobFormat(None).completion([{3: Logprob(float("-inf"), 9)}], [3], 0)
    assert content["token_logprobs"] == [-9999.0]
    assert content["tokens"] == ["token_id:3"]
