"""What the server can stream, over an engine whose device only passes time: python -m tests.server.bench_front_ends

Everything is real but the device: HTTP, front ends, the engine's thread. Give the flags of python -m server after those
listed by --help; then send load with python -m scripts.bench serve. At its end it says what each process has cost.
"""

import asyncio
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from paged.config import EngineConfig, ModelArgs, SchedulerArgs, option
from server.args import ServerArgs


@dataclass(frozen=True, kw_only=True)
class DeviceArgs:
    _argument_group_name: ClassVar[str] = "device"

    step_ms: float = option(11.5, "time that a step takes")
    sequence_ms: float = option(0.0, "time that each sequence adds to it")
    prompt_ms: float = option(0.0, "time that 8,192 tokens of prompts take")


def processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def watch(seconds: float = 1.0) -> None:
    """Says, while there is load, how busy each process is."""
    before: dict[int, float] = {}
    while True:
        begin = time.monotonic()
        await asyncio.sleep(seconds)
        pids = [os.getpid(), *map(int, Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split())]
        after = {pid: processor_seconds(pid) for pid in pids}
        passed = time.monotonic() - begin
        busy = [(after[pid] - before.get(pid, after[pid])) / passed for pid in pids]
        before = after
        if max(busy) > 0.05:
            print("busy: engine", *(f"{fraction:.0%}" for fraction in busy), file=sys.stderr, flush=True)


async def main() -> int:
    from paged.cli import parse_args
    from scripts.bench.instant_device import StepSeconds, instant_parts
    from server.__main__ import listen, serve
    from server.front_end import set_up_logging

    groups = (DeviceArgs, ServerArgs, ModelArgs, SchedulerArgs)
    device, args, model, scheduler = parse_args("python -m tests.server.bench_front_ends", __doc__ or "", *groups)
    set_up_logging("warning")
    config = EngineConfig(model=model, scheduler=scheduler)
    watching = asyncio.create_task(watch())
    seconds = StepSeconds(device.step_ms / 1e3, device.sequence_ms / 1e3, device.prompt_ms / 8192e3)
    parts = instant_parts(config, seconds)
    status = await serve(args, config, listen(args.host, args.port), parts)
    watching.cancel()
    return status


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
