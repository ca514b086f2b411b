"""A client of an engine that is not there: what it sends, and what its readers get for what it is told."""

import asyncio

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from paged import EngineStoppedError, QueueFullError, RequestFailedError, SamplingParams
from paged.engine_client import AbortRequest, AddRequest, EngineClient, EngineInfo, FinishCompletion
from paged.outputs import CompletionDelta, StepOutput, TokenDelta

LETTERS = "abcdefghijklmnopqrstuvwxyz"
FIRST = TokenDelta([0], num_cached_tokens=3)


class Told:
    """A client, and the commands it gave. Token i is the i-th letter."""

    def __init__(self) -> None:
        tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(LETTERS)}, merges=[]))
        tokenizer.decoder = decoders.ByteLevel()
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
        self.commands: list = []
        self.client = EngineClient(EngineInfo(fast, len(LETTERS), 99, 4, 9, {}), self.commands.append)

    async def read(self, **params) -> list[list[CompletionDelta]]:
        stream = self.client.generate([1, 2], SamplingParams(max_tokens=50, **params), "r")
        return [deltas async for deltas in stream]

    def more(self, key: int, letters: str) -> None:
        for letter in letters:
            self.client.on_outputs([StepOutput([key], [LETTERS.index(letter)])])

    def delta(self, key: int, delta: TokenDelta) -> None:
        self.client.on_outputs([StepOutput(deltas=[(key, delta)])])


def run(scenario) -> None:
    async def limited() -> None:
        async with asyncio.timeout(30):
            await scenario(Told())

    asyncio.run(limited())


def test_what_a_reader_missed_is_one_delta():
    async def scenario(told: Told) -> None:
        reader = asyncio.create_task(told.read())
        await asyncio.sleep(0)
        [add] = told.commands
        assert isinstance(add, AddRequest) and add.prompt == [1, 2]
        told.delta(add.key, FIRST)
        told.more(add.key, "bc")
        await asyncio.sleep(0)
        told.more(add.key, "de")
        told.delta(add.key, TokenDelta([5], finish_reason="length"))
        together, rest = await reader
        assert [(d.text, d.token_ids) for d in together] == [("a", [0]), ("bc", [1, 2])]
        assert [(d.text, d.finish_reason) for d in rest] == [("de", None), ("f", "length")]
        assert {d.num_cached_tokens for d in together + rest} == {3}
        assert len(told.commands) == 1 and told.client.num_unfinished == 0

    run(scenario)


def test_a_stop_string_ends_the_completion_here_and_there():
    async def scenario(told: Told) -> None:
        reader = asyncio.create_task(told.read(stop="cd", n=2))
        await asyncio.sleep(0)
        key = told.commands[0].key
        for index in (0, 1):
            told.delta(key + index, FIRST)
        told.more(key, "bcdxyz")
        await asyncio.sleep(0)
        assert told.commands[1:] == [FinishCompletion(key, 0, "cd")]
        told.more(key, "z")  # was under way
        told.delta(key + 1, TokenDelta([7], finish_reason="length"))
        deltas = [d for item in await reader for d in item]
        stopped = [d for d in deltas if d.index == 0]
        assert "".join(d.text for d in stopped) == "ab"
        assert [t for d in stopped for t in d.token_ids] == [0, 1, 2, 3]
        assert (stopped[-1].finish_reason, stopped[-1].stop_reason) == ("stop", "cd")
        assert [d.text for d in deltas if d.index == 1] == ["a", "h"]
        assert len(told.commands) == 2  # nothing is left to abort

    run(scenario)


@pytest.mark.parametrize(
    ("tell", "error"),
    [
        (lambda told, key: told.client.on_refusal(key, QueueFullError("full", 2.0)), QueueFullError),
        (lambda told, key: told.delta(key, TokenDelta([], finish_reason="error", error="x")), RequestFailedError),
        (lambda told, key: told.client.on_end("it is gone"), EngineStoppedError),
    ],
)
def test_endings(tell, error):
    async def scenario(told: Told) -> None:
        reader = asyncio.create_task(told.read())
        await asyncio.sleep(0)
        key = told.commands[0].key
        tell(told, key)
        with pytest.raises(error):
            await reader
        assert told.client.num_unfinished == 0

    run(scenario)


def test_after_the_end_nothing_is_accepted():
    async def scenario(told: Told) -> None:
        told.client.on_end("it is gone")
        with pytest.raises(EngineStoppedError, match="gone"):
            await told.read()
        assert told.commands == []

    run(scenario)


def test_a_reader_that_leaves_aborts():
    async def scenario(told: Told) -> None:
        reader = asyncio.create_task(told.read(n=2))
        await asyncio.sleep(0)
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
        key = told.commands[0].key
        assert told.commands[1:] == [AbortRequest(key)] and told.client.num_unfinished == 0
        told.more(key, "a")  # was under way

    run(scenario)
