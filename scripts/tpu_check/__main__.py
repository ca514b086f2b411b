"""python -m scripts.tpu_check MODEL --topology v5e:2x2: will a model run on these TPUs, and how fast at best?"""

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from models import build_model, make_mesh, open_checkpoint, param_shapes
from paged.cli import parse_args
from paged.compiler import Compiler, Lowering
from paged.config import CacheArgs, EngineConfig, ModelArgs, RunnerArgs, SchedulerArgs, option, require
from paged.errors import InvalidRequestError
from paged.memory import RESERVE, Probe, block_bytes, gib, round_down, tree_bytes
from paged.runner import Runner
from paged.startup import runner_shape
from scripts.bench.report import Report, note
from scripts.tpu_check.chips import Chip, topology_devices
from scripts.tpu_check.estimate import Estimates
from scripts.tpu_check.program import Program, hidden_copies

DESCRIPTION = """Compiles the engine's step programs for TPUs that need not be there, with their own compiler (pip
install libtpu). Weights are not read: MODEL may be a folder with nothing but a config.json."""


@dataclass(frozen=True, kw_only=True)
class CheckArgs:
    _argument_group_name: ClassVar[str] = "check"

    model: str = field(metadata={"positional": True, "help": "hub id, directory or .gguf file"})
    topology: str = option("v5e:1x1", "chips, such as v6e:2x4 or v5p:2x2x1")
    tensor_parallel_size: int | None = option(None, "of them, that share each layer; none: all")
    max_model_len: int = option(8192, "longest prompt plus output, in tokens")
    batch: tuple[int, ...] = option((1, 16, 64, 256), "sequences of a decode step, several values")
    context: tuple[int, ...] = option((1024, 4096), "tokens of each of them, several values")
    largest_only: bool = option(False, "compile the largest programs alone")
    estimate: bool = option(True, "tokens a second; compiles greedy samplers as well")

    def __post_init__(self) -> None:
        for name in ("batch", "context"):
            require(min(getattr(self, name)) >= 1, name, "must be at least 1")


def main(argv: list[str] | None = None) -> int:
    check, cache, scheduler = parse_args(
        "python -m scripts.tpu_check", DESCRIPTION, CheckArgs, CacheArgs, SchedulerArgs, argv=argv
    )
    try:
        return run(check, cache, scheduler)
    except (InvalidRequestError, ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1


def run(check: CheckArgs, cache: CacheArgs, scheduler: SchedulerArgs) -> int:
    chip, devices = topology_devices(check.topology)
    runner, per_block = make_runner(check, cache, scheduler, devices)
    shape = runner.shape
    steps, samplings = shape.steps, shape.samplings
    if check.largest_only:
        steps, samplings = shape.largest_steps, [shape.largest_sampling]
    about = {"model": check.model, "topology": check.topology, "options": asdict(cache) | asdict(scheduler)}
    about["tensor_parallel_size"] = runner.model.compute.shards
    weights = tree_bytes(runner.params)
    num_blocks, error = fit(runner, cache, chip, per_block, weights)
    if error:
        note(f"does not fit: {error}")
        Report("tpu_check", about).add({"memory": "FAIL"}, {"memory": {"weights": weights, "error": error}})
        return 1
    runner = Runner(runner.model, runner.params, replace(runner.shape, num_blocks=num_blocks))
    lowerings = runner.forward_lowerings(steps) | runner.sampling_lowerings(samplings) | runner.score_lowering()
    if not check.largest_only:
        lowerings |= runner.lowerings()
    programs, failed = compile_programs(runner, lowerings, chip, about)
    if programs:
        report_memory(runner, list(programs.values()), chip, weights, about)
    if check.estimate and not failed:
        note("compiling greedy samplers, for the estimates")
        mesh = runner.model.compute.mesh
        greedy = {S: Program.compile(partial(runner.lower_sampling, S, "greedy"), mesh) for S, _ in samplings}
        parts = {step: (programs[runner.forward_name(step)], greedy[step.S]) for step in steps}
        Estimates(runner, chip, parts).report(check.batch, check.context, check.max_model_len, about)
    return 1 if failed else 0


def make_runner(check: CheckArgs, cache: CacheArgs, scheduler: SchedulerArgs, devices) -> tuple[Runner, int]:
    """A runner whose parameters are shapes; and a cache block's bytes on one device."""
    size = check.tensor_parallel_size or len(devices)
    config = EngineConfig(
        model=ModelArgs(model=check.model, max_model_len=check.max_model_len, load_format="dummy"),
        cache=cache,
        scheduler=scheduler,
        runner=RunnerArgs(tensor_parallel_size=size),
    )
    checkpoint = open_checkpoint(check.model, load_format="dummy", skip_tokenizer=True)
    dtype = jnp.dtype("bfloat16")
    mesh = make_mesh(size, devices)
    model = build_model(checkpoint.config, dtype=dtype, attention_backend="mosaic_tpu", mesh=mesh)
    shape = runner_shape(config, checkpoint, dtype, "tpu")
    return Runner(model, param_shapes(model), shape), block_bytes(model, shape)


def fit(runner: Runner, cache: CacheArgs, chip: Chip, per_block: int, weights: int) -> tuple[int, str | None]:
    """How many blocks there is room for; or what is in the way."""
    shape = runner.shape
    if cache.num_gpu_blocks_override is not None:
        return cache.num_gpu_blocks_override, None
    room = int(chip.hbm_bytes * (1 - RESERVE)) - weights
    if room <= 0:
        return 0, f"weights of {gib(weights)} a chip, and it has {gib(chip.hbm_bytes)}: more chips are needed"
    try:
        with jax.sharding.use_abstract_mesh(runner.model.compute.mesh.abstract_mesh), Compiler() as compiler:
            room -= Probe(runner.model, runner.params, shape).activation_bytes(compiler)
    except jax.errors.JaxRuntimeError as e:
        return 0, str(e)
    num_blocks = min(round_down(max(0, room // per_block)), shape.max_num_seqs * shape.blocks_per_seq + 1)
    if num_blocks <= shape.blocks_per_seq:
        return (
            0,
            f"{gib(weights)} of weights leave no room for one sequence of {shape.blocks_per_seq * shape.block_size:,}",
        )
    return num_blocks, None


def compile_programs(
    runner: Runner, lowerings: Mapping[str, Lowering], chip: Chip, about: dict[str, Any]
) -> tuple[dict[str, Program], int]:
    """Those that compile, by name, and how many do not."""
    report, programs, failed = Report("tpu_check", about), {}, 0
    for name, lower in lowerings.items():
        try:
            program = Program.compile(lower, runner.model.compute.mesh)
        except jax.errors.JaxRuntimeError as e:
            failed += 1
            report.add(_row(name, "FAIL"), {"program": name, "error": str(e)})
            note(str(e))
            continue
        programs[name] = program
        copies = hidden_copies(program.text, (runner.params, runner.state_shapes().caches))
        seconds = max(program.bytes / chip.bandwidth, program.flops / chip.flops)
        row = _row(
            name,
            "ok",
            f"{program.lower_seconds:.1f}",
            f"{program.compile_seconds:.1f}",
            f"{program.temporary / 2**20:,.0f}",
            f"{program.vmem / 2**20:.0f} of {chip.vmem_bytes / 2**20:.0f}",
            f"{program.bytes / 1e9:.2f}",
            f"{program.flops / 1e12:.3f}",
            f"{seconds * 1e3:.2f}",
            str(len(copies)),
        )
        figures = {k: v for k, v in vars(program).items() if k != "text"} | {"copies": copies}
        report.add(row, {"program": name, "ms_without_attention": seconds * 1e3} | figures)
    report.print_table()
    return programs, failed


def _row(*values: str) -> dict[str, str]:
    names = (
        "program", "compiles", "trace s", "compile s", "temporary MiB", "VMEM MiB",
        "GB", "TFLOP", "ms", "copies",
    )  # fmt: skip
    return dict(zip(names, (*values, *[""] * (len(names) - len(values))), strict=True))


def report_memory(runner: Runner, programs: list[Program], chip: Chip, weights: int, about: dict[str, Any]) -> None:
    """Of one chip."""
    state = runner.state_shapes()
    cache, shape = tree_bytes(state.caches), runner.shape
    parts = {
        "weights": weights,
        "cache": cache,
        "slots": tree_bytes(state) - cache,
        "temporary": max(p.temporary for p in programs),
    }
    tokens = (shape.num_blocks - 1) * shape.block_size
    row = {name: gib(size) for name, size in parts.items()}
    row |= {"sum": gib(sum(parts.values())), "of": gib(chip.hbm_bytes), "tokens": f"{tokens:,}"}
    Report("tpu_check", about).add(row, {"memory": parts | {"hbm": chip.hbm_bytes, "tokens": tokens}})


if __name__ == "__main__":
    sys.exit(main())
