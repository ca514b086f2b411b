"""The batch run: a bounded number of lines in flight, results written as they finish."""

import asyncio
import logging
import sqlite3
import time
from array import array
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from tqdm import tqdm

from paged.async_engine import AsyncEngine
from paged.chat import render_chat
from paged.errors import EngineStoppedError, InvalidRequestError, QueueFullError, RequestFailedError
from paged.sampling_params import SamplingParams
from scripts.batch.answers import Answer, failed_result, openai_result, plain_result
from scripts.batch.lines import Job, Line, explicit_id, parse_job, parse_json
from scripts.batch.results import ResultFile
from scripts.percentiles import percentiles

logger = logging.getLogger(__name__)
RETRIES_AFTER_FAILED_STEP = 1  # the step may have failed because of another request in it


@dataclass
class Summary:
    """What this run did. Times are seconds, from the moment that a request was given to the engine."""

    num_before: int = 0  # results that were there already
    num_ok: int = 0
    num_failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    latencies: array = field(default_factory=lambda: array("d"))
    first_token_times: array = field(default_factory=lambda: array("d"))

    def as_dict(self) -> dict[str, Any]:
        return {
            "requests": {"ok": self.num_ok, "failed": self.num_failed, "done_before": self.num_before},
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "seconds": self.seconds,
            "completion_tokens_per_second": self.completion_tokens / self.seconds if self.seconds else 0.0,
            "latency_seconds": percentiles(self.latencies),
            "time_to_first_token_seconds": percentiles(self.first_token_times),
        }


class UniqueIds:
    """Where each id was first seen, in a temporary database: it may hold more than memory does."""

    def __init__(self) -> None:
        self._db = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self._db.execute("PRAGMA journal_mode = OFF")
        self._db.execute("CREATE TABLE ids (id TEXT PRIMARY KEY, line INTEGER) WITHOUT ROWID")

    def claim(self, id: str | int, line: int) -> int:
        """The first line that has this id: `line` itself, if it is new."""
        key = ascii(id)
        self._db.execute("INSERT OR IGNORE INTO ids VALUES (?, ?)", (key, line))
        return self._db.execute("SELECT line FROM ids WHERE id = ?", (key,)).fetchone()[0]

    def close(self) -> None:
        self._db.close()


@dataclass(frozen=True, slots=True)
class Task:
    """A line to answer: its JSON, or why it has none or cannot be answered."""

    line: Line
    value: dict[str, Any] | None
    id: str | int
    error: InvalidRequestError | None


def tasks(lines: Iterator[Line], results: ResultFile, ids: UniqueIds) -> Iterator[Task]:
    """The lines without a result. Every line is looked at, so an id that is used twice is found after a restart."""
    for line in lines:
        value, id, error = None, None, None
        try:
            value = parse_json(line)
            id = explicit_id(value)
            first = line.number if id is None else ids.claim(id, line.number)
            if first != line.number:
                raise InvalidRequestError(f"the id {id!r} is that of line {first} already", param="custom_id")
        except InvalidRequestError as e:
            error = e
        if not results.has(line.number, line.digest):
            yield Task(line, value, line.number if id is None else id, error)


class BatchRun:
    """Answers lines through the engine. One instance is one run.

    Args:
      window: most lines in flight.
      model_names: what a line's `model` may say; the first is what results say.
    """

    def __init__(self, engine: AsyncEngine, results: ResultFile, window: int, model_names: tuple[str, ...], bar: tqdm):
        self.engine, self.results, self.window, self.bar = engine, results, window, bar
        self.model_names = model_names
        self.summary = Summary(num_before=results.num_done)
        known = {f.name for f in fields(SamplingParams)}
        self._defaults = {k: v for k, v in engine.default_sampling_params.items() if k in known}

    async def run(self, todo: Iterator[Task]) -> Summary:
        """Ends when every task has a result.

        Raises:
          EngineStoppedError, OSError, RunError: the run cannot go on; what is written is whole.
        """
        begin = time.monotonic()
        slots = asyncio.Semaphore(self.window)

        async def answer_and_write(task: Task) -> None:
            try:
                record = await self._answer(task)
                self.results.write(task.line.number, task.line.digest, record)
                self._show_progress(begin)
            finally:
                slots.release()

        try:
            async with asyncio.TaskGroup() as group:
                async for task in in_thread(todo):
                    await slots.acquire()
                    group.create_task(answer_and_write(task))
        except BaseExceptionGroup as errors:
            raise first_cause(errors) from None
        finally:
            self.summary.seconds = time.monotonic() - begin
        return self.summary

    async def _answer(self, task: Task) -> dict[str, Any]:
        """The result of a line. Whatever is wrong with the line is in the result."""
        request_id = f"{task.line.number}-{task.line.digest}"
        try:
            if task.error is not None:
                raise task.error
            assert task.value is not None
            job = parse_job(task.value, task.line.number, self.model_names)
            answers = await self._generate(job, request_id)
        except InvalidRequestError as e:
            error = {
                "message": str(e),
                "param": e.param,
                "code": "invalid_json" if task.value is None else "invalid_value",
            }
        except RequestFailedError as e:
            error = {"message": str(e), "param": None, "code": "request_failed"}
        except EngineStoppedError:
            raise
        except Exception as e:
            logger.exception("line %d failed for a reason that nobody foresaw", task.line.number)
            error = {"message": f"{type(e).__name__}: {e}", "param": None, "code": "internal_error"}
        else:
            self.summary.num_ok += 1
            if job.url is not None:
                return openai_result(job, request_id, self.model_names[0], answers)
            has_text = self.engine.tokenizer is not None and job.sampling.get("detokenize", True)
            return plain_result(job, answers[0], has_text)
        self.summary.num_failed += 1
        return failed_result(task.value, task.id, request_id, error)

    async def _generate(self, job: Job, request_id: str) -> list[Answer]:
        params = SamplingParams(**self._defaults | {"max_tokens": None if job.messages else 16} | job.sampling)
        prompts = encode(self.engine.tokenizer, job)
        try:
            async with asyncio.TaskGroup() as group:
                parts = [
                    group.create_task(self._generate_one(job, prompt, params, f"{request_id}-{i}"))
                    for i, prompt in enumerate(prompts)
                ]
        except BaseExceptionGroup as errors:
            raise first_cause(errors) from None
        return [part.result() for part in parts]

    async def _generate_one(self, job: Job, prompt: list[int], params: SamplingParams, request_id: str) -> Answer:
        begin = time.monotonic()
        failures = 0
        while True:
            try:
                answer, first_token_time = await self._stream(job, prompt, params, f"{request_id}-{failures}")
            except QueueFullError as e:
                await asyncio.sleep(min(e.retry_after, 1.0))
            except RequestFailedError:
                failures += 1
                if failures > RETRIES_AFTER_FAILED_STEP:
                    raise
            else:
                break
        self.summary.latencies.append(time.monotonic() - begin)
        self.summary.first_token_times.append(first_token_time - begin)
        self.summary.prompt_tokens += len(prompt)
        self.summary.completion_tokens += answer.completion_tokens
        return answer

    async def _stream(
        self, job: Job, prompt: list[int], params: SamplingParams, request_id: str
    ) -> tuple[Answer, float]:
        answer, first_token_time = Answer.empty(len(prompt), params.n), 0.0
        options = {name: job.options[name] for name in ("priority", "cache_salt") if name in job.options}
        async for deltas in self.engine.generate(prompt, params, request_id, **options):
            first_token_time = first_token_time or time.monotonic()
            for delta in deltas:
                answer.add(delta)
        return answer, first_token_time

    def _show_progress(self, begin: float) -> None:
        rate = self.summary.completion_tokens / max(time.monotonic() - begin, 1e-9)
        self.bar.set_postfix({"tok/s": f"{rate:.0f}", "failed": self.summary.num_failed}, refresh=False)
        self.bar.update()


def encode(tokenizer: Any, job: Job) -> list[list[int]]:
    """The token ids of a job's prompts.

    Raises:
      InvalidRequestError: there is no tokenizer and the job is text, or the chat template refuses the messages.
    """
    if tokenizer is None and (job.messages or any(isinstance(p, str) for p in job.prompts)):
        raise InvalidRequestError("this model has no tokenizer: give `prompt` as a list of token ids", param="prompt")
    if job.messages is not None:
        names = ("add_generation_prompt", "continue_final_message", "chat_template_kwargs")
        given = {name: job.options[name] for name in names if name in job.options}
        return [render_chat(tokenizer, job.messages, **given)]
    special = job.options.get("add_special_tokens", True)
    return [tokenizer.encode(p, add_special_tokens=special) if isinstance(p, str) else p for p in job.prompts]


async def in_thread(iterator: Iterator[Task]) -> AsyncIterator[Task]:
    """The items of an iterator that may block: reading must not hold up the writing of results."""
    while (task := await asyncio.to_thread(next, iterator, None)) is not None:
        yield task


def first_cause(errors: BaseExceptionGroup) -> BaseException:
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
