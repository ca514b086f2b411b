"""The scheduler's rules, one by one."""

import pytest

from paged.errors import InvalidRequestError, QueueFullError
from paged.plan import StepPlan
from paged.request import Request, RequestStatus
from paged.request_queue import RequestQueue, by_arrival, by_priority
from paged.sampling_params import SamplingParams
from paged.scheduler import Scheduler
from paged.stats import StepStats
from tests.paged.fake_device import make_request


def make_scheduler(**options) -> Scheduler:
    defaults = {
        "num_blocks": 101,
        "block_size": 4,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 100,
        "max_num_queued_requests": 100,
        "max_num_queued_tokens": 10_000,
    }
    return Scheduler(**(defaults | options))


def step(scheduler: Scheduler) -> StepPlan:
    plan = scheduler.schedule()
    assert plan is not None
    return plan


def deliver(scheduler: Scheduler, plan: StepPlan, token: int = 1000, now: float = 0.0) -> None:
    for item in plan.scheduled:
        if item.samples:
            scheduler.append_token(item.request, token, now)


def run_step(scheduler: Scheduler, token: int = 1000) -> StepPlan:
    plan = step(scheduler)
    deliver(scheduler, plan, token)
    return plan


def counters(scheduler: Scheduler) -> StepStats:
    stats = StepStats()
    scheduler.take_counters(stats)
    return stats


# ---- What a step is ------------------------------------------------------------------------------------------


def test_a_prompt_is_computed_in_chunks_on_blocks_it_has_from_the_start():
    scheduler = make_scheduler(max_num_batched_tokens=5)
    request = make_request("a", list(range(11)))
    scheduler.add(request)
    chunks = []
    for _ in range(3):
        plan = step(scheduler)
        assert len(request.block_table) == 3
        chunks += [(i.start, i.num_tokens, i.new_block, i.samples) for i in plan.prefills]
        assert plan.admitted == ([request] if len(chunks) == 1 else [])
    assert chunks == [(0, 5, 0, False), (5, 5, 0, False), (10, 1, 0, True)]
    assert request.num_inflight_tokens == 1


def test_a_decode_takes_a_block_only_when_its_last_one_is_full():
    scheduler = make_scheduler()
    request = make_request("a", [1, 2, 3], max_tokens=9)
    scheduler.add(request)
    run_step(scheduler)
    decodes = [run_step(scheduler).decodes[0] for _ in range(6)]
    assert [(d.start, d.num_tokens, d.samples) for d in decodes] == [(p, 1, True) for p in range(3, 9)]
    assert [bool(d.new_block) for d in decodes] == [False, True, False, False, False, True]
    assert [d.new_block for d in decodes if d.new_block] == request.block_table[1:]


def test_decodes_come_first_then_running_prompts_then_new_ones_within_the_budget():
    scheduler = make_scheduler(max_num_batched_tokens=6)
    decoding, prefilling, new = (make_request(name, [i] * 9) for i, name in enumerate("abc"))
    scheduler.add(decoding)
    run_step(scheduler)
    scheduler.add(prefilling)
    run_step(scheduler)
    scheduler.add(new)
    plan = step(scheduler)
    assert [(i.request, i.num_tokens) for i in plan.scheduled] == [(decoding, 1), (prefilling, 5)]
    plan = step(scheduler)
    assert [(i.request, i.num_tokens) for i in plan.scheduled] == [(decoding, 1), (prefilling, 1), (new, 4)]
    assert [i.request for i in plan.decodes] == [decoding]
    assert plan.num_tokens == 6


def test_a_one_token_tail_of_a_prompt_is_no_decode():
    scheduler = make_scheduler(max_num_batched_tokens=4)
    scheduler.add(make_request("a", [1] * 5))
    step(scheduler)
    plan = step(scheduler)
    assert (plan.decodes, [i.num_tokens for i in plan.prefills]) == ([], [1])


def test_no_more_requests_run_than_the_budget_has_tokens():
    scheduler = make_scheduler(max_num_batched_tokens=2)
    requests = [make_request(str(i), [i], max_tokens=4) for i in range(5)]
    for request in requests:
        scheduler.add(request)
    while scheduler.has_unfinished:
        assert run_step(scheduler).num_tokens <= 2
        assert scheduler.num_running <= 2


def test_slots_are_limited_unique_and_given_back():
    scheduler = make_scheduler(max_num_seqs=2)
    requests = [make_request(str(i), [i]) for i in range(3)]
    for request in requests:
        scheduler.add(request)
    run_step(scheduler)
    assert [r.slot for r in requests] == [0, 1, -1]
    assert (scheduler.num_running, scheduler.num_waiting) == (2, 1)
    scheduler.finish(requests[0], "abort")
    assert step(scheduler).admitted == [requests[2]]
    assert [r.slot for r in requests] == [-1, 1, 0]


def test_the_host_runs_one_step_ahead_but_not_past_the_last_token():
    scheduler = make_scheduler()
    request = make_request("a", [1], max_tokens=2)
    scheduler.add(request)
    first, second = step(scheduler), step(scheduler)
    assert request.num_inflight_tokens == 2
    assert scheduler.schedule() is None
    assert scheduler.has_unfinished
    deliver(scheduler, first)
    assert scheduler.schedule() is None
    deliver(scheduler, second)
    assert request.finish_reason == "length"
    assert not scheduler.has_unfinished
    assert scheduler.schedule() is None


def test_nobody_overtakes_the_head_of_the_queue():
    scheduler = make_scheduler(num_blocks=6)
    running, large, small = (make_request(n, [i] * size) for i, (n, size) in enumerate([("a", 8), ("l", 16), ("s", 1)]))
    for request in (running, large, small):
        scheduler.add(request)
    assert run_step(scheduler).admitted == [running]
    assert run_step(scheduler).admitted == []
    scheduler.finish(running, "abort")
    assert run_step(scheduler).admitted == [large, small]


# ---- Prefix sharing ------------------------------------------------------------------------------------------


def test_a_prefix_is_shared_in_full_blocks_but_for_the_last_token():
    scheduler = make_scheduler()
    prompt = list(range(12))
    first, same, longer = (make_request(n, p) for n, p in [("a", prompt), ("b", prompt), ("c", [*prompt, 99])])
    scheduler.add(first)
    run_step(scheduler)
    scheduler.add(same)
    scheduler.add(longer)
    plan = run_step(scheduler)
    assert [(i.start, i.num_tokens) for i in plan.prefills] == [(8, 4), (12, 1)]
    assert (same.num_cached_tokens, longer.num_cached_tokens) == (8, 12)
    assert same.block_table[:2] == longer.block_table[:2] == first.block_table[:2]
    assert same.block_table[2] != first.block_table[2] == longer.block_table[2]
    stats = counters(scheduler)
    assert (stats.prefix_cache_queries, stats.prefix_cache_hits) == (12 + 12 + 13, 20)
    assert counters(scheduler).prefix_cache_queries == 0


def test_blocks_are_found_only_by_a_later_step_and_only_once_computed():
    scheduler = make_scheduler(max_num_batched_tokens=8)
    first, together, later = (make_request(name, [7] * 12) for name in "abc")
    scheduler.add(first)
    scheduler.add(together)
    step(scheduler)  # 8 of the 12
    scheduler.add(later)
    step(scheduler)  # the other 4, and 4 of the second, which finds 8
    assert together.num_cached_tokens == 8
    twins = [make_request(name, [9] * 5) for name in "de"]
    scheduler = make_scheduler()
    for twin in twins:
        scheduler.add(twin)
    run_step(scheduler)
    assert [t.num_cached_tokens for t in twins] == [0, 0]
    assert not set(twins[0].block_table) & set(twins[1].block_table)
    assert scheduler.pool.lookup(twins[1].block_hashes) == twins[0].block_table[:1]


def test_a_block_of_output_is_shared_once_its_tokens_have_been_read():
    scheduler = make_scheduler()
    scheduler.add(request := make_request("a", [5, 6], max_tokens=9))
    plans = [step(scheduler) for _ in range(4)]  # computed positions 0..4, the first block is full
    follower = [5, 6, 1, 2, 3, 4, 5]
    for plan, token in zip(plans[:2], [1, 2], strict=True):
        assert scheduler.pool.lookup(request.block_hashes) == []
        deliver(scheduler, plan, token)
    scheduler.add(second := make_request("b", follower))
    run_step(scheduler)
    assert second.num_cached_tokens == 4
    assert second.block_table[0] == request.block_table[0]


@pytest.mark.parametrize(
    ("options", "salts", "shared"),
    [
        ({}, ["x", "x"], True),
        ({}, ["x", "y"], False),
        ({}, [None, "x"], False),
        ({"enable_prefix_caching": False}, [None, None], False),
    ],
)
def test_who_may_share(options: dict, salts: list, shared: bool):
    scheduler = make_scheduler(**options)
    requests = [make_request(str(i), [3] * 9, cache_salt=salt) for i, salt in enumerate(salts)]
    for request in requests:
        scheduler.add(request)
        run_step(scheduler)
    assert requests[1].num_cached_tokens == (8 if shared else 0)


def test_prompt_logprobs_are_computed_not_found():
    scheduler = make_scheduler(max_num_batched_tokens=9)
    scheduler.add(first := make_request("a", [3] * 17))
    run_step(scheduler)
    run_step(scheduler)
    scheduler.finish(first, "abort")
    scheduler.add(scored := make_request("b", [3] * 17, params=SamplingParams(prompt_logprobs=2)))
    assert [(i.start, i.num_tokens) for i in run_step(scheduler).prefills] == [(0, 9)]
    assert scored.num_cached_tokens == 0


class CountingList(list):
    num_read = 0

    def __getitem__(self, key):
        value = super().__getitem__(key)
        self.num_read += len(value) if isinstance(key, slice) else 1
        return value


def test_a_waiting_request_is_hashed_once_however_long_it_waits():
    scheduler = make_scheduler(num_blocks=12)
    scheduler.add(make_request("a", [1] * 4, max_tokens=30))
    run_step(scheduler)
    prompt = CountingList([2] * 40)
    scheduler.add(make_request("b", prompt))
    for _ in range(25):
        run_step(scheduler)
    assert scheduler.num_waiting == 1
    assert prompt.num_read <= 40


# ---- n > 1 ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("caching", [True, False])
def test_siblings_wait_for_the_prompt_and_share_its_blocks(caching: bool):
    scheduler = make_scheduler(max_num_batched_tokens=8, enable_prefix_caching=caching)
    leader = make_request("a", list(range(10)), n=3)
    scheduler.add(leader)
    scheduler.add(other := make_request("b", [50]))
    assert (scheduler.num_waiting, scheduler.num_waiting_tokens) == (4, 31)
    assert run_step(scheduler).admitted == [leader]
    assert run_step(scheduler).admitted == [leader, other][1:]
    assert run_step(scheduler).admitted == leader.siblings
    for sibling in leader.siblings:
        assert sibling.num_cached_tokens == 8
        assert sibling.block_table[:2] == leader.block_table[:2]
        assert sibling.block_table[2] != leader.block_table[2]
    assert scheduler.num_waiting == 0


def test_siblings_come_before_later_requests_and_after_earlier_siblings():
    scheduler = make_scheduler(max_num_seqs=2, max_num_batched_tokens=30)
    first, second = make_request("a", [1] * 9, n=2, max_tokens=2), make_request("b", [2] * 9, n=2, max_tokens=2)
    third = make_request("c", [3])
    for request in (first, second, third):
        scheduler.add(request)
    assert run_step(scheduler).admitted == [first, second]
    order: list[Request] = []
    while scheduler.has_unfinished:
        order += run_step(scheduler).admitted
    assert order == first.siblings + second.siblings + [third]


@pytest.mark.parametrize("reason", ["abort", "error"])
def test_held_siblings_end_with_their_leader(reason):
    scheduler = make_scheduler(max_num_batched_tokens=4)
    leader = make_request("a", [1] * 9, n=3)
    scheduler.add(leader)
    run_step(scheduler)
    scheduler.finish(leader, reason)
    assert [s.finish_reason for s in leader.siblings] == [reason, reason]
    assert not scheduler.has_unfinished
    assert (scheduler.num_waiting, scheduler.num_waiting_tokens, scheduler.usage) == (0, 0, 0)


def test_queued_siblings_live_on_without_their_leader_and_each_can_go_alone():
    scheduler = make_scheduler()
    leader = make_request("a", [1] * 9, n=4)
    scheduler.add(leader)
    scheduler.finish(leader.siblings[0], "abort")
    run_step(scheduler)
    scheduler.finish(leader, "abort")
    scheduler.finish(leader.siblings[1], "abort")
    assert run_step(scheduler).admitted == leader.siblings[2:]


# ---- Preemption ----------------------------------------------------------------------------------------------


def two_in_a_pool_for_one_and_a_half(policy: str = "fcfs", priorities: tuple[int, int] = (0, 0)):
    """Both decode on the last of their blocks, no block is free, and the last step's tokens have not been read."""
    scheduler = make_scheduler(num_blocks=5, policy=policy)
    requests = [make_request(str(i), [i] * 6, max_tokens=6, priority=p) for i, p in enumerate(priorities)]
    for request in requests:
        scheduler.add(request)
    for _ in range(2):
        run_step(scheduler)
    pending = step(scheduler)
    assert [r.num_computed_tokens for r in requests] == [8, 8]
    assert scheduler.pool.num_free == 0
    return scheduler, requests, pending


def test_the_last_admitted_gives_way_keeps_its_tokens_and_is_computed_again():
    scheduler, (first, last), pending = two_in_a_pool_for_one_and_a_half()
    first_scheduled = last.first_scheduled_time
    plan = step(scheduler)
    assert [i.request for i in plan.scheduled] == [first]
    assert (plan.num_preempted, plan.admitted) == (1, [])
    assert last.status is RequestStatus.WAITING
    assert (last.slot, last.block_table, last.num_computed_tokens, last.num_preemptions) == (-1, [], 0, 1)
    assert last.num_inflight_tokens == 1
    deliver(scheduler, pending, token=77)
    assert last.output_token_ids[-1] == 77
    assert (last.num_inflight_tokens, len(last.output_token_ids)) == (0, 3)
    deliver(scheduler, plan)
    while not first.finished:
        run_step(scheduler)
    plan = run_step(scheduler)
    assert plan.admitted == [last]
    # One of its two blocks went to the other request, tail first; the other was still in the cache.
    assert [(i.start, i.num_tokens, i.samples) for i in plan.prefills] == [(4, 5, True)]
    stats = counters(scheduler)
    assert (stats.num_preemptions, stats.num_recomputed_tokens) == (1, 4)
    while not last.finished:
        run_step(scheduler)
    assert len(last.output_token_ids) == 6
    assert last.num_cached_tokens == 0
    assert last.first_scheduled_time == first_scheduled


def test_a_preempted_request_can_end_while_it_waits():
    scheduler, (_, last), pending = two_in_a_pool_for_one_and_a_half()
    last.stop_token_ids = frozenset([77])
    step(scheduler)
    assert last.status is RequestStatus.WAITING
    deliver(scheduler, pending, token=77)
    assert last.finish_reason == "stop"
    assert (scheduler.num_waiting, scheduler.num_waiting_tokens) == (0, 0)


def test_a_preempted_request_waits_for_its_own_tokens():
    scheduler, (first, last), pending = two_in_a_pool_for_one_and_a_half()
    step(scheduler)
    scheduler.finish(first, "abort")
    assert scheduler.schedule() is None
    deliver(scheduler, pending)
    assert step(scheduler).admitted == [last]


def test_under_priority_the_lowest_gives_way_though_it_came_first():
    scheduler, (low, high), _ = two_in_a_pool_for_one_and_a_half("priority", (5, -5))
    plan = step(scheduler)
    assert [i.request for i in plan.scheduled] == [high]
    assert low.status is RequestStatus.WAITING


def test_priority_then_arrival_decide_who_is_admitted():
    scheduler = make_scheduler(max_num_seqs=1, policy="priority")
    keys = [(1, 0.0), (0, 2.0), (0, 1.0), (-1, 3.0), (0, 1.0)]
    requests = [make_request(str(i), [i], max_tokens=1, priority=p, arrival=t) for i, (p, t) in enumerate(keys)]
    for request in requests:
        scheduler.add(request)
    order: list[Request] = []
    while scheduler.has_unfinished:
        order += run_step(scheduler).admitted
    assert [requests.index(r) for r in order] == [3, 2, 4, 1, 0]


def test_a_request_that_fills_the_whole_cache_ends_and_disturbs_nobody():
    scheduler = make_scheduler(num_blocks=4)
    greedy, other = make_request("a", [1] * 7, max_tokens=100), make_request("b", [2], max_tokens=1)
    scheduler.add(greedy)
    previous = step(scheduler)
    while greedy.num_computed_tokens < 12:
        plan = step(scheduler)
        deliver(scheduler, previous)
        previous = plan
    scheduler.add(other)
    assert scheduler.schedule() is None
    assert greedy.num_preemptions == 0
    deliver(scheduler, previous)
    assert (greedy.finish_reason, greedy.stop_reason) == ("length", "kv_cache_full")
    assert greedy.num_known_tokens == 12 + 1  # the newest token needs no room
    assert scheduler.usage == 0
    assert run_step(scheduler).admitted == [other]


def test_forgetting_all_that_was_computed_loses_no_request():
    scheduler = make_scheduler()
    requests = [make_request(str(i), [4] * 9) for i in range(3)]
    for request in requests:
        scheduler.add(request)
    run_step(scheduler)
    scheduler.forget_computed()
    assert (scheduler.num_running, scheduler.num_waiting, scheduler.usage) == (0, 3, 0)
    plan = run_step(scheduler)
    assert plan.admitted == requests
    assert [i.start for i in plan.prefills] == [0, 0, 0]


# ---- Endings -------------------------------------------------------------------------------------------------


def append_all(tokens: list[int], max_tokens: int = 8, min_tokens: int = 0) -> Request:
    scheduler = make_scheduler()
    params = SamplingParams(max_tokens=max_tokens, min_tokens=min_tokens, stop_token_ids=[20])
    request = make_request("a", [1], params=params, max_tokens=max_tokens, stop_token_ids=frozenset([10, 20]))
    scheduler.add(request)
    for token in tokens:
        assert not request.finished
        run_step(scheduler, token)
    return request


@pytest.mark.parametrize(
    ("tokens", "options", "reasons"),
    [
        ([1, 2, 10], {}, ("stop", None)),
        ([1, 2, 20], {}, ("stop", 20)),
        ([1, 2, 3], {"max_tokens": 3}, ("length", None)),
        ([1, 2, 10], {"max_tokens": 3}, ("stop", None)),
        ([20, 10, 3, 20], {"min_tokens": 4}, ("stop", 20)),
        ([1, 2, 3], {}, (None, None)),
    ],
)
def test_token_level_stops(tokens: list[int], options: dict, reasons: tuple):
    request = append_all(tokens, **options)
    assert (request.finish_reason, request.stop_reason) == reasons
    assert request.finished == (reasons[0] is not None)
    assert request.output_token_ids == tokens


def test_a_token_after_the_end_is_thrown_away():
    scheduler = make_scheduler()
    request = make_request("a", [1] * 4, stop_token_ids=frozenset([10]))
    scheduler.add(request)
    first, second = step(scheduler), step(scheduler)
    assert scheduler.append_token(first.scheduled[0].request, 10, 0.0)
    assert (scheduler.usage, scheduler.num_running) == (0, 0)
    assert not scheduler.append_token(second.scheduled[0].request, 11, 0.0)
    assert (request.output_token_ids, request.num_inflight_tokens) == ([10], 0)


def test_finish_works_at_any_moment_and_only_once():
    scheduler = make_scheduler(max_num_batched_tokens=6)
    decoding, prefilling, waiting = (make_request(name, [i] * 5) for i, name in enumerate("abc"))
    for request in (decoding, prefilling, waiting):
        scheduler.add(request)
    step(scheduler)
    assert [r.status for r in (decoding, prefilling, waiting)] == [RequestStatus.RUNNING] * 2 + [RequestStatus.WAITING]
    for request in (waiting, prefilling, decoding):
        scheduler.finish(request, "stop", "END")
        scheduler.finish(request, "abort")
        assert (request.finish_reason, request.stop_reason) == ("stop", "END")
    assert not scheduler.has_unfinished
    assert (scheduler.usage, scheduler.num_waiting_tokens) == (0, 0)
    assert scheduler.schedule() is None
    scheduler.pool.check()


def test_blocks_of_a_failed_request_are_not_offered_to_others():
    scheduler = make_scheduler()
    for reason, found in [("abort", 8), ("error", 0)]:
        scheduler.add(ended := make_request(reason, [found] * 9))
        run_step(scheduler)
        scheduler.finish(ended, reason)
        scheduler.add(follower := make_request("next", [found] * 9))
        run_step(scheduler)
        assert follower.num_cached_tokens == found


def test_times_are_those_of_the_first_schedule_and_of_first_and_last_token():
    now = [3.0]
    scheduler = make_scheduler(clock=lambda: now[0])
    scheduler.add(request := make_request("a", [1]))
    plan = step(scheduler)
    now[0] = 9.0
    deliver(scheduler, plan, now=4.0)
    deliver(scheduler, step(scheduler), now=5.0)
    times = (request.first_scheduled_time, request.first_token_time, request.last_token_time)
    assert times == (3.0, 4.0, 5.0)


# ---- Refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "param", "words"),
    [
        (make_request("a", []), "prompt", "empty"),
        (make_request("a", [1] * 5, max_tokens=0, params=SamplingParams()), "prompt", "leaves none to generate"),
        (make_request("a", [1] * 12), "prompt", "KV cache holds 12"),
        (make_request("a", [1], n=5), "n", "more than the queue ever takes"),
        (make_request("a", [1] * 11, n=3), "n", "30 tokens"),
    ],
)
def test_what_could_never_run_is_refused(request_: Request, param: str, words: str):
    scheduler = make_scheduler(num_blocks=4, max_num_queued_requests=4, max_num_queued_tokens=30)
    with pytest.raises(InvalidRequestError, match=words) as error:
        scheduler.add(request_)
    assert error.value.param == param
    assert not scheduler.has_unfinished


def test_the_longest_prompt_that_fits_runs_to_its_end():
    scheduler = make_scheduler(num_blocks=4)
    scheduler.add(request := make_request("a", [1] * 11, max_tokens=2))
    while not request.finished:
        run_step(scheduler)
    assert (len(request.output_token_ids), request.stop_reason) == (2, None)


@pytest.mark.parametrize("limits", [{"max_num_queued_requests": 3}, {"max_num_queued_tokens": 15}])
def test_a_full_queue_refuses_and_says_when_to_come_back(limits: dict):
    now = [0.0]
    scheduler = make_scheduler(max_num_seqs=1, clock=lambda: now[0], **limits)
    scheduler.add(first := make_request("a", [1] * 5, max_tokens=50))
    run_step(scheduler)  # no longer in the queue
    scheduler.add(waiting := make_request("b", [1] * 5, n=2))
    scheduler.add(make_request("c", [1] * 5))
    with pytest.raises(QueueFullError, match="3 requests with 15 prompt tokens are waiting") as error:
        scheduler.add(make_request("d", [1] * 5))
    assert error.value.retry_after == 1.0  # nothing is known yet
    assert (scheduler.num_waiting, scheduler.num_waiting_tokens) == (3, 15)
    scheduler.finish(first, "abort")
    run_step(scheduler)
    scheduler.add(make_request("e", [1] * 5))
    now[0] = 20.0
    with pytest.raises(QueueFullError) as error:
        scheduler.add(make_request("f", [1] * 5))
    assert error.value.retry_after == pytest.approx(20.0)  # one request left in 20 s, and one is too many
    scheduler.finish(waiting.siblings[0], "abort")
    scheduler.add(make_request("g", [1] * 5))


def test_preempted_requests_are_never_refused():
    scheduler = make_scheduler(max_num_queued_requests=1)
    for i in range(3):
        scheduler.add(make_request(str(i), [i]))
        run_step(scheduler)
    scheduler.forget_computed()
    assert scheduler.num_waiting == 3
    with pytest.raises(QueueFullError):
        scheduler.add(make_request("late", [1]))
    assert len(run_step(scheduler).admitted) == 3


@pytest.mark.parametrize("rank", [by_arrival, by_priority])
def test_a_queue_forgets_the_cancelled(rank):
    queue = RequestQueue(rank)
    requests = [make_request(str(i), [i]) for i in range(1000)]
    for i, request in enumerate(requests):
        request.queue_number = i
        queue.push(request)
    for i, request in enumerate(requests):
        if i % 100:
            assert queue.discard(request)
            assert not queue.discard(request)
    assert len(queue) == 10
    assert len(queue._heap) < 50
    assert [queue.pop() for _ in range(10)] == requests[::100]
    assert queue.peek() is None
    with pytest.raises(IndexError):
        queue.pop()
