"""python -m scripts.batch in.jsonl out.jsonl: answers every line of a file of prompts."""

import asyncio
import gc
import json
import logging
import sys
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, ClassVar

from tqdm import tqdm

from paged.cli import parse_args
from paged.config import CacheArgs, EngineConfig, ModelArgs, RunnerArgs, SchedulerArgs, option, require
from paged.errors import EngineStoppedError, InvalidRequestError
from scripts.batch.lines import read_lines
from scripts.batch.results import ResultFile, RunError

DESCRIPTION = """Answers every line of INPUT with one line of OUTPUT, in the order they finish. A line is a request of
OpenAI's batch form (custom_id, method, url, body), or {"prompt": ...} or {"messages": ...} with sampling fields and
perhaps an id. A line that cannot be answered gets an error, and the run goes on (exit status 0). A run that was
stopped, even killed, goes on where it was when it is started again."""


@dataclass(frozen=True, kw_only=True)
class BatchArgs:
    _argument_group_name: ClassVar[str] = "batch"

    input: str = field(metadata={"positional": True, "help": "JSONL file of requests; - is standard input"})
    output: str = field(metadata={"positional": True, "help": "JSONL file of results; what it has is not done again"})
    summary: str | None = option(None, "file for the summary as JSON; none: only the table on stderr")
    progress: bool = option(True, "a progress bar on stderr")

    def __post_init__(self) -> None:
        require(self.output != "-", "output", "must be a file, to go on from after a stop")
        if self.input != "-":
            require(Path(self.input).is_file(), "input", f"must be a file; there is none at {self.input}")
            same = Path(self.output).exists() and Path(self.input).samefile(self.output)
            require(not same, "output", "must be another file than the input")


def main(argv: list[str] | None = None) -> int:
    groups = (BatchArgs, ModelArgs, CacheArgs, SchedulerArgs, RunnerArgs)
    args, model, cache, scheduler, runner = parse_args("python -m scripts.batch", DESCRIPTION, *groups, argv=argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        return run(args, EngineConfig(model=model, cache=cache, scheduler=scheduler, runner=runner))
    except (RunError, InvalidRequestError, EngineStoppedError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; start it again to go on from here", file=sys.stderr)
        return 130


def run(args: BatchArgs, config: EngineConfig) -> int:
    """
    Raises:
      RunError, InvalidRequestError, EngineStoppedError, OSError: the run cannot start or cannot go on.
    """
    key = blake2b(json.dumps(asdict(config.model), sort_keys=True).encode()).digest()
    results = ResultFile(args.output)
    try:
        total = None if args.input == "-" else check_input(args.input, results, key)
        if total == results.num_done:
            print(f"{args.output} is complete: {total} results", file=sys.stderr)
            return 0
        summary = answer_all(args, config, results, total, key)
    finally:
        results.close()
    print(table(summary), file=sys.stderr)
    if args.summary:
        Path(args.summary).write_text(json.dumps(summary) + "\n")
    return 0


def check_input(path: str, results: ResultFile, key: bytes) -> int:
    """How many lines there are to answer, all of them checked against the results.

    Raises:
      RunError: the results are of another input.
    """
    total, last = 0, 0
    for line in read_lines(path, sys.stdin.buffer, key):
        results.has(line.number, line.digest)
        total, last = total + 1, line.number
    if results.last_line > last:
        raise RunError(f"{results.path} has a result for line {results.last_line}, but {path} ends at line {last}")
    return total


def answer_all(
    args: BatchArgs, config: EngineConfig, results: ResultFile, total: int | None, key: bytes
) -> dict[str, Any]:
    from paged.async_engine import AsyncEngine
    from scripts.batch.run import BatchRun, UniqueIds, tasks

    try:
        engine = AsyncEngine(config)
    except (ValueError, RuntimeError, OSError) as e:
        raise RunError(f"the engine could not be loaded: {e}") from e
    gc.freeze()  # what start-up has left is no garbage: collections between steps need not look at it
    ids = UniqueIds()
    bar = tqdm(total=total, initial=results.num_done, unit="line", disable=not args.progress, mininterval=0.5)
    try:
        with bar:
            batch = BatchRun(engine, results, 2 * engine.max_num_seqs, (config.model.model,), bar)
            todo = tasks(read_lines(args.input, sys.stdin.buffer, key), results, ids)
            return asyncio.run(batch.run(todo)).as_dict()
    finally:
        engine.shutdown()
        ids.close()


def table(summary: dict[str, Any]) -> str:
    requests = summary["requests"]
    before = f", {requests['done_before']:,} before" if requests["done_before"] else ""
    rows = [
        f"requests    {requests['ok']:,} ok, {requests['failed']:,} failed{before}, in {summary['seconds']:.1f} s",
        f"tokens      {summary['prompt_tokens']:,} prompt, {summary['completion_tokens']:,} generated, "
        f"{summary['completion_tokens_per_second']:,.1f} generated/s",
    ]
    for name, key in (("latency", "latency_seconds"), ("first token", "time_to_first_token_seconds")):
        if p := summary[key]:
            rows.append(f"{name:<11} P50 {p['p50']:.3f} s, P95 {p['p95']:.3f} s, P99 {p['p99']:.3f} s")
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
