"""How long the scheduler takes for one step: python -m tests.paged.bench_scheduler"""

import random
import statistics
import time

from paged.request import Request
from paged.sampling_params import SamplingParams
from paged.scheduler import Scheduler

NUM_RUNNING, NUM_WAITING, NUM_STEPS = 256, 1000, 500


def request(name: str, rng: random.Random) -> Request:
    prompt = [rng.randrange(32_000) for _ in range(rng.randint(64, 512))]
    return Request(name, prompt, SamplingParams(max_tokens=None), 0.0, max_total_tokens=4096)


def busy_scheduler(policy: str, num_blocks: int) -> Scheduler:
    """All slots decode, and the queue is long."""
    rng = random.Random(0)
    scheduler = Scheduler(num_blocks, 16, NUM_RUNNING, 8192, 1 << 20, 1 << 30, policy)  # type: ignore[arg-type]
    for i in range(NUM_RUNNING + NUM_WAITING):
        scheduler.add(request(str(i), rng))
    while (plan := scheduler.schedule()) and plan.prefills:
        deliver(scheduler, plan)
    if plan:
        deliver(scheduler, plan)
    return scheduler


def deliver(scheduler: Scheduler, plan) -> None:
    for scheduled in plan.scheduled:
        if scheduled.samples:
            scheduler.append_token(scheduled.request, 7, 0.0)


def measure(name: str, policy: str, num_blocks: int) -> None:
    scheduler = busy_scheduler(policy, num_blocks)
    schedule, append, num_decodes, preemptions = [], [], [], 0
    previous = None
    for _ in range(NUM_STEPS):
        t0 = time.perf_counter()
        plan = scheduler.schedule()
        t1 = time.perf_counter()
        if previous:
            deliver(scheduler, previous)
        t2 = time.perf_counter()
        schedule.append((t1 - t0) * 1e3)
        append.append((t2 - t1) * 1e3)
        num_decodes.append(len(plan.decodes) if plan else 0)
        preemptions += plan.num_preempted if plan else 0
        previous = plan
    ninety_nine = statistics.quantiles(schedule, n=100)[98]
    print(
        f"{name:28s} schedule() {statistics.median(schedule):.3f} ms median, {ninety_nine:.3f} P99; "
        f"append_token() {statistics.median(append):.3f} ms a step; {statistics.mean(num_decodes):.0f} decodes a step, "
        f"{scheduler.num_waiting} waiting, {preemptions} preemptions"
    )


if __name__ == "__main__":
    print(f"{NUM_RUNNING} running, {NUM_WAITING} waiting, {NUM_STEPS} steps")
    measure("fcfs", "fcfs", 100_000)
    measure("priority", "priority", 100_000)
    measure("fcfs, pool too small", "fcfs", 5_000)
    measure("priority, pool too small", "priority", 5_000)
