"""python -m scripts.compare_transformers: this engine beside transformers' `generate`, same weights, same prompts."""

import json
import logging
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from paged.cli import parse_args
from paged.config import option, require
from scripts.bench.report import Report, machine, repeated

DESCRIPTION = """Runs this engine and transformers' generate in turns on a CPU: greedy, float32, the same prompts, the
same number of tokens for each. transformers gets the prompts as one static batch. Prints tokens a second over the whole
run, prompts included, and their ratio."""

PROMPTS = (
    "The history of the steam engine begins with",
    "Write a short letter to a friend about the first snow of the year, and why it made you think of home.",
    "In mathematics, a prime number is",
    "List three reasons why bread rises, then explain the role of yeast in simple words for a child of ten years.",
    "The quick brown fox",
    "A recipe for tomato soup: first,",
    "Once upon a time, in a village between two mountains, there lived a clockmaker who",
    "The largest planet of the solar system is Jupiter. Its moons are",
    "To install a package in Python, you",
    "Why is the sky blue? The short answer is that",
    "Dear Sir or Madam, I am writing to you because the parcel that I ordered three weeks ago",
    "The capital of France is Paris; the capital of Italy is Rome; the capital of Spain is",
    "Photosynthesis is the process by which",
    "My favourite book is one that I read when I was twelve years old. It tells the story of",
    "An algorithm that sorts a list of numbers can work as follows:",
    "Yesterday the weather was",
)


@dataclass(frozen=True, kw_only=True)
class CompareArgs:
    _argument_group_name: ClassVar[str] = "comparison"

    transformers_python: str | None = option(None, "Python that has torch, transformers, gguf; none: this one")
    model: str | None = option(None, "checkpoint directory or .gguf file; none: the default model")
    batch: tuple[int, ...] = option((16, 1), "prompts at once, several values")
    tokens: int = option(128, "tokens generated for each prompt")
    repeats: int = option(3, "turns of each; the median counts")
    threads: int = option(2, "processor cores that each may use")

    def __post_init__(self) -> None:
        require(min(self.batch) >= 1, "batch", "must be at least 1")
        require(max(self.batch) <= len(PROMPTS), "batch", f"must be at most {len(PROMPTS)}")
        for name in ("tokens", "repeats", "threads"):
            require(getattr(self, name) >= 1, name, "must be at least 1")


class Transformers:
    """The other side, in a process of its own that sleeps while it is not its turn."""

    def __init__(self, python: str, model: str, threads: int):
        worker = Path(__file__).with_name("transformers_worker.py")
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [python, worker, model, str(threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        self.versions = self._read()

    def generate(self, prompts: list[list[int]], tokens: int) -> tuple[float, list[list[int]]]:
        """Seconds, and the tokens generated."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"prompts": prompts, "tokens": tokens}) + "\n")
        self._process.stdin.flush()
        answer = self._read()
        return answer["seconds"], answer["outputs"]

    def close(self) -> None:
        self._process.communicate()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("error: transformers' process ended; what it says is above")
        return json.loads(line)


def main(argv: list[str] | None = None) -> None:
    (args,) = parse_args("python -m scripts.compare_transformers", DESCRIPTION, CompareArgs, argv=argv)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    from models.default_model import default_model_path
    from paged import LLM, SamplingParams

    llm = LLM(
        args.model, dtype="float32", max_num_seqs=max(args.batch), enable_prefix_caching=False, max_model_len=1024
    )
    other = Transformers(
        args.transformers_python or sys.executable, args.model or str(default_model_path()), args.threads
    )
    report = Report("compare_transformers", {"machine": machine(), "other": other.versions, "threads": args.threads})
    params = SamplingParams(temperature=0, max_tokens=args.tokens, ignore_eos=True, detokenize=False)

    def generate(prompts: list[list[int]]) -> tuple[float, list[list[int]]]:
        begin = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - begin, [output.outputs[0].token_ids for output in outputs]

    for batch in args.batch:
        prompts = [llm.get_tokenizer().encode(text) for text in PROMPTS[:batch]]
        generate(prompts), other.generate(prompts, 2)
        turns = [(generate(prompts), other.generate(prompts, args.tokens)) for _ in range(args.repeats)]
        add(report, batch, args, turns)
    report.print_table()
    other.close()


def add(report: Report, batch: int, args: CompareArgs, turns: list) -> None:
    count = batch * args.tokens
    ours = repeated([count / seconds for (seconds, _), _ in turns])
    theirs = repeated([count / seconds for _, (seconds, _) in turns])
    same = sum(common_prefix(a, b) for (_, ours), (_, theirs) in turns[:1] for a, b in zip(ours, theirs, strict=True))
    ratio = ours["median"] / theirs["median"]
    report.add(
        {
            "prompts": str(batch),
            "tokens each": str(args.tokens),
            "paged tok/s": f"{ours['median']:.1f} ({ours['min']:.1f} to {ours['max']:.1f})",
            "transformers tok/s": f"{theirs['median']:.1f} ({theirs['min']:.1f} to {theirs['max']:.1f})",
            "ratio": f"{ratio:.2f}",
            "same tokens": f"{same / count:.1%}",
        },
        {
            "workload": {"batch": batch, "tokens": args.tokens},
            "paged_tokens_per_second": ours,
            "transformers_tokens_per_second": theirs,
            "ratio": ratio,
            "same_tokens": same / count,
        },
    )


def common_prefix(a: list[int], b: list[int]) -> int:
    """How many tokens two outputs begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


if __name__ == "__main__":
    main()
