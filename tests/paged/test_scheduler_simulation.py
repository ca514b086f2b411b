"""Thousands of small random worlds: whatever arrives, every request ends as it would have ended alone."""

import random
from collections import Counter
from dataclasses import dataclass, field
from itertools import count

import pytest

from paged.errors import QueueFullError
from paged.plan import StepPlan
from paged.request import Request, RequestStatus
from paged.request_queue import by_arrival, by_priority
from paged.sampling_params import SamplingParams
from paged.scheduler import Scheduler
from paged.stats import StepStats
from tests.paged.fake_device import VOCABULARY, FakeDevice, make_request


@dataclass
class World:
    """A scheduler, a device and a random crowd. The loop is the engine's: schedule and dispatch step N+1, then read
    the tokens of step N."""

    seed: int
    leaders: list[Request] = field(default_factory=list)  # accepted, in order of arrival
    admitted: set[Request] = field(default_factory=set)
    cancelled: set[Request] = field(default_factory=set)
    refused: int = 0
    steps: int = 0
    counters: StepStats = field(default_factory=StepStats)

    def __post_init__(self) -> None:
        rng = self.rng = random.Random(self.seed)
        self.priority = rng.random() < 0.4
        self.caching = rng.random() < 0.8
        self.one_step_late = rng.random() < 0.9
        self.cancel_rate = rng.choice([0, 0, 0.02, 0.1])
        self.arrival_rate = rng.choice([0.05, 0.3, 1.0])
        self.disasters = rng.random() < 0.1
        self.admission_order: dict[Request, int] = {}  # the last one of each request that is not preempted
        self.numbers = count()
        block_size = rng.choice([1, 2, 4, 8])
        self.scheduler = Scheduler(
            num_blocks=1 + max(2, rng.choice([8, 20, 60, 200]) // block_size),
            block_size=block_size,
            max_num_seqs=rng.randint(1, 8),
            max_num_batched_tokens=rng.choice([1, 3, 8, 40]),
            max_num_queued_requests=rng.choice([6, 1000]),
            max_num_queued_tokens=rng.choice([60, 10_000]),
            policy="priority" if self.priority else "fcfs",
            enable_prefix_caching=self.caching,
            clock=lambda: float(self.steps),
        )
        self.device = FakeDevice(self.scheduler)
        self.prefixes = [[rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 20))] for _ in range(3)]
        self.to_come = rng.randint(1, 25)

    @property
    def requests(self) -> list[Request]:
        return [member for leader in self.leaders for member in (leader, *leader.siblings)]

    def run(self) -> None:
        previous: list[tuple[Request, int]] = []
        most_steps = 3000
        while self.to_come or self.scheduler.has_unfinished or previous:
            self.steps += 1
            assert self.steps < most_steps, "it never ends"
            self.arrivals()
            idle = not self.scheduler.has_unfinished
            plan = self.scheduler.schedule()
            assert plan or previous or idle, "nothing runs and nothing will be read: a deadlock"
            if plan:
                self.check_plan(plan)
            self.check_state(plan)
            sampled = self.device.run(plan) if plan else []
            if self.one_step_late:
                previous, sampled = sampled, previous
            for request, token in sampled:
                ended = request.finished
                assert self.scheduler.append_token(request, token, float(self.steps)) is not ended
            self.misfortunes()
        self.check_end()

    def arrivals(self) -> None:
        while self.to_come and self.rng.random() < self.arrival_rate:
            self.to_come -= 1
            request = self.random_request(f"r{self.to_come}")
            before = (self.scheduler.num_waiting, self.scheduler.num_waiting_tokens)
            size, tokens = 1 + len(request.siblings), request.num_prompt_tokens
            over = before[0] + size > self.scheduler.max_num_queued_requests
            over |= before[1] + size * tokens > self.scheduler.max_num_queued_tokens
            try:
                self.scheduler.add(request)
            except QueueFullError as error:
                self.refused += 1
                assert over
                assert error.retry_after > 0
                assert (self.scheduler.num_waiting, self.scheduler.num_waiting_tokens) == before
                continue
            assert not over
            assert self.scheduler.num_waiting == before[0] + size
            self.leaders.append(request)
            owner = int(request.cache_salt == "tenant") if self.caching else len(self.leaders)
            for member in (request, *request.siblings):
                self.device.expect(member, owner)

    def random_request(self, name: str) -> Request:
        rng, capacity = self.rng, self.scheduler.capacity
        prompt = rng.choice(self.prefixes)[: rng.randint(0, 20)]
        prompt += [rng.randrange(VOCABULARY) for _ in range(rng.randint(not prompt, 8))]
        max_tokens = rng.choice([1, 2, 5, 12, 30])
        stops = frozenset(rng.sample(range(VOCABULARY), rng.choice([0, 0, 1, 3])))
        params = SamplingParams(
            max_tokens=max_tokens,
            min_tokens=rng.randint(0, max_tokens),
            stop_token_ids=[token for token in stops if rng.random() < 0.5],
            prompt_logprobs=1 if rng.random() < 0.1 else None,
        )
        return make_request(
            name,
            prompt[: min(len(prompt), capacity - 1, self.scheduler.max_num_queued_tokens // 4)],
            max_tokens=max_tokens,
            arrival=float(rng.randint(self.steps - 3, self.steps)) if self.priority else float(self.steps),
            n=rng.choice([1, 1, 1, 2, 4]),
            params=params,
            stop_token_ids=stops,
            priority=rng.randint(-1, 1),
            cache_salt=rng.choice([None, None, "tenant"]),
        )

    def misfortunes(self) -> None:
        for request in self.requests:
            if not request.finished and self.rng.random() < self.cancel_rate:
                reason = self.rng.choice(["abort", "error"])
                taken_along = [s for s in request.siblings if s in self.scheduler._held_siblings]
                if reason == "error":
                    self.device.spoil(request)
                self.scheduler.finish(request, reason)
                self.scheduler.finish(request, "stop")  # has ended already: changes nothing
                for member in (request, *taken_along):
                    assert member.finish_reason == reason
                    self.cancelled.add(member)
        if self.disasters and self.rng.random() < 0.05:
            self.scheduler.forget_computed()
            self.device.cells.clear()
            self.admission_order.clear()
            assert self.scheduler.usage == 0

    def check_plan(self, plan: StepPlan) -> None:
        assert 0 < plan.num_tokens <= self.scheduler.max_num_batched_tokens
        assert len({item.request for item in plan.scheduled}) == len(plan.scheduled)
        for item in plan.scheduled:
            assert item.request.status is RequestStatus.RUNNING
            assert item.num_tokens > 0
            assert item.samples == (item.request.num_inflight_tokens > 0)
            assert item.request.num_computed_tokens == item.start + item.num_tokens
        assert not (plan.num_preempted and plan.admitted)
        for request in plan.admitted:
            self.admission_order[request] = next(self.numbers)
            self.admitted.add(request)
        assert len(self.scheduler._running) <= self.scheduler.max_num_seqs
        self.check_fairness(plan)

    def check_fairness(self, plan: StepPlan) -> None:
        """Nobody who was in the queue is overtaken."""
        came_late = {s for item in plan.prefills for s in item.request.siblings} | self.scheduler._held_siblings
        left = [r for r in self.requests if r.status is RequestStatus.WAITING and r not in came_late]
        if plan.admitted and left:
            rank = by_priority if self.priority else by_arrival
            assert max(map(rank, plan.admitted)) < min(map(rank, left))

    def check_state(self, plan: StepPlan | None) -> None:
        scheduler, running = self.scheduler, list(self.scheduler._running)
        scheduler.pool.check()
        held = Counter(block for request in running for block in request.block_table)
        assert {b: scheduler.pool.references(b) for b in held} == held
        assert scheduler.pool.num_used == len(held)
        assert all(len(set(request.block_table)) == len(request.block_table) for request in running)
        assert scheduler._prefilling <= set(running)
        slots = [request.slot for request in running]
        assert len(set(slots)) == len(slots)
        assert all(0 <= slot < scheduler.max_num_seqs for slot in slots)
        waiting = [r for r in self.requests if r.status is RequestStatus.WAITING]
        assert not any(r.block_table or r.slot != -1 for r in waiting)
        assert (scheduler.num_running, scheduler.num_waiting) == (len(running), len(waiting))
        assert scheduler.num_waiting_tokens == sum(r.num_prompt_tokens for r in waiting)
        preempted = [r for r in waiting if r in self.admission_order]
        self.check_victims(preempted, running)
        for request in preempted:
            del self.admission_order[request]

    def check_victims(self, victims: list[Request], running: list[Request]) -> None:
        """They are those that came last."""
        if victims and running:
            rank = by_priority if self.priority else self.admission_order.__getitem__
            assert min(map(rank, victims)) > max(map(rank, running))

    def check_end(self) -> None:
        scheduler, counters = self.scheduler, self.counters
        for request in self.requests:
            assert request.finished
            output, *reasons = self.device.truths[request].ending(request, scheduler.capacity)
            if request in self.cancelled:
                assert request.output_token_ids == output[: len(request.output_token_ids)]
            else:
                assert request.output_token_ids == output
                assert [request.finish_reason, request.stop_reason] == reasons
        assert scheduler.pool.num_free == scheduler.pool.num_blocks - 1
        assert (scheduler.num_running, scheduler.num_waiting, scheduler.num_waiting_tokens) == (0, 0, 0)
        assert sorted(scheduler._free_slots) == list(range(scheduler.max_num_seqs))
        scheduler.take_counters(counters)
        assert counters.num_recomputed_tokens == self.device.num_recomputed
        assert counters.prefix_cache_hits == sum(r.num_cached_tokens for r in self.admitted)
        assert counters.num_preemptions == sum(r.num_preemptions for r in self.requests)


@pytest.mark.parametrize("hundred", range(25))
def test_every_request_ends_as_it_would_alone(hundred: int):
    for seed in range(hundred * 100, hundred * 100 + 100):
        try:
            World(seed).run()
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise


def test_the_worlds_are_eventful():
    """The test above would prove little in worlds without preemptions, shared prefixes, waiting siblings, ..."""
    events: Counter[str] = Counter()
    for seed in range(100):
        world = World(seed)
        world.run()
        events["preempted"] += world.counters.num_preemptions
        events["recomputed"] += world.counters.num_recomputed_tokens
        events["shared"] += world.counters.prefix_cache_hits
        events["cancelled"] += len(world.cancelled)
        events["refused"] += world.refused
        for request in world.requests:
            events["siblings"] += request.index > 0
            events[f"{request.finish_reason} {type(request.stop_reason).__name__}"] += 1
    expected = {"preempted", "recomputed", "shared", "cancelled", "refused", "siblings"}
    expected |= {"stop int", "stop NoneType", "length NoneType", "length str", "abort NoneType", "error NoneType"}
    assert {name for name in expected if events[name] < 20} == set()
