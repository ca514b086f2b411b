"""Requests sent to a server by several processes, so that what is measured is the server and not who asks."""

import asyncio
import json
import multiprocessing
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from multiprocessing.synchronize import Barrier
from typing import Any

from scripts.bench.http import Client, HttpError
from scripts.bench.workload import Item

ROUTE = "/v1/completions"
HEAD_START = 0.2  # seconds for the requests to reach their processes


@dataclass(slots=True)
class Outcome:
    """One request. Times are seconds, from when it was due to be sent."""

    output_tokens: int = 0
    token_times: list[float] = field(default_factory=list)  # of each event that brought text or tokens
    end: float = 0.0
    error: str | None = None

    @property
    def time_to_first_token(self) -> float:
        return self.token_times[0]

    @property
    def time_per_output_token(self) -> float | None:
        """After the first; None of a single token."""
        return (self.end - self.token_times[0]) / (self.output_tokens - 1) if self.output_tokens > 1 else None

    @property
    def inter_token_times(self) -> list[float]:
        return [after - before for before, after in zip(self.token_times, self.token_times[1:], strict=False)]


@dataclass(frozen=True)
class Load:
    """Requests for one model of one server.

    arrivals: seconds from the beginning at which each of the items is due.
    concurrency: most requests under way; one that has to wait for another is due when that has ended.
    """

    url: str
    api_key: str | None
    model: str
    temperature: float
    items: Sequence[Item]
    arrivals: Sequence[float]
    concurrency: int | None = None

    def shares(self, count: int) -> list["Load"]:
        """Parts of about the same size, at most `count`, none of them without a request that may run."""
        count = min(count, len(self.items), self.concurrency or len(self.items))
        return [
            replace(
                self,
                items=self.items[i::count],
                arrivals=self.arrivals[i::count],
                concurrency=None if self.concurrency is None else len(range(i, self.concurrency, count)),
            )
            for i in range(count)
        ]


@dataclass(frozen=True)
class Sent:
    """What came of a load, or of one process's share of it.

    busy: the fraction of the time that the processes were computing; of several, the busiest one's.
    """

    outcomes: list[Outcome]
    seconds: float  # from the first arrival to the last answer
    busy: float
    processes: int = 1


class Senders:
    """Processes that send loads. The clock starts when all of them are there."""

    def __init__(self, count: int):
        context = multiprocessing.get_context("spawn")
        self.count = count
        self._pool = context.Pool(count, wait_for_all, (context.Barrier(count),))

    def send(self, load: Load) -> Sent:
        shares = load.shares(self.count)
        begin = self._pool.apply(time.monotonic) + HEAD_START
        parts = self._pool.starmap(send_share, [(share, begin) for share in shares], chunksize=1)
        outcomes = [outcome for part in parts for outcome in part.outcomes]
        return Sent(outcomes, max(part.seconds for part in parts), max(part.busy for part in parts), len(parts))

    def close(self) -> None:
        self._pool.terminate()


def wait_for_all(barrier: Barrier) -> None:
    barrier.wait(timeout=60)


def send_share(load: Load, begin: float) -> Sent:
    """Sends it all, `begin` being a moment of time.monotonic(), which all processes of a machine have in common."""
    return asyncio.run(send_all(load, begin))


async def send_all(load: Load, begin: float) -> Sent:
    client = Client(load.url, load.api_key)
    slots = nullcontext() if load.concurrency is None else asyncio.Semaphore(load.concurrency)

    async def send_at(body: bytes, due: float) -> Outcome:
        await asyncio.sleep(due - time.monotonic())
        async with slots:
            closed = load.concurrency is not None
            return await send(client, body, time.monotonic() if closed else due)

    bodies = [request_body(load.model, item, load.temperature) for item in load.items]  # before the clock starts
    await asyncio.sleep(begin - time.monotonic())
    busy_before = time.process_time()
    todo = [send_at(body, begin + at) for body, at in zip(bodies, load.arrivals, strict=True)]
    outcomes = list(await asyncio.gather(*todo))
    seconds = time.monotonic() - begin
    return Sent(outcomes, seconds, (time.process_time() - busy_before) / seconds)


def request_body(model: str, item: Item, temperature: float) -> bytes:
    body = {
        "model": model,
        "prompt": item.prompt,
        "max_tokens": item.output_len,
        "temperature": temperature,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return json.dumps(body).encode()


async def send(client: Client, body: bytes, due: float) -> Outcome:
    """One request, of request_body. What goes wrong with it is its outcome."""
    outcome = Outcome()
    try:
        async for data in client.events(ROUTE, body):
            now = time.monotonic() - due
            if b'"usage":null' in data:  # reading it would tell no more: every chunk but the last is such a one
                outcome.token_times.append(now)
            else:
                note_event(outcome, json.loads(data), now)
    except (HttpError, OSError, ValueError) as e:
        outcome.error = str(e)
    outcome.end = outcome.token_times[-1] if outcome.token_times else 0.0
    if outcome.error is None and not outcome.token_times:
        outcome.error = "no token came"
    return outcome


def note_event(outcome: Outcome, event: dict[str, Any], now: float) -> None:
    if "error" in event:
        outcome.error = str(event["error"])
    elif event.get("choices"):
        outcome.token_times.append(now)
    if usage := event.get("usage"):
        outcome.output_tokens = usage["completion_tokens"]
