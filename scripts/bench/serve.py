"""python -m scripts.bench serve: a running server under requests that arrive whether or not it keeps up."""

import asyncio
import os
import time
from dataclasses import dataclass
from typing import Any, ClassVar

from paged.cli import parse_args
from paged.config import option, require
from paged.errors import InvalidRequestError
from scripts.bench.http import Client, HttpError
from scripts.bench.load import ROUTE, Load, Outcome, Senders, Sent, request_body, send
from scripts.bench.report import Report, note
from scripts.bench.workload import Item, fixed, nano, poisson_arrivals
from scripts.percentiles import percentiles

DESCRIPTION = """Sends streaming completions to a server of OpenAI's API and measures what a user would see: at given
rates, at random moments and without waiting for answers; or a fixed number at a time. Goodput is the rate of requests
that met every limit. Several processes send; 'client busy' is the processor load of the busiest."""
MOST_PROCESSES = 4  # unless asked for more; a quarter of the processors at most, as the server needs them too
TOO_BUSY = 0.8


@dataclass(frozen=True, kw_only=True)
class ServeArgs:
    _argument_group_name: ClassVar[str] = "load"

    url: str = option("http://127.0.0.1:8000", "the server")
    api_key: str | None = option(None, "sent as the bearer token; none: no key")
    model: str | None = option(None, "model to ask for; none: the first that the server lists")
    rate: tuple[float, ...] = option((1.0,), "requests a second, several values; inf: all at once")
    max_concurrency: int | None = option(None, "most requests under way at a time; none: no limit")
    processes: int | None = option(None, "processes that send; none: a quarter of the processors, 1 to 4")
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
        for name in ("num_prompts", "max_concurrency", "processes", "input_len", "output_len", "max_token_id"):
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

    def load(self, model: str, rate: float) -> Load:
        arrivals = poisson_arrivals(self.num_prompts, rate, self.seed)
        return Load(self.url, self.api_key, model, self.temperature, self.items, arrivals, self.max_concurrency)


def main(argv: list[str]) -> None:
    """
    Raises:
      InvalidRequestError: the URL is none, or there is no such server.
    """
    (args,) = parse_args("python -m scripts.bench serve", DESCRIPTION, ServeArgs, argv=argv)
    model = asyncio.run(find_model(args))
    report = Report("serve", {"server": {"url": args.url, "model": model}})
    senders = Senders(args.processes or min(MOST_PROCESSES, max(1, (os.cpu_count() or 1) // 4)))
    try:
        for rate in args.rate:
            sent = senders.send(args.load(model, rate))
            report.add(*summarize(sent, rate, args))
            for error in sorted({o.error for o in sent.outcomes if o.error})[:3]:
                note(f"  failed: {error}")
            if sent.busy > TOO_BUSY:
                note(f"  the client was {sent.busy:.0%} busy: it may be the limit, use more --processes")
    finally:
        senders.close()
    report.print_table()


async def find_model(args: ServeArgs) -> str:
    """The model to ask for, once it has answered a small request."""
    try:
        client = Client(args.url, args.api_key)
        model = args.model or (await client.get_json("/v1/models"))["data"][0]["id"]
    except (ValueError, OSError, HttpError) as e:
        raise InvalidRequestError(f"no answer from {args.url}: {e}", param="url") from None
    warm = await send(client, request_body(model, Item([1] * 8, 2), args.temperature), time.monotonic())
    if warm.error:
        raise InvalidRequestError(f"{args.url} does not serve {ROUTE}: {warm.error}", param="url")
    return model


def meets_limits(outcome: Outcome, args: ServeArgs) -> bool:
    """Whether it counts for goodput."""
    measured = (
        (args.ttft_limit_ms, outcome.time_to_first_token),
        (args.tpot_limit_ms, outcome.time_per_output_token),
        (args.e2e_limit_ms, outcome.end),
    )
    return all(limit is None or value is None or value * 1e3 <= limit for limit, value in measured)


def summarize(sent: Sent, rate: float, args: ServeArgs) -> tuple[dict[str, str], dict[str, Any]]:
    outcomes, seconds = sent.outcomes, sent.seconds
    ok = [outcome for outcome in outcomes if outcome.error is None]
    good = [outcome for outcome in ok if meets_limits(outcome, args)]
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
            "max_concurrency": args.max_concurrency,
            "num_prompts": len(outcomes),
            "input_len": args.input_len,
            "output_len": args.output_len,
            "temperature": args.temperature,
            "limits_ms": {"ttft": args.ttft_limit_ms, "tpot": args.tpot_limit_ms, "e2e": args.e2e_limit_ms},
        },
        "seconds": seconds,
        "client": {"processes": sent.processes, "busy": sent.busy},
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
    row["client busy"] = f"{sent.busy:.0%} of {sent.processes}"
    return row, measurement
