"""python -m scripts.bench prefill: computing prompts."""

from dataclasses import dataclass, replace
from typing import ClassVar

from paged.cli import parse_args
from paged.config import EngineConfig, option, require
from scripts.bench.engine_runs import ENGINE_GROUPS, Bench, MeasureArgs
from scripts.bench.report import Report, against_floor, repeated
from scripts.bench.workload import fixed

DESCRIPTION = "Times prompts from their arrival, all at once, to the first token of the last of them."


@dataclass(frozen=True, kw_only=True)
class PrefillArgs:
    _argument_group_name: ClassVar[str] = "workload"

    num_prompts: tuple[int, ...] = option((1, 16), "prompts at once, several values")
    input_len: tuple[int, ...] = option((128, 512), "tokens of each prompt, several values")

    def __post_init__(self) -> None:
        for name in ("num_prompts", "input_len"):
            require(min(getattr(self, name)) >= 1, name, "must be at least 1")


def main(argv: list[str]) -> None:
    groups = (PrefillArgs, MeasureArgs, *ENGINE_GROUPS)
    args, measure, model, cache, scheduler, runner = parse_args(
        "python -m scripts.bench prefill", DESCRIPTION, *groups, argv=argv
    )
    if model.max_model_len is None:
        model = replace(model, max_model_len=max(args.input_len) + 1)
    bench = Bench(EngineConfig(model=model, cache=cache, scheduler=scheduler, runner=runner), measure)
    run(bench, args, measure.repeats)


def run(bench: Bench, args: PrefillArgs, repeats: int) -> None:
    report = Report("prefill", bench.about)
    bench.warm_up()
    for input_len in args.input_len:
        for num_prompts in args.num_prompts:
            items = fixed(num_prompts, input_len, 1, bench.max_token_id)
            seconds = repeated([bench.run(items, 0.0).seconds for _ in range(repeats)])
            cost = bench.cost.prefill([input_len] * num_prompts, bench.tokens_a_step)
            floor = bench.ceilings.seconds(*cost)
            roofline = against_floor(floor, seconds["median"], bench.ceilings)
            rate = num_prompts * input_len / seconds["median"]
            report.add(
                {
                    "prompts": f"{num_prompts:,}",
                    "length": f"{input_len:,}",
                    "ms": f"{seconds['median'] * 1e3:.1f}",
                    "min": f"{seconds['min'] * 1e3:.1f}",
                    "max": f"{seconds['max'] * 1e3:.1f}",
                    "tok/s": f"{rate:,.0f}",
                    "floor ms": f"{floor * 1e3:.1f}",
                    "of roofline": f"{roofline['fraction']:.1%}",
                },
                {
                    "workload": {"num_prompts": num_prompts, "input_len": input_len},
                    "seconds": seconds,
                    "prompt_tokens_per_second": rate,
                    "roofline": roofline,
                },
            )
    report.print_table()
