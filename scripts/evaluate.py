"""python -m scripts.evaluate TEXT_FILE: how well a model predicts a text."""

import json
import logging
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from paged.cli import parse_args
from paged.config import CacheArgs, ModelArgs, RunnerArgs, SchedulerArgs, option, require
from paged.errors import InvalidRequestError
from scripts.bench.report import Report, machine

DESCRIPTION = """Computes a model's perplexity on a text: exp of the mean negative logprob of its tokens. The text is
cut into windows that the model sees one by one, each behind the beginning-of-text token if the tokenizer adds one."""


@dataclass(frozen=True, kw_only=True)
class EvaluateArgs:
    _argument_group_name: ClassVar[str] = "evaluation"

    text_file: str = field(metadata={"positional": True, "help": "UTF-8 text"})
    window: int | None = option(None, "tokens in a window; none: as many as the model takes, at most 1024")
    stride: int | None = option(None, "tokens from a window's start to the next's; none: no overlap")
    save_logprobs: str | None = option(None, "file for every token's logprob, as JSON")
    against: str | None = option(None, "file of --save-logprobs to compare with")

    def __post_init__(self) -> None:
        require(self.window is None or self.window >= 2, "window", "must be at least 2")
        require(self.stride is None or self.stride >= 1, "stride", "must be at least 1")


class Window(NamedTuple):
    token_ids: list[int]
    first_scored: int  # the tokens before it are context: scored in an earlier window, or with nothing before them


def windows(text: Sequence[int], prefix: Sequence[int], size: int, stride: int | None = None) -> Iterator[Window]:
    """Cuts `text` into windows of `size` tokens, `prefix` included, that advance by `stride` tokens (None: by all that
    a window has room for). Each token is scored once at most, in the first window that has it.

    Raises:
      InvalidRequestError: the stride leaves tokens out.
    """
    room = size - len(prefix)
    stride = room if stride is None else stride
    if not 1 <= stride <= room:
        raise InvalidRequestError(f"stride must be at most {room}, the text's tokens in a window", param="stride")
    done = 0
    for start in range(0, len(text), stride):
        if done == len(text):
            return
        tokens = text[start : start + room]
        yield Window([*prefix, *tokens], max(1, len(prefix) + done - start))
        done = start + len(tokens)


def main(argv: list[str] | None = None) -> int:
    groups = (EvaluateArgs, ModelArgs, CacheArgs, SchedulerArgs, RunnerArgs)
    args, model, *others = parse_args("python -m scripts.evaluate", DESCRIPTION, *groups, argv=argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        evaluate(args, model, others)
    except (InvalidRequestError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def evaluate(args: EvaluateArgs, model: ModelArgs, others: Sequence[Any]) -> None:
    from paged import LLM

    text = Path(args.text_file).read_text(encoding="utf-8")
    if model.max_model_len is None and args.window is not None:
        model = replace(model, max_model_len=args.window + 1)  # a request makes one token, too
    llm = LLM(**asdict(model), **{name: value for group in others for name, value in asdict(group).items()})
    tokenizer = llm.get_tokenizer()
    if tokenizer is None:
        raise InvalidRequestError("a text cannot be evaluated without the model's tokenizer")
    size = args.window or min(1024, llm.engine.max_model_len - 1)
    prefix = tokenizer.encode("")
    cut = list(windows(tokenizer.encode(text, add_special_tokens=False), prefix, size, args.stride))
    begin = time.perf_counter()
    logprobs = score(llm, cut)
    seconds = time.perf_counter() - begin
    if not logprobs:
        raise InvalidRequestError(f"{args.text_file} is too short: it has no token with one before it")
    measurement = summary(logprobs, len(text.encode()))
    workload = {"text_file": args.text_file, "windows": len(cut), "window": size, "stride": args.stride}
    cache_dtype = llm.engine.config.cache.kv_cache_dtype
    report = Report("evaluate", {"model": model.model, "kv_cache_dtype": cache_dtype, "machine": machine()})
    row = {
        "tokens": f"{measurement['tokens']:,}",
        "windows": f"{len(cut):,} of {size:,}",
        "perplexity": f"{measurement['perplexity']:.4f}",
        "bits/byte": f"{measurement['bits_per_byte']:.4f}",
        "seconds": f"{seconds:.1f}",
    }
    if args.against is not None:
        measurement |= differences(logprobs, json.loads(Path(args.against).read_text()))
        row |= {"mean |d logprob|": f"{measurement['mean_difference']:.5f}"}
        row |= {"largest": f"{measurement['largest_difference']:.4f}"}
    if args.save_logprobs is not None:
        Path(args.save_logprobs).write_text(json.dumps(logprobs))
    report.add(row, {"workload": workload, "seconds": seconds} | measurement)


def differences(logprobs: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    if len(logprobs) != len(others):
        raise InvalidRequestError(
            f"{len(others):,} logprobs were saved, and this run has {len(logprobs):,}: use the same text and window",
            param="against",
        )
    apart = [abs(a - b) for a, b in zip(logprobs, others, strict=True)]
    return {"mean_difference": math.fsum(apart) / len(apart), "largest_difference": max(apart)}


def score(llm: Any, cut: Sequence[Window]) -> list[float]:
    """The logprobs of all tokens that count, from the engine's prompt logprobs."""
    from paged import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    outputs = llm.generate([window.token_ids for window in cut], params)
    logprobs = []
    for window, output in zip(cut, outputs, strict=True):
        if output.prompt_logprobs is None:
            raise InvalidRequestError(f"a window could not be computed: {output.outputs[0].stop_reason}")
        scored = zip(window.token_ids, output.prompt_logprobs, strict=True)
        logprobs += [of[token].logprob for token, of in list(scored)[window.first_scored :]]
    return logprobs


def summary(logprobs: Sequence[float], num_bytes: int) -> dict[str, float]:
    total = math.fsum(logprobs)
    return {
        "tokens": len(logprobs),
        "mean_logprob": total / len(logprobs),
        "perplexity": math.exp(-total / len(logprobs)),
        "bits_per_byte": -total / math.log(2) / num_bytes,  # of all the text's: comparable between tokenizers
    }


if __name__ == "__main__":
    sys.exit(main())
