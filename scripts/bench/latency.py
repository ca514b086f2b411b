"""python -m scripts.bench latency: one decode step, by batch and context."""

import time
from dataclasses import dataclass, replace
from typing import ClassVar

from paged.cli import parse_args
from paged.config import EngineConfig, option, require
from paged.errors import InvalidRequestError
from scripts.bench.engine_runs import ENGINE_GROUPS, Bench, MeasureArgs
from scripts.bench.report import Report, against_floor, repeated
from scripts.bench.workload import fixed

DESCRIPTION = "Times decode steps: a number of sequences that all have the same length and get a token each."
SETTLE = 4  # decode steps between the last prompt and the clock


@dataclass(frozen=True, kw_only=True)
class LatencyArgs:
    _argument_group_name: ClassVar[str] = "workload"

    batch: tuple[int, ...] = option((1, 4, 16), "sequences in a step, several values")
    context: tuple[int, ...] = option((128, 1024), "tokens of each sequence, about; several values")
    steps: int = option(32, "decode steps under the clock, for one figure")
    temperature: float = option(0.0, "of the sampling; 0 is greedy")
    top_k: int = option(0, "of the sampling; 0 is all")
    top_p: float = option(1.0, "of the sampling")

    def __post_init__(self) -> None:
        for name in ("batch", "context"):
            require(min(getattr(self, name)) >= 1, name, "must be at least 1")
        require(self.steps >= 1, "steps", "must be at least 1")

    def longest(self, tokens_a_step: int) -> int:
        """Tokens of the longest sequence: the first ones decode while the prompts of the last are computed."""
        batch, context = max(self.batch), max(self.context)
        prompt_steps = -(-batch * context // max(1, tokens_a_step - batch))
        return context + prompt_steps + SETTLE + self.steps + 2


def main(argv: list[str]) -> None:
    groups = (LatencyArgs, MeasureArgs, *ENGINE_GROUPS)
    args, measure, model, cache, scheduler, runner = parse_args(
        "python -m scripts.bench latency", DESCRIPTION, *groups, argv=argv
    )
    tokens_a_step = scheduler.max_num_batched_tokens or max(512, 8 * max(args.batch))
    longest = args.longest(tokens_a_step)
    model = replace(model, max_model_len=model.max_model_len or longest)
    max_num_seqs = scheduler.max_num_seqs or max(args.batch)
    scheduler = replace(scheduler, max_num_seqs=max_num_seqs, max_num_batched_tokens=tokens_a_step)
    bench = Bench(EngineConfig(model=model, cache=cache, scheduler=scheduler, runner=runner), measure)
    run(bench, args, measure.repeats)


def run(bench: Bench, args: LatencyArgs, repeats: int) -> None:
    longest = args.longest(bench.tokens_a_step)
    check_fits(bench, max(args.batch), longest)
    report = Report("latency", bench.about)
    bench.warm_up()
    for context in args.context:
        for batch in args.batch:
            timings = [time_decode(bench, batch, context, longest, args) for _ in range(repeats)]
            seconds = repeated([seconds for seconds, _ in timings])
            average = round(sum(length for _, length in timings) / repeats)
            floor = bench.ceilings.seconds(*bench.cost.decode([average] * batch))
            roofline = against_floor(floor, seconds["median"], bench.ceilings)
            sampling = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
            workload = {"batch": batch, "context": average, "steps": args.steps, **sampling}
            rate = batch / seconds["median"]
            report.add(
                {
                    "context": f"{average:,}",
                    "batch": f"{batch:,}",
                    "ms/step": f"{seconds['median'] * 1e3:.2f}",
                    "min": f"{seconds['min'] * 1e3:.2f}",
                    "max": f"{seconds['max'] * 1e3:.2f}",
                    "tok/s": f"{rate:,.1f}",
                    "floor ms": f"{floor * 1e3:.2f}",
                    "of roofline": f"{roofline['fraction']:.1%}",
                },
                {
                    "workload": workload,
                    "seconds_per_step": seconds,
                    "output_tokens_per_second": rate,
                    "roofline": roofline,
                },
            )
    report.print_table()


def check_fits(bench: Bench, batch: int, length: int) -> None:
    """
    Raises:
      InvalidRequestError: the largest batch cannot run at once, so its steps would not be what they are called.
    """
    if batch > bench.max_num_seqs:
        raise InvalidRequestError(f"batch {batch} exceeds --max-num-seqs {bench.max_num_seqs}", param="batch")
    if length > bench.engine.max_model_len:
        raise InvalidRequestError(f"these steps need --max-model-len {length}", param="max_model_len")
    block_size = bench.engine.runner.shape.block_size
    need = batch * -(-length // block_size) * block_size
    if need > bench.capacity:
        raise InvalidRequestError(
            f"batch {batch} of {length:,} tokens each needs a KV cache of {need:,} tokens, and it holds "
            f"{bench.capacity:,}: ask for less, or raise --gpu-memory-utilization or --kv-cache-memory-bytes",
            param="batch",
        )


def time_decode(bench: Bench, batch: int, context: int, longest: int, args: LatencyArgs) -> tuple[float, float]:
    """Seconds of a step with `batch` sequences, over `args.steps` of them, and the sequences' average length then."""
    engine = bench.engine
    items = fixed(batch, context, longest - context, bench.max_token_id)
    ids = bench.add(items, args.temperature, args.top_k, args.top_p)
    made = dict.fromkeys(ids, 0)

    def step_until(tokens: int) -> float:
        """Runs until each sequence has this many output tokens; returns the time."""
        while min(made.values()) < tokens:
            for delta in engine.step():
                made[delta.request_id] += len(delta.token_ids)
        return time.perf_counter()

    begin = step_until(SETTLE)
    start, length = min(made.values()), context + sum(made.values()) / batch
    end = step_until(start + args.steps)
    steps = min(made.values()) - start
    for id in ids:
        engine.abort(id)
    while engine.has_unfinished_requests():
        engine.step()
    return (end - begin) / steps, length + steps / 2
