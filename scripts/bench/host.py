"""python -m scripts.bench host: what a step costs the processor, beside the device."""

import asyncio
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar, Literal

import paged.engine
from paged.async_engine import publish
from paged.cli import parse_args
from paged.config import EngineConfig, option, require
from paged.engine import Engine
from paged.engine_client import AddRequest, Command, EngineClient
from paged.errors import InvalidRequestError
from paged.outputs import StepOutput
from paged.sampling_params import SamplingParams
from scripts.bench.engine_runs import ENGINE_GROUPS
from scripts.bench.instant_device import StepSeconds, instant_parts
from scripts.bench.report import Report, machine, note, repeated
from scripts.bench.workload import fixed

DESCRIPTION = """Times the parts of a decode step on the host: in the engine's thread, and at the front end that makes
text of the tokens. With --device instant nothing is loaded but the tokenizer, and no step has to be waited for."""
ENGINE_PARTS = ("schedule", "pack", "dispatch", "wait", "outputs", "publish")
FRONT_PARTS = ("receive", "text")


@dataclass(frozen=True, kw_only=True)
class HostArgs:
    _argument_group_name: ClassVar[str] = "workload"

    batch: int = option(256, "sequences in a step")
    input_len: int = option(128, "tokens of every prompt")
    steps: int = option(300, "steps under the clock")
    temperature: float = option(0.6, "of the sampling; 0 is greedy")
    device: Literal["instant", "real"] = option("instant", "instant: random tokens, none computed")
    step_ms: float = option(0.0, "time that a step of the instant device takes")
    timeline: str | None = option(None, "file for a picture of some steps (PNG, SVG); none: no picture")

    def __post_init__(self) -> None:
        for name in ("batch", "input_len", "steps"):
            require(getattr(self, name) >= 1, name, "must be at least 1")
        require(self.step_ms >= 0, "step_ms", "must not be negative")
        require(not self.step_ms or self.device == "instant", "step_ms", "is for --device instant")


@dataclass(frozen=True)
class Span:
    part: str
    begin: float  # seconds, time.perf_counter()
    end: float


@dataclass
class Clock:
    """Notes when the parts of a step begin and end."""

    spans: list[Span] = field(default_factory=list)

    def time(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.spans.append(Span(part, begin, time.perf_counter()))

        return timed


class OneThread:
    """An engine, and a client with a reader for each request, all in one thread: parts run one after the other."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.client = EngineClient(engine.info, self._submit)
        self.delivered: list[StepOutput] = []

    def _submit(self, command: Command) -> None:
        if isinstance(command, AddRequest):
            tags = [(self, command.key + index) for index in range(command.params.n)]
            self.engine.add_request(str(command.key), command.prompt, command.params, tags=tags)
        else:
            self.engine.abort(str(command.key))

    def deliver(self, outputs: list[StepOutput]) -> None:
        self.delivered = outputs

    def refuse(self, key: int, error: Exception) -> None:
        raise error

    def end(self, reason: str) -> None:
        raise RuntimeError(reason)


def main(argv: list[str]) -> None:
    args, model, cache, scheduler, runner = parse_args(
        "python -m scripts.bench host", DESCRIPTION, HostArgs, *ENGINE_GROUPS, argv=argv
    )
    config = EngineConfig(model=model, cache=cache, scheduler=scheduler, runner=runner)
    parts = instant_parts(config, StepSeconds(args.step_ms / 1e3)) if args.device == "instant" else None
    engine = Engine(config, parts=parts)
    room = engine.max_model_len - args.input_len - args.steps - 16
    require(room >= 0, "steps", f"and input_len need {-room} tokens more than --max-model-len {engine.max_model_len}")
    require(args.batch <= engine.scheduler.max_num_seqs, "batch", "exceeds --max-num-seqs")
    steps = asyncio.run(measure(OneThread(engine), args))
    engine.close()
    report(steps, args, model.model)
    if args.timeline:
        draw(steps, args)
        note(f"wrote {args.timeline}")


async def measure(bench: OneThread, args: HostArgs) -> list[list[Span]]:
    """The spans of each step."""
    engine, clock = bench.engine, Clock()
    length = args.steps + 16
    params = SamplingParams(max_tokens=length, temperature=args.temperature, ignore_eos=True)

    async def read(prompt: list[int]) -> None:
        async for _ in bench.client.generate(prompt, params, "bench"):
            pass

    items = fixed(args.batch, args.input_len, length, engine.vocab_size - 1)
    readers = [asyncio.create_task(read(item.prompt)) for item in items]
    await asyncio.sleep(0)
    while engine.scheduler.num_waiting:
        await step(bench, publish, Clock())
    for _ in range(4):
        await step(bench, publish, Clock())
    instrument(engine, clock)
    steps = []
    for _ in range(args.steps):
        clock.spans = []
        await step(bench, clock.time("publish", publish), clock)
        steps.append(clock.spans)
    clock.spans = []  # what follows is of no step
    for reader in readers:
        reader.cancel()
    await asyncio.gather(*readers, return_exceptions=True)
    while engine.has_unfinished_requests():
        engine.step_outputs()
    return steps


async def step(bench: OneThread, publish: Callable[[list[StepOutput]], None], clock: Clock) -> None:
    """One step of the engine, and all that its readers do with it."""
    publish(bench.engine.step_outputs())
    clock.time("receive", bench.client.on_outputs)(bench.delivered)
    bench.delivered = []
    begin = time.perf_counter()
    await asyncio.sleep(0)  # each reader runs once
    clock.spans.append(Span("text", begin, time.perf_counter()))


def instrument(engine: Any, clock: Clock) -> None:
    engine.scheduler.schedule = clock.time("schedule", engine.scheduler.schedule)
    engine.runner.pack = clock.time("pack", engine.runner.pack)
    engine.runner.execute = clock.time("dispatch", engine.runner.execute)
    engine._append = clock.time("outputs", engine._append)
    paged.engine.to_host = clock.time("wait", paged.engine.to_host)


def report(steps: list[list[Span]], args: HostArgs, model: str) -> None:
    micros: dict[str, list[float]] = defaultdict(list)
    for spans in steps:
        sums: dict[str, float] = defaultdict(float)
        for span in spans:
            sums[span.part] += (span.end - span.begin) * 1e6
        begin, published = spans[0].begin, next(s.end for s in spans if s.part == "publish")
        sums["engine"] = (published - begin) * 1e6 - sums["wait"]
        for part in (*ENGINE_PARTS, "engine", *FRONT_PARTS):
            micros[part].append(sums[part])
    lines = Report("host", {"machine": machine(), "engine": {"model": model, "device": args.device}})
    row = {name: spread(values) for name, values in micros.items()}
    workload = {"batch": args.batch, "input_len": args.input_len, "steps": args.steps, "step_ms": args.step_ms}
    lines.add(row, {"workload": workload, "microseconds": {name: summary(v) for name, v in micros.items()}})
    note(
        f"\nMicroseconds a step of {args.batch} sequences, the median and (10th to 90th percentile). In the engine's "
        f"thread:\n{', '.join(ENGINE_PARTS)}; `engine` is all of it without the wait. At the front end: "
        f"{', '.join(FRONT_PARTS)}\n(stop strings and text, and the wake-up of each reader)."
    )


def spread(values: list[float]) -> str:
    tenths = statistics.quantiles(values, n=10)
    return f"{statistics.median(values):.0f} ({tenths[0]:.0f} to {tenths[-1]:.0f})"


def summary(values: list[float]) -> dict[str, Any]:
    tenths = statistics.quantiles(values, n=10)
    return {k: v for k, v in repeated(values).items() if k != "values"} | {"p10": tenths[0], "p90": tenths[-1]}


def draw(steps: list[list[Span]], args: HostArgs) -> None:
    """Above, three steps; below, the host's part of the second. A step of the device ends where the wait for it does,
    and the next begins there, as it was queued before."""
    try:
        import matplotlib
    except ImportError as e:
        raise InvalidRequestError("the picture needs matplotlib: install it", param="timeline") from e
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    colors = dict(zip((*ENGINE_PARTS, *FRONT_PARTS, "device"), plt.get_cmap("tab10").colors, strict=False))
    colors |= {"wait": (0.9, 0.9, 0.9), "device": (0.6, 0.6, 0.6), "text": (0.1, 0.7, 0.8)}
    middle = sorted(range(1, len(steps) - 2), key=lambda i: steps[i][-1].end - steps[i][0].begin)[len(steps) // 2] - 1
    ends = [next(s.end for s in spans if s.part == "wait") for spans in steps[middle - 1 : middle + 3]]
    device = [Span("device", begin, end) for begin, end in pairwise(ends)]
    shown = [span for spans in steps[middle : middle + 3] for span in spans]
    near = [span for span in steps[middle + 1] if span.part != "wait"]
    published = next(s.end for s in near if s.part == "publish")
    waited = next(s for s in steps[middle + 1] if s.part == "wait")
    cut = waited.end - waited.begin  # the lower picture leaves the wait out
    moved = [Span(s.part, s.begin - cut, s.end - cut) if s.begin >= waited.end else s for s in near]
    figure, (above, below) = plt.subplots(2, 1, figsize=(9, 4.2), layout="constrained")
    origin = steps[middle][0].begin
    for axis, spans, zero, unit in ((above, [*device, *shown], origin, 1e3), (below, moved, near[0].begin, 1e6)):
        for span in spans:
            lane = 2 if span.part == "device" else 1 if span.part in ENGINE_PARTS else 0
            left, width = (span.begin - zero) * unit, (span.end - span.begin) * unit
            axis.barh(lane, width, left=left, color=colors[span.part], edgecolor="white", linewidth=0.4, height=0.7)
        axis.set_yticks([0, 1, 2] if axis is above else [0, 1])
        axis.set_yticklabels(["front end", "engine's thread", "device"][: 3 if axis is above else 2])
    above.set_xlabel("milliseconds")
    host = (published - near[0].begin - cut) * 1e6
    below.set_xlabel(f"microseconds of the host's work for one step; the engine's thread: {host:.0f}")
    patches = {part: plt.Rectangle((0, 0), 1, 1, color=color) for part, color in colors.items() if part != "device"}
    place = {"loc": "outside upper center", "ncols": len(patches), "fontsize": "small", "frameon": False}
    figure.legend(patches.values(), patches.keys(), **place)
    figure.savefig(args.timeline or "", dpi=110)
