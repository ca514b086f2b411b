"""python -m scripts.bench throughput: a whole offline workload."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from paged.cli import parse_args
from paged.config import EngineConfig, option, require
from scripts.bench.engine_runs import ENGINE_GROUPS, Bench, MeasureArgs
from scripts.bench.report import Report, against_floor, repeated
from scripts.bench.roofline import ideal_seconds
from scripts.bench.workload import Item, fixed, nano

DESCRIPTION = """Runs a workload from start to end and counts tokens a second. Without lengths it is nano-vLLM's:
prompts and outputs of 100 to 1,024 random tokens."""


@dataclass(frozen=True, kw_only=True)
class ThroughputArgs:
    _argument_group_name: ClassVar[str] = "workload"

    num_prompts: int = option(256, "requests, all there at the start")
    input_len: int | None = option(None, "tokens in every prompt; none: nano's lengths")
    output_len: int | None = option(None, "tokens generated for every prompt; none: nano's lengths")
    temperature: float = option(0.6, "of the sampling; 0 is greedy")

    def __post_init__(self) -> None:
        require(self.num_prompts >= 1, "num_prompts", "must be at least 1")
        require(
            (self.input_len is None) == (self.output_len is None),
            "input_len",
            "and output_len are given together or not",
        )
        for name in ("input_len", "output_len"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, "must be at least 1")

    def items(self, max_token_id: int) -> list[Item]:
        if self.input_len is None or self.output_len is None:
            return nano(self.num_prompts, max_token_id)
        return fixed(self.num_prompts, self.input_len, self.output_len, max_token_id)

    @property
    def longest(self) -> int:
        return 4096 if self.input_len is None or self.output_len is None else self.input_len + self.output_len


def main(argv: list[str]) -> None:
    groups = (ThroughputArgs, MeasureArgs, *ENGINE_GROUPS)
    args, measure, model, cache, scheduler, runner = parse_args(
        "python -m scripts.bench throughput", DESCRIPTION, *groups, argv=argv
    )
    if model.max_model_len is None:
        model = replace(model, max_model_len=args.longest)
    bench = Bench(EngineConfig(model=model, cache=cache, scheduler=scheduler, runner=runner), measure)
    run(bench, args, measure.repeats)


def run(bench: Bench, args: ThroughputArgs, repeats: int) -> None:
    report = Report("throughput", bench.about)
    items = args.items(bench.max_token_id)
    bench.warm_up()
    runs = [bench.run(items, args.temperature) for _ in range(repeats)]
    seconds = repeated([run.seconds for run in runs])
    floor = ideal_seconds(items, bench.cost, bench.ceilings, bench.max_num_seqs, bench.tokens_a_step)
    roofline = against_floor(floor, seconds["median"], bench.ceilings)
    rates = repeated([run.output_tokens / run.seconds for run in runs])
    last = runs[-1]
    measurement: dict[str, Any] = {
        "workload": {
            "name": "nano" if args.input_len is None else "fixed",
            "num_prompts": args.num_prompts,
            "prompt_tokens": last.prompt_tokens,
            "output_tokens": last.output_tokens,
            "temperature": args.temperature,
        },
        "seconds": seconds,
        "output_tokens_per_second": rates,
        "total_tokens_per_second": repeated([(run.prompt_tokens + run.output_tokens) / run.seconds for run in runs]),
        "steps": last.steps,
        "kv_slots_wasted": last.cache_waste,
        "roofline": roofline,
    }
    row = {
        "prompts": f"{args.num_prompts:,}",
        "tokens in": f"{last.prompt_tokens:,}",
        "out": f"{last.output_tokens:,}",
        "seconds": f"{seconds['median']:.2f} ({seconds['min']:.2f} to {seconds['max']:.2f})",
        "out tok/s": f"{rates['median']:,.1f}",
        "of roofline": f"{roofline['fraction']:.1%}",
        "KV slots wasted": f"{last.cache_waste:.2%}",
    }
    report.add(row, measurement)
