"""python -m scripts.bench serve: a running server under requests that arrive whether or not it keeps up."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from paged.cli import parse_args
from paged.config import option, require
from paged.errors import InvalidRequestError
from scripts.bench.http import Client, HttpError
from scripts.bench.report import Report, note
from scripts.bench.workload import Item, fixed, nano, poisson_arrivals
from scripts.percentiles import percentiles

DESCRIPTION = """Sends streaming completions to a server of OpenAI's API at given rates, at random moments and without
waiting for answers, and measures what a user would see. Goodput is the rate of requests that met every limit."""
ROUTE = "/v1/completions"


@dataclass(frozen=True, kw_only=True)
class ServeArgs:
    _argument_group_name: ClassVar[str] = "load"

    url: str = option("http://127.0.0.1:8000", "the server")
    api_key: str | None = option(None, "sent as the bearer token; none: no key")
    model: str | None = option(None, "model to ask for; none: the first that the server lists")
    rate: tuple[float, ...] = option((1.0,), "requests a second, several values; inf: all at once")
    num_prompts: int = option(64, "requests at each rate")
    input_len: int | None = option(None, "tokens in every prompt; none: 100 to 1024")
    output_len: int | None = option(None, "tokens generated for every prompt; none: 100 to 1024")
    max_token_id: int = option(10_000, "prompts are made of token ids up to this")
    temperature: float = option(0.6, "of the sampling; 0 is greedy")
    ttft_limit_ms: float | None = option(None, "goodput: time to the first token; none: no limit")
    tpot_limit_ms: float | None = option(None, "goodput: time for each token after the first; none: no limit")
    e2e_limit_ms: float | None = option(None, "goodput: time to the last token; none: no limit")
    seed: int = option(0, "of the prompts and arrivals")

    def __post_init__(self) -> None:
        require(min(self.rate) > 0, "rate", "must be positive")
        for name in ("num_prompts", "input_len", "output_len", "max_token_id"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, "must be at least 1")
        both = (self.input_len is None) == (self.output_len is None)
        require(both, "input_len", "and output_len are given together or not at all")
        for name in ("ttft_limit_ms", "tpot_limit_ms", "e2e_limit_ms"):
            value = getattr(self, name)
            require(value is None or value > 0, name, "must be positive")

    @property
    def items(self) -> list[Item]:
        if self.input_len is None or self.output_len is None:
            return nano(self.num_prompts, self.max_token_id, self.seed)
        return fixed(self.num_prompts, self.input_len, self.output_len, self.max_token_id, self.seed)


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

    def meets(self, args: ServeArgs) -> bool:
        """Whether it counts for goodput."""
        measured = (
            (args.ttft_limit_ms, self.time_to_first_token),
            (args.tpot_limit_ms, self.time_per_output_token),
            (args.e2e_limit_ms, self.end),
        )
        return all(limit is None or value is None or value * 1e3 <= limit for limit, value in measured)


def main(argv: list[str]) -> None:
    (args,) = parse_args("python -m scripts.bench serve", DESCRIPTION, ServeArgs, argv=argv)
    asyncio.run(measure(args))


async def measure(args: ServeArgs) -> None:
    """
    Raises:
      InvalidRequestError: the URL is none, or there is no such server.
    """
    try:
        client = Client(args.url, args.api_key)
        model = args.model or (await client.get_json("/v1/models"))["data"][0]["id"]
    except (ValueError, OSError, HttpError) as e:
        raise InvalidRequestError(f"no answer from {args.url}: {e}", param="url") from None
    report = Report("serve", {"server": {"url": args.url, "model": model}})
    warm = await send(client, model, Item([1] * 8, 2), args, time.perf_counter())
    if warm.error:
        raise InvalidRequestError(f"{args.url} does not serve {ROUTE}: {warm.error}", param="url")
    for rate in args.rate:
        outcomes, seconds = await run_at(client, model, rate, args)
        row, measurement = summarize(outcomes, seconds, rate, args)
        report.add(row, measurement)
        for error in sorted({o.error for o in outcomes if o.error})[:3]:
            note(f"  failed: {error}")
    report.print_table()


async def run_at(client: Client, model: str, rate: float, args: ServeArgs) -> tuple[list[Outcome], float]:
    """Every request at one rate, and the seconds from the first arrival to the last answer."""
    items = args.items
    begin = time.perf_counter()

    async def send_at(item: Item, at: float) -> Outcome:
        await asyncio.sleep(max(0.0, begin + at - time.perf_counter()))
        return await send(client, model, item, args, begin + at)

    arrivals = poisson_arrivals(len(items), rate, args.seed)
    outcomes = await asyncio.gather(*(send_at(item, at) for item, at in zip(items, arrivals, strict=True)))
    return outcomes, time.perf_counter() - begin


async def send(client: Client, model: str, item: Item, args: ServeArgs, due: float) -> Outcome:
    """One request. What goes wrong with it is its outcome."""
    outcome = Outcome()
    body = {
        "model": model,
        "prompt": item.prompt,
        "max_tokens": item.output_len,
        "temperature": args.temperature,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    try:
        async for event in client.events(ROUTE, body):
            now = time.perf_counter() - due
            if "error" in event:
                outcome.error = str(event["error"])
            elif event.get("choices"):
                outcome.token_times.append(now)
                outcome.end = now
            if usage := event.get("usage"):
                outcome.output_tokens = usage["completion_tokens"]
    except (HttpError, OSError) as e:
        outcome.error = str(e)
    if outcome.error is None and not outcome.token_times:
        outcome.error = "no token came"
    return outcome


def summarize(
    outcomes: Sequence[Outcome], seconds: float, rate: float, args: ServeArgs
) -> tuple[dict[str, str], dict[str, Any]]:
    ok = [outcome for outcome in outcomes if outcome.error is None]
    good = [outcome for outcome in ok if outcome.meets(args)]
    output_tokens = sum(outcome.output_tokens for outcome in ok)
    ms: dict[str, dict[str, float] | None] = {
        "ttft_ms": percentiles([o.time_to_first_token * 1e3 for o in ok]),
        "tpot_ms": percentiles([o.time_per_output_token * 1e3 for o in ok if o.time_per_output_token is not None]),
        "itl_ms": percentiles([t * 1e3 for o in ok for t in o.inter_token_times]),
        "e2e_ms": percentiles([o.end * 1e3 for o in ok]),
    }
    measurement = {
        "workload": {
            "rate": "inf" if rate == float("inf") else rate,
            "num_prompts": len(outcomes),
            "input_len": args.input_len,
            "output_len": args.output_len,
            "temperature": args.temperature,
            "limits_ms": {"ttft": args.ttft_limit_ms, "tpot": args.tpot_limit_ms, "e2e": args.e2e_limit_ms},
        },
        "seconds": seconds,
        "requests": {"ok": len(ok), "failed": len(outcomes) - len(ok), "good": len(good)},
        "requests_per_second": len(ok) / seconds,
        "goodput_requests_per_second": len(good) / seconds,
        "output_tokens_per_second": output_tokens / seconds,
        **ms,
    }
    row = {
        "req/s": f"{rate:g}",
        "ok": str(len(ok)),
        "failed": str(len(outcomes) - len(ok)),
        "out tok/s": f"{output_tokens / seconds:,.1f}",
        "goodput req/s": f"{len(good) / seconds:.2f}",
    }
    for name, values in ms.items():
        short = name.removesuffix("_ms").upper()
        row[f"{short} P50/P99 ms"] = f"{values['p50']:,.1f}/{values['p99']:,.1f}" if values else "-"
    return row, measurement
