"""python -m scripts.convert SRC DST: any model as an Orbax checkpoint, which each device reads its part of."""

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from paged.cli import parse_args
from paged.config import option
from paged.errors import InvalidRequestError

DESCRIPTION = """Writes a model that --model DST then serves: weights by Orbax, as the engine holds them, with
configuration, generation defaults and tokenizer beside them."""


@dataclass(frozen=True, kw_only=True)
class ConvertArgs:
    _argument_group_name: ClassVar[str] = "conversion"

    src: str = field(metadata={"positional": True, "help": "hub id, directory or .gguf file"})
    dst: str = field(metadata={"positional": True, "help": "directory to make"})
    dtype: Literal["auto", "float32", "bfloat16"] = option("auto", "auto: bfloat16, on a CPU float32")
    revision: str | None = option(None, "hub revision: branch, tag or commit")
    tokenizer: str | None = option(None, "hub id or directory of the tokenizer; none: the model's own")
    skip_tokenizer_init: bool = option(False, "write no tokenizer")


def main(argv: list[str] | None = None) -> int:
    (args,) = parse_args("python -m scripts.convert", DESCRIPTION, ConvertArgs, argv=argv)
    try:
        convert(args)
    except (InvalidRequestError, ValueError, OSError, ModuleNotFoundError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def convert(args: ConvertArgs) -> None:
    from models import build_model, open_checkpoint
    from models.orbax_checkpoint import write_checkpoint
    from paged.startup import compute_dtype

    target, begin = Path(args.dst).expanduser(), time.monotonic()
    if target.exists():
        raise FileExistsError(f"{target} exists: name a directory that does not")
    checkpoint = open_checkpoint(
        args.src, tokenizer=args.tokenizer, revision=args.revision, skip_tokenizer=args.skip_tokenizer_init
    )
    dtype = compute_dtype(args.dtype)
    params = checkpoint.load_params(build_model(checkpoint.config, dtype=dtype), dtype)
    write_checkpoint(
        target,
        checkpoint.config,
        params,
        generation_config=checkpoint.generation_config,
        tokenizer=checkpoint.tokenizer,
    )
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    seconds = time.monotonic() - begin
    print(f"{target}: {size / 1e9:.2f} GB of {dtype.name} in {seconds:.1f} s", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
