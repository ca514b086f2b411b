"""python -m scripts.bench several: some of the other benchmarks over one engine, which is loaded once."""

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from paged.cli import parse_args
from paged.config import EngineConfig, option, require
from scripts.bench import latency, prefill, throughput
from scripts.bench.engine_runs import ENGINE_GROUPS, Bench, MeasureArgs
from scripts.bench.report import note

DESCRIPTION = """Runs several of latency, prefill and throughput over one engine, one after the other, each with its own
options of the workload: --run "latency --batch 1 64" "throughput"."""
KINDS: dict[str, tuple[type, Callable[[Bench, Any, int], None]]] = {
    "latency": (latency.LatencyArgs, latency.run),
    "prefill": (prefill.PrefillArgs, prefill.run),
    "throughput": (throughput.ThroughputArgs, throughput.run),
}


@dataclass(frozen=True, kw_only=True)
class SeveralArgs:
    _argument_group_name: ClassVar[str] = "workloads"

    run: tuple[str, ...] = option(("latency", "prefill", "throughput"), "benchmarks with their options, each in quotes")

    def __post_init__(self) -> None:
        for words in map(shlex.split, self.run):
            known = bool(words) and words[0] in KINDS
            require(known, "run", f"must begin with one of {', '.join(KINDS)}; {' '.join(words)!r} does not")


def main(argv: list[str]) -> None:
    groups = (SeveralArgs, MeasureArgs, *ENGINE_GROUPS)
    several, measure, model, cache, scheduler, runner = parse_args(
        "python -m scripts.bench several", DESCRIPTION, *groups, argv=argv
    )
    workloads = []
    for name, *words in map(shlex.split, several.run):
        group, run = KINDS[name]
        [args] = parse_args(f'--run "{name}"', "Options of the workload.", group, argv=words)
        workloads.append((run, args))
    bench = Bench(EngineConfig(model=model, cache=cache, scheduler=scheduler, runner=runner), measure)
    for text, (run, args) in zip(several.run, workloads, strict=True):
        note(f"== {text}")
        run(bench, args, measure.repeats)
