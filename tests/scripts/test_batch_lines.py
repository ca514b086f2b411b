"""Parsing a batch's input, and the output file that survives a kill: no model needed."""

import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paged.errors import InvalidRequestError
from scripts.batch.lines import Line, explicit_id, parse_job, parse_json, read_lines
from scripts.batch.results import ResultFile, RunError

MESSAGES = [{"role": "user", "content": "Hi"}]


def job(value: dict[str, Any]) -> Any:
    return parse_job(value, 7, ("m", "org/m"))


def openai(body: Any, url: str = "/v1/chat/completions", **changes: Any) -> dict[str, Any]:
    return {"custom_id": "a", "method": "POST", "url": url, "body": body} | changes


def test_a_plain_prompt_gets_its_line_number_as_id() -> None:
    parsed = job({"prompt": "Hello", "temperature": 0.5, "seed": None})
    assert (parsed.id, parsed.url, parsed.prompts, parsed.messages) == (7, None, ["Hello"], None)
    assert parsed.sampling == {"temperature": 0.5}


@pytest.mark.parametrize("name", ["id", "custom_id"])
def test_a_plain_line_may_bring_its_id(name: str) -> None:
    parsed = job({name: "mine", "messages": MESSAGES, "max_tokens": 3, "priority": 2})
    assert (parsed.id, parsed.messages, parsed.prompts) == ("mine", MESSAGES, [])
    assert parsed.sampling == {"max_tokens": 3}
    assert parsed.options == {"priority": 2}


def test_openai_chat_names_become_sampling_fields() -> None:
    body = {"model": "m", "messages": MESSAGES, "max_completion_tokens": 9, "logprobs": True, "top_logprobs": 2}
    assert job(openai(body | {"stream": False, "user": "u"})).sampling == {"max_tokens": 9, "logprobs": 2}
    assert job(openai({"messages": MESSAGES, "logprobs": True})).sampling == {"logprobs": 0}
    assert job(openai({"messages": MESSAGES, "logprobs": False, "model": "org/m"})).sampling == {}


@pytest.mark.parametrize(
    ("prompt", "parsed"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_the_four_forms_of_a_prompt(prompt: Any, parsed: list) -> None:
    assert job(openai({"prompt": prompt}, "/v1/completions")).prompts == parsed


@pytest.mark.parametrize(
    ("value", "param", "word"),
    [
        ({}, None, "either `prompt` or `messages`"),
        ({"prompt": "a", "messages": MESSAGES}, None, "either"),
        ({"prompt": ["a", "b"]}, "prompt", "one text"),
        ({"prompt": []}, "prompt", "must be"),
        ({"prompt": [True]}, "prompt", "must be"),
        ({"prompt": "a", "temprature": 1}, "temprature", "Unknown"),
        ({"prompt": "a", "priority": True}, "priority", "type int"),
        ({"prompt": "a", "add_generation_prompt": True}, "add_generation_prompt", "Unknown"),
        ({"messages": "hi"}, "messages", "list"),
        ({"messages": []}, "messages", "list"),
        ({"messages": MESSAGES, "add_special_tokens": False}, "add_special_tokens", "Unknown"),
        (openai({"messages": MESSAGES}, extra=1), "extra", "Unknown"),
        (openai({"messages": MESSAGES}, method="GET"), "method", "POST"),
        (openai({"messages": MESSAGES}, url="/v1/embeddings"), "url", "/v1/completions"),
        (openai([1]), "body", "object"),
        (openai({"messages": MESSAGES}, custom_id=3), "custom_id", "string"),
        (openai({"messages": MESSAGES, "model": "gpt"}), "model", "does not exist"),
        (openai({"messages": MESSAGES, "stream": True}), "stream", "false"),
        (openai({"messages": MESSAGES, "tools": []}), "tools", "Unknown"),
        (openai({"messages": MESSAGES, "logprobs": 3}), "logprobs", "true or false"),
        (openai({"messages": MESSAGES, "top_logprobs": 3}), "top_logprobs", "needs"),
        (openai({"messages": MESSAGES, "max_tokens": 3, "max_completion_tokens": 3}), "max_tokens", "not both"),
        (openai({"prompt": "a", "echo": True}, "/v1/completions"), "echo", "false"),
        (openai({"prompt": "a", "suffix": "b"}, "/v1/completions"), "suffix", "Unknown"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(value: dict[str, Any], param: str | None, word: str) -> None:
    with pytest.raises(InvalidRequestError, match=word) as e:
        job(value)
    assert e.value.param == param


@pytest.mark.parametrize("text", [b"{", b"[1]", b'"a"', b"\xff\xfe", b"{} {}", b"[" * 100_000, b"null"])
def test_a_line_that_is_no_json_object_is_refused(text: bytes) -> None:
    with pytest.raises(InvalidRequestError, match="this line is not"):
        parse_json(Line(1, text, ""))


@pytest.mark.parametrize("value", [{"id": 1.5}, {"id": True}, {"custom_id": ["a"]}, {"id": "a", "custom_id": "b"}])
def test_an_id_is_one_string_or_integer(value: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError):
        explicit_id(value)


def test_lines_are_read_lazily_numbered_and_blank_ones_skipped(tmp_path: Path) -> None:
    path = tmp_path / "in"
    path.write_bytes(b"\n a \r\n\n\nb\n  \nc")
    assert [(line.number, line.text) for line in read_lines(str(path), io.BytesIO(), b"")] == [
        (2, b"a"),
        (5, b"b"),
        (7, b"c"),
    ]
    assert [line.text for line in read_lines("-", io.BytesIO(b"x\ny"), b"")] == [b"x", b"y"]


def test_a_digest_depends_on_the_line_and_on_the_key() -> None:
    def digest(text: bytes, key: bytes) -> str:
        return next(read_lines("-", io.BytesIO(text), key)).digest

    assert digest(b"a\n", b"1") == digest(b"a", b"1")
    assert len({digest(b"a", b"1"), digest(b"b", b"1"), digest(b"a", b"2")}) == 3


def write_all(path: Path, numbers: list[int]) -> None:
    results = ResultFile(str(path))
    for number in numbers:
        results.write(number, f"{number:016x}", {"text": "é\ud800\n" if number % 2 else "漢字"})
    results.close()


def lines_of(path: Path) -> list[int]:
    return [json.loads(text)["line"] for text in path.read_bytes().splitlines()]


@given(cut=st.integers(0, 400))
def test_a_file_cut_anywhere_keeps_its_whole_lines(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    path = tmp_path_factory.mktemp("cut") / "out"
    write_all(path, [3, 1, 2, 4])
    data = path.read_bytes()[:cut]
    path.write_bytes(data)
    results = ResultFile(str(path))
    whole = data.count(b"\n")
    assert results.num_done == whole
    done = [3, 1, 2, 4][:whole]
    assert [n for n in range(6) if results.has(n, f"{n:016x}")] == sorted(done)
    for number in (1, 2, 3, 4):
        if not results.has(number, f"{number:016x}"):
            results.write(number, f"{number:016x}", {})
    results.close()
    assert sorted(lines_of(path)) == [1, 2, 3, 4]


def test_another_input_line_is_noticed(tmp_path: Path) -> None:
    write_all(tmp_path / "out", [1, 2])
    results = ResultFile(str(tmp_path / "out"))
    assert results.last_line == 2
    with pytest.raises(RunError, match="result for line 2 that was made from another input"):
        results.has(2, "f" * 16)
    assert not results.has(1000, "f" * 16)
    results.close()


@pytest.mark.parametrize(
    "content", [b"notes", b"notes\n", b'{"a": 1}\n', b'{"line": 1, "digest": "zz"}\n', b"[]\n", b'{"line": 1}\n{"lix']
)
def test_a_file_of_somebody_else_is_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "out"
    path.write_bytes(content)
    with pytest.raises(RunError, match="choose another output file"):
        ResultFile(str(path))
    assert path.read_bytes() == content


def test_two_runs_cannot_write_one_file(tmp_path: Path) -> None:
    first = ResultFile(str(tmp_path / "out"))
    with pytest.raises(RunError, match="another run"):
        ResultFile(str(tmp_path / "out"))
    first.close()
    ResultFile(str(tmp_path / "out")).close()


def test_results_in_any_order_are_remembered(tmp_path: Path) -> None:
    numbers = list(range(1, 5001))
    random.Random(0).shuffle(numbers)
    write_all(tmp_path / "out", numbers)
    before = (tmp_path / "out").stat().st_size
    results = ResultFile(str(tmp_path / "out"))
    assert results.num_done == 5000
    assert all(results.has(n, f"{n:016x}") for n in numbers)
    results.close()
    assert (tmp_path / "out").stat().st_size == before
