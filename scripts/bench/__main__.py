"""python -m scripts.bench BENCHMARK: measurements of the engine and of a server."""

import argparse
import sys
from importlib import import_module

from paged.errors import InvalidRequestError

BENCHMARKS = {
    "throughput": "a whole offline workload: tokens a second, cache slots wasted",
    "latency": "one decode step, by batch and context",
    "prefill": "computing prompts, by number and length",
    "several": "some of these over one engine, which is loaded once",
    "host": "what a step costs the processor, beside the device",
    "serve": "a running server, by rate of arrivals: first token, between tokens, goodput",
}
DESCRIPTION = """Measures the engine, or a server of OpenAI's API.

{benchmarks}

BENCHMARK --help lists the options. Each measurement is a JSON line on stdout; what people
read goes to stderr. A roofline fraction of 100% is as fast as the machine's measured memory
bandwidth and matrix-product peak allow. With --load-format dummy, --model can be a folder
that has a config.json and nothing else, such as configs/qwen3-0.6b."""


def main(argv: list[str] | None = None) -> int:
    listed = "\n".join(f"  {name:<12}{what}" for name, what in BENCHMARKS.items())
    parser = argparse.ArgumentParser(
        "python -m scripts.bench",
        usage="%(prog)s BENCHMARK [options]",
        description=DESCRIPTION.format(benchmarks=listed),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("benchmark", choices=BENCHMARKS, metavar="BENCHMARK", help=argparse.SUPPRESS)
    argv = sys.argv[1:] if argv is None else argv
    name = parser.parse_args(argv[:1]).benchmark
    try:
        import_module(f"scripts.bench.{name}").main(argv[1:])
    except InvalidRequestError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
