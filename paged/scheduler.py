"""Who runs in the next step, on which blocks. Plain Python: the whole policy can be simulated without a device."""

import time
from collections import deque
from collections.abc import Callable
from typing import Literal

from paged.block_pool import BlockPool, chain_hashes, root_hash
from paged.errors import InvalidRequestError, QueueFullError
from paged.outputs import FinishReason
from paged.plan import ScheduledRequest, StepPlan
from paged.request import Request, RequestStatus
from paged.request_queue import RequestQueue, by_arrival, by_priority
from paged.stats import StepStats

KV_CACHE_FULL = "kv_cache_full"  # stop_reason of a request that ended with "length" because it fills the whole cache


class Scheduler:
    """Continuous batching over one block pool.

    The caller's loop is: plan = schedule(); run the plan; append_token() for every request that sampled in the
    plan BEFORE this one. The values of a step's tokens may arrive one (or more) schedule() calls late, but every plan
    returned must be run as it is, in order, because the blocks it fills are offered to other requests from the next
    schedule() on. Where that fails, finish its requests with "error".

    A running request is either prefilling (some of its known tokens are not computed) or decoding (one token a
    step, its input being the last token sampled on the device). It has its whole table for the known tokens from
    admission on, and grows it by a block at a time. If there is none, the request that is last in the running order
    is preempted: it gives up everything but its tokens and goes back to its place in the queue, to be computed again.
    So the first in the running order always advances, and everyone's turn comes.

    With policy "fcfs" the queue is in order of arrival (siblings right after their leader) and the running order is
    that of admission; with "priority" both are in order of (priority, arrival_time).
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_num_queued_requests: int,
        max_num_queued_tokens: int,
        policy: Literal["fcfs", "priority"] = "fcfs",
        enable_prefix_caching: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.block_size = block_size
        self.capacity = (num_blocks - 1) * block_size  # tokens that the whole cache holds
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_num_queued_requests = max_num_queued_requests
        self.max_num_queued_tokens = max_num_queued_tokens
        self.pool = BlockPool(num_blocks)
        self._enable_prefix_caching = enable_prefix_caching
        self._clock = clock
        self._by_priority = policy == "priority"
        self._waiting = RequestQueue(by_priority if self._by_priority else by_arrival)
        self._held_siblings: set[Request] = set()  # of leaders whose prompt is not computed yet
        self._spoiled: list[int] = []  # see take_spoiled
        self._num_waiting_tokens = 0
        self._running: dict[Request, None] = {}  # in order of admission
        self._prefilling: set[Request] = set()  # of the running ones
        self._free_slots = list(reversed(range(max_num_seqs)))
        self._num_added = 0
        self._finish_times: deque[float] = deque(maxlen=64)
        self._counters = StepStats()

    @property
    def running(self) -> tuple[Request, ...]:
        """Those that hold a slot and blocks, in order of admission: to look at, not to change."""
        return tuple(self._running)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting) + len(self._held_siblings)

    @property
    def num_waiting_tokens(self) -> int:
        """Prompt tokens of the waiting requests."""
        return self._num_waiting_tokens

    @property
    def usage(self) -> float:
        """Fraction of the cache's blocks that running requests hold."""
        return self.pool.usage

    @property
    def has_unfinished(self) -> bool:
        return bool(self._running or self._held_siblings or len(self._waiting))

    def take_counters(self, stats: StepStats) -> None:
        """Adds what was counted since the last call: preemptions, recomputed tokens, prefix cache queries and hits."""
        counters, self._counters = self._counters, StepStats()
        stats.num_preemptions += counters.num_preemptions
        stats.num_recomputed_tokens += counters.num_recomputed_tokens
        stats.prefix_cache_queries += counters.prefix_cache_queries
        stats.prefix_cache_hits += counters.prefix_cache_hits

    # Arrival.

    def add(self, request: Request) -> None:
        """Queues a request. Its siblings, whose prompt, priority and arrival become its own, follow once its prompt is
        computed.

        Raises:
          InvalidRequestError: it could never run.
          QueueFullError: as many requests or prompt tokens wait as may.
        """
        group = [request, *request.siblings]
        self._refuse_impossible(request, len(group))
        self._refuse_when_full(request, len(group))
        root = self._group_root(request)
        for member in group:
            member.prompt_token_ids = request.prompt_token_ids
            member.priority, member.arrival_time = request.priority, request.arrival_time
            member.hash_root = root
            member.queue_number = self._num_added
            self._num_added += 1
        self._held_siblings.update(request.siblings)
        self._num_waiting_tokens += request.num_prompt_tokens * len(group)
        self._waiting.push(request)

    def _refuse_impossible(self, request: Request, size: int) -> None:
        length = request.num_prompt_tokens
        if length == 0:
            raise InvalidRequestError("the prompt is empty: it needs at least one token", param="prompt")
        if length >= request.max_total_tokens:
            limit = request.max_total_tokens
            message = f"the prompt has {length} tokens, which leaves none to generate within {limit}; shorten it"
            raise InvalidRequestError(message, param="prompt")
        if length >= self.capacity:
            message = f"the prompt has {length} tokens, but the KV cache holds {self.capacity} and one must be left"
            raise InvalidRequestError(f"{message}; shorten it or serve with a larger cache", param="prompt")
        if size > self.max_num_queued_requests or size * length > self.max_num_queued_tokens:
            message = f"n={size} completions of {length} prompt tokens are more than the queue ever takes"
            limits = f"{self.max_num_queued_requests} requests, {self.max_num_queued_tokens} tokens"
            raise InvalidRequestError(f"{message} ({limits}); ask for fewer at once", param="n")

    def _refuse_when_full(self, request: Request, size: int) -> None:
        requests = self.num_waiting + size - self.max_num_queued_requests
        tokens = self._num_waiting_tokens + size * request.num_prompt_tokens - self.max_num_queued_tokens
        if requests > 0:
            self._raise_queue_full(requests)
        if tokens > 0:
            self._raise_queue_full(tokens * self.num_waiting / self._num_waiting_tokens)

    def _raise_queue_full(self, num_excess_requests: float) -> None:
        """The queue shrinks as fast as running requests finish: that rate, lately, gives retry_after in [1, 60] s."""
        retry_after = 1.0
        if self._finish_times:
            seconds_each = (self._clock() - self._finish_times[0]) / len(self._finish_times)
            retry_after = min(max(num_excess_requests * seconds_each, 1.0), 60.0)
        waiting = f"{self.num_waiting} requests with {self._num_waiting_tokens} prompt tokens are waiting"
        limits = f"at most {self.max_num_queued_requests} and {self.max_num_queued_tokens} may"
        raise QueueFullError(f"the queue is full: {waiting}, {limits}; retry in {retry_after:.0f} s", retry_after)

    def _group_root(self, request: Request) -> bytes:
        """Blocks are shared between all requests of equal salt or, without prefix caching, within one group alone."""
        if self._enable_prefix_caching:
            return root_hash(f"salt {request.cache_salt or ''}")
        return root_hash(f"group {self._num_added}")

    # The step.

    def schedule(self) -> StepPlan | None:
        """The next step: one token for every decoding request, then chunks of prompts, first of running requests and
        then, if nobody was preempted, of newly admitted ones, within the token budget and the slots.

        Returns None if nothing can run before more tokens are read or requests added.
        """
        order = list(self._running)
        if self._by_priority:
            order.sort(key=by_priority)
        num_running = len(order)
        decodes = self._schedule_decodes(order)
        num_preempted = num_running - len(order)
        budget = self.max_num_batched_tokens - len(decodes)
        prefills = self._continue_prefills(order, budget) if self._prefilling else []
        budget -= sum(chunk.num_tokens for chunk in prefills)
        new_prefills = [] if num_preempted else self._admit(budget)
        prefills += new_prefills
        for chunk in prefills:
            self._register_full_blocks(chunk.request)
            if chunk.samples and chunk.request.siblings:
                self._release_siblings(chunk.request)
        if not decodes and not prefills:
            return None
        return StepPlan([chunk.request for chunk in new_prefills], decodes, prefills, num_preempted)

    def _schedule_decodes(self, order: list[Request]) -> list[ScheduledRequest]:
        """Preempts from the end of `order`, which thus shrinks to those that still run.

        Never more than the token budget: whoever decodes here was among the last step's tokens.
        """
        decodes: list[ScheduledRequest] = []
        prefilling, block_size, capacity = self._prefilling, self.block_size, self.capacity
        for request in order:
            start = request.num_computed_tokens
            if request in prefilling or start + 1 >= request.max_total_tokens or start >= capacity:
                continue  # the latter two only wait for their last token to be read
            new_block = 0
            if start == len(request.block_table) * block_size:
                if not self._make_room(request, order):
                    break
                new_block = self.pool.allocate()
                request.block_table.append(new_block)
            decodes.append(ScheduledRequest(request, start, 1, new_block, True))
            request.num_computed_tokens = start + 1
            request.num_inflight_tokens += 1
        return decodes

    def _make_room(self, request: Request, order: list[Request]) -> bool:
        """Preempts the last ones until a block is free; False if `request` was itself the last."""
        while not self.pool.num_free:
            victim = order.pop()
            self._preempt(victim)
            if victim is request:
                return False
        return True

    def _preempt(self, request: Request) -> None:
        self._vacate(request)
        request.status = RequestStatus.WAITING
        request.num_lost_tokens = max(request.num_lost_tokens, request.num_computed_tokens)
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        self._counters.num_preemptions += 1
        self._num_waiting_tokens += request.num_prompt_tokens
        self._waiting.push(request)

    def _continue_prefills(self, order: list[Request], budget: int) -> list[ScheduledRequest]:
        chunks = []
        for request in order:
            if budget and request in self._prefilling:
                chunks.append(self._schedule_chunk(request, budget))
                budget -= chunks[-1].num_tokens
        return chunks

    def _admit(self, budget: int) -> list[ScheduledRequest]:
        """In the queue's order, until one does not fit: nobody overtakes. A preempted request must know its tokens."""
        chunks: list[ScheduledRequest] = []
        while budget and self._free_slots and (request := self._waiting.peek()):
            if request.num_inflight_tokens or not self._allocate_table(request):
                break
            self._waiting.pop()
            self._num_waiting_tokens -= request.num_prompt_tokens
            self._running[request] = None
            self._prefilling.add(request)
            request.slot = self._free_slots.pop()
            request.status = RequestStatus.RUNNING
            if request.first_scheduled_time is None:
                request.first_scheduled_time = self._clock()
            chunks.append(self._schedule_chunk(request, budget))
            budget -= chunks[-1].num_tokens
        return chunks

    def _allocate_table(self, request: Request) -> bool:
        """Blocks for all known tokens, the longest cached prefix first; at least one token is left to compute."""
        known = request.num_known_tokens
        most = known - 1
        if request.sampling_params.prompt_logprobs is not None:  # come from computing: they need what is not done yet
            most = min(most, request.num_lost_tokens)
        hits = self.pool.lookup(self._hashes(request, most // self.block_size))
        table = self.pool.take(hits, -(-known // self.block_size) - len(hits))
        if table is None:
            return False
        num_cached = len(hits) * self.block_size
        if request.num_preemptions == 0:
            request.num_cached_tokens = num_cached
            self._counters.prefix_cache_queries += known
            self._counters.prefix_cache_hits += num_cached
        request.block_table = table
        request.num_registered_blocks = len(hits)
        request.num_computed_tokens = num_cached
        return True

    def _schedule_chunk(self, request: Request, budget: int) -> ScheduledRequest:
        start, known = request.num_computed_tokens, request.num_known_tokens
        end = min(known, start + budget)
        request.num_computed_tokens = end
        self._counters.num_recomputed_tokens += max(0, min(end, request.num_lost_tokens) - start)
        if end == known:
            request.num_inflight_tokens += 1
            self._prefilling.remove(request)
        return ScheduledRequest(request, start, end - start, 0, end == known)

    def _release_siblings(self, leader: Request) -> None:
        """They stand in the queue as if they had come with it, and will find their prompt's blocks in the index."""
        for sibling in leader.siblings:
            if sibling in self._held_siblings:
                self._held_siblings.remove(sibling)
                sibling.block_hashes = leader.block_hashes.copy()
                self._waiting.push(sibling)

    # The prefix index.

    def _hashes(self, request: Request, count: int) -> list[bytes]:
        """Of the request's first `count` blocks. A block is hashed once, however often it is looked up."""
        hashes = request.block_hashes
        done = len(hashes)
        if done < count:
            tokens = request.token_slice(done * self.block_size, count * self.block_size)
            hashes += chain_hashes(hashes[-1] if hashes else request.hash_root, tokens, self.block_size)
        return hashes[:count]

    def _register_full_blocks(self, request: Request) -> None:
        """Offers every block that is full of computed tokens of known value."""
        done = request.num_registered_blocks
        full = min(request.num_computed_tokens, request.num_known_tokens) // self.block_size
        if full > done:
            hashes = self._hashes(request, full)
            for block, block_hash in zip(request.block_table[done:full], hashes[done:], strict=True):
                self.pool.register(block, block_hash)
            request.num_registered_blocks = full

    def forget_computed(self) -> None:
        """Forgets all that is in the cache, as when it was lost or the weights are new: running requests are preempted,
        to be computed again. Tokens in flight must still be delivered, or their requests finished.
        """
        for request in list(self._running):
            self._preempt(request)
        self.pool.reset_prefix_cache()

    # Results and endings.

    def append_token(self, request: Request, token_id: int, now: float) -> bool:
        """Delivers the value of the request's oldest in-flight token, and ends the request if that token says so.

        Ends are: a stop token (stop_reason: the id if the caller asked for it, None if it is the model's own) and
        "length" (stop_reason None, or KV_CACHE_FULL where the request alone fills the cache).
        Returns False, and does nothing, if the request had ended already: the token is thrown away.
        """
        if request.status is RequestStatus.FINISHED:
            return False
        output = request.output_token_ids
        output.append(token_id)
        request.num_inflight_tokens -= 1
        request.last_token_time = now
        if request.first_token_time is None:
            request.first_token_time = now
        if request.num_computed_tokens >= (request.num_registered_blocks + 1) * self.block_size:
            self._register_full_blocks(request)

        known = len(request.prompt_token_ids) + len(output)
        if token_id in request.stop_token_ids and len(output) >= request.sampling_params.min_tokens:
            by_caller = token_id in (request.sampling_params.stop_token_ids or ())
            self.finish(request, "stop", token_id if by_caller else None)
        elif known >= request.max_total_tokens:
            self.finish(request, "length")
        elif known > self.capacity:
            self.finish(request, "length", KV_CACHE_FULL)
        return True

    def finish(self, request: Request, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        """Ends a request at any moment; does nothing if it has ended. Its slot and blocks are free at once: a step that
        was dispatched with them still runs before any that is given them next.

        A leader takes along its siblings that are not in the queue yet. After "error" the request's blocks are not
        offered to others, since nobody knows what they hold.
        """
        if request.status is RequestStatus.FINISHED:
            return
        if request.status is RequestStatus.RUNNING:
            table = request.block_table
            if reason == "error":
                self.pool.forget(table)
            self._vacate(request)
            if reason == "error":
                self._spoiled += [block for block in table if self.pool.is_free(block)]
        elif self._waiting.discard(request) or request in self._held_siblings:
            self._held_siblings.discard(request)
            self._num_waiting_tokens -= request.num_prompt_tokens
        request.status = RequestStatus.FINISHED
        request.num_inflight_tokens = 0
        request.finish_reason, request.stop_reason = reason, stop_reason
        self._finish_times.append(self._clock())
        for sibling in request.siblings:
            if sibling in self._held_siblings:
                self.finish(sibling, reason, stop_reason)

    def take_spoiled(self) -> list[int]:
        """The blocks that requests have left with an error, each once, for somebody to clear before any step that is
        planned from now on: what is behind a sequence's end counts for nothing, but 0 times NaN is NaN."""
        spoiled, self._spoiled = self._spoiled, []
        return spoiled

    def _vacate(self, request: Request) -> None:
        del self._running[request]
        self._prefilling.discard(request)
        self._free_slots.append(request.slot)
        request.slot = -1
        self.pool.free(request.block_table)
        request.block_table = []
        request.num_registered_blocks = 0
