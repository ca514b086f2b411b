"""The engine: joins the scheduler, which decides, and the runner, which computes, one step ahead of its own reading."""

import logging
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from paged.compiler import CompileCounter
from paged.config import EngineConfig
from paged.errors import InvalidRequestError
from paged.output_processor import OutputProcessor, metrics_of, to_host
from paged.outputs import CompletionDelta
from paged.plan import StepPlan
from paged.request import Request
from paged.runner import PackedStep, StepHandle
from paged.sampling_params import SamplingParams
from paged.startup import build
from paged.stats import FinishedRequestStats, StatsListener, StepStats

logger = logging.getLogger(__name__)
RECOMMENDED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(slots=True)
class Group:
    """What was asked as one request: n completions of one prompt."""

    completions: list[Request]
    unfinished: int


class Engine:
    """Requests in, deltas out, a step at a time. Not thread-safe: one thread owns it.

    A step is scheduled and dispatched before the previous one's tokens are read, so the device always has work
    queued; a request that stops on a token's value has by then one more token under way, which is thrown away.
    """

    def __init__(self, config: EngineConfig, listeners: Sequence[StatsListener] = ()):
        parts = build(config)
        self.config, self.listeners = config, list(listeners)
        self.checkpoint, self.runner, self.scheduler = parts.checkpoint, parts.runner, parts.scheduler
        self.max_model_len, self.ledger, self.seeds = (
            parts.max_model_len,
            parts.ledger,
            random.Random(config.model.seed),
        )
        self.tokenizer = parts.checkpoint.tokenizer
        eos = (*parts.checkpoint.config.eos_token_ids, getattr(self.tokenizer, "eos_token_id", None))
        self.eos_token_ids = frozenset(token for token in eos if token is not None)
        self.compiles = CompileCounter()
        self._groups: dict[str, Group] = {}
        self._processors: dict[str, OutputProcessor] = {}  # by internal request id
        self._inflight: list[StepHandle] = []
        self._stats = StepStats()

    # ---- requests -------------------------------------------------------------------------------------------

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
        arrival_time: float | None = None,
    ) -> None:
        """Queues a request.

        Raises:
          InvalidRequestError: the prompt is empty, too long, or holds ids outside the vocabulary; a parameter does
            not fit the model; the id is in use.
          QueueFullError: the queue is at its limit.
        """
        params = self.validate(request_id, prompt_token_ids, params)
        requests = self._make_requests(
            request_id, prompt_token_ids, params, priority, cache_salt, arrival_time or time.monotonic()
        )
        self.scheduler.add(requests[0])
        self._groups[request_id] = Group(requests, len(requests))
        for request in requests:
            self._processors[request.request_id] = OutputProcessor(request, request_id, self.tokenizer)

    def validate(self, request_id: str, prompt_token_ids: list[int], params: SamplingParams) -> SamplingParams:
        """Checks a request against the model; returns its parameters with -1 resolved."""
        if request_id in self._groups:
            raise InvalidRequestError(f"request id {request_id!r} is in use: choose another", param="request_id")
        check_prompt(prompt_token_ids, self.vocab_size, self.max_model_len)
        if self.tokenizer is None and params.stop_strings:
            raise InvalidRequestError("stop strings need a tokenizer: use stop_token_ids", param="stop")
        most = self.config.scheduler.max_logprobs
        params.validate_for(self.vocab_size, most, self.max_model_len, self._stop_token_ids(params))
        if params.logprobs == -1:
            params = replace(params, logprobs=most)
        return replace(params, prompt_logprobs=most) if params.prompt_logprobs == -1 else params

    @property
    def default_sampling_params(self) -> dict[str, Any]:
        """What the model's generation_config.json recommends, as keywords of SamplingParams."""
        given = self.checkpoint.generation_config
        defaults = {name: given[name] for name in RECOMMENDED if given.get(name) is not None}
        if given.get("max_new_tokens"):
            defaults["max_tokens"] = given["max_new_tokens"]
        return defaults

    @property
    def vocab_size(self) -> int:
        return self.checkpoint.config.vocab_size

    def _make_requests(self, request_id, prompt_token_ids, params, priority, cache_salt, arrival_time) -> list[Request]:
        """A leader and its siblings. Only the leader computes, and reports on, the whole prompt."""
        total = len(prompt_token_ids) + (params.max_tokens or self.max_model_len)
        seed = self.seeds.getrandbits(63) if params.seed is None else params.seed
        requests = [
            Request(
                request_id=request_id if index == 0 else f"{request_id}#{index}",
                prompt_token_ids=prompt_token_ids,
                sampling_params=params if index == 0 else replace(params, prompt_logprobs=None),
                arrival_time=arrival_time,
                max_total_tokens=min(total, self.max_model_len),
                seed=seed if index == 0 else random.Random(f"{seed}/{index}").getrandbits(63),
                stop_token_ids=self._stop_token_ids(params),
                priority=priority,
                cache_salt=cache_salt,
                index=index,
            )
            for index in range(params.n)
        ]
        requests[0].siblings.extend(requests[1:])
        return requests

    def _stop_token_ids(self, params: SamplingParams) -> frozenset[int]:
        eos = frozenset() if params.ignore_eos else self.eos_token_ids
        return eos.union(params.stop_token_ids or ())

    def abort(self, request_id: str) -> None:
        """Ends a request without another delta; unknown and finished ids are fine. Its blocks are free at once."""
        if group := self._groups.get(request_id):
            for request in group.completions:
                self.scheduler.finish(request, "abort")
                self._forget(request)

    def has_unfinished_requests(self) -> bool:
        return bool(self._groups) or bool(self._inflight)

    def close(self) -> None:
        self.compiles.close()

    # ---- steps ----------------------------------------------------------------------------------------------

    def step(self) -> list[CompletionDelta]:
        """Dispatches the next step, or a few if they are short, then reads what was dispatched before: returns what
        that added."""
        begin = time.monotonic()
        previous, self._inflight = self._inflight, []
        steps, failure = self._plan(), None
        if steps:
            try:
                self._inflight = self.runner.execute(steps)
            except Exception as error:
                failure = error
        deltas: list[CompletionDelta] = []
        for handle in previous:
            try:
                deltas += self._read(handle)
            except Exception as error:
                failure = failure or error
                deltas += self._fail_all(handle.plans, error)
        plans = [step.plan for step in steps]
        if failure is not None:
            deltas += self._recover(plans, failure)
        self._report(plans, begin)
        return deltas

    def _plan(self) -> list[PackedStep]:
        """The next step; while nobody waits, as many decode steps as one call runs."""
        plan = self.scheduler.schedule()
        if plan is None:
            return []
        steps = [first := self.runner.pack(plan)]
        while len(steps) < self.runner.chain_length(first) and not self.scheduler.num_waiting:
            plan = self.scheduler.schedule()
            if plan is None:
                break
            steps.append(self.runner.pack(plan, first.shape))
        return steps

    def _read(self, step: StepHandle) -> list[CompletionDelta]:
        """Waits for a call's tokens and hands them to their requests."""
        outputs = to_host(step.sampled)
        for request, positions, scores in step.prompt_scores:
            if processor := self._processors.get(request.request_id):
                processor.add_prompt_logprobs(positions, to_host(scores))
        now = time.monotonic()
        deltas: list[CompletionDelta] = []
        for index, plan in enumerate(step.plans):
            sampled = step.sampled_of(index, outputs)
            for row, scheduled in enumerate(plan.scheduled):
                if scheduled.samples and not scheduled.request.finished:
                    deltas += self._append(scheduled.request, sampled, row, now)
        return deltas

    def _append(self, request: Request, sampled: Any, row: int, now: float) -> list[CompletionDelta]:
        previous_time, token_id = request.last_token_time, int(sampled.tokens[row])
        if token_id < 0:
            return self._fail(request, "the model's logits are not numbers (NaN)")
        self.scheduler.append_token(request, token_id, now)
        self._stats.num_generation_tokens += 1
        if previous_time is None:
            self._stats.time_to_first_token.append(now - request.arrival_time)
        else:
            self._stats.inter_token_latency.append(now - previous_time)
        processor, wanted = self._processors[request.request_id], request.sampling_params.logprobs
        try:
            logprobs = None if wanted is None else processor.logprobs_of(token_id, sampled, row, wanted)
            delta, stop_string = processor.append(token_id, logprobs)
        except Exception as error:
            logger.exception("request %s failed while its output was made", request.request_id)
            return self._fail(request, f"its output could not be made: {type(error).__name__}: {error}")
        if stop_string is not None:
            self.scheduler.finish(request, "stop", stop_string)
        if request.finished:
            self._forget(request)
        return [delta]

    # ---- failures -------------------------------------------------------------------------------------------

    def _recover(self, dispatched: list[StepPlan], error: Exception) -> list[CompletionDelta]:
        """A step that raised takes the donated caches with it, and the one dispatched behind it too: their requests
        end, everyone else is computed again."""
        logger.error("a step failed: its requests end with an error, the engine goes on", exc_info=error)
        deltas = self._fail_all(dispatched, error)
        self._inflight = []
        self.scheduler.forget_computed()
        self.runner.reset_state()
        return deltas

    def _fail_all(self, plans: list[StepPlan], error: Exception) -> list[CompletionDelta]:
        message = f"the engine failed in a step: {type(error).__name__}: {error}"
        requests = [s.request for plan in plans for s in plan.scheduled]
        return [delta for r in requests if r.request_id in self._processors for delta in self._fail(r, message)]

    def _fail(self, request: Request, message: str) -> list[CompletionDelta]:
        """Ends a request, and with a leader the siblings that wait for its prompt."""
        self.scheduler.finish(request, "error")
        ended = [r for r in (request, *request.siblings) if r.finished and r.request_id in self._processors]
        deltas = [self._processors[r.request_id].end(error=message) for r in ended]
        for r in ended:
            self._forget(r)
        return deltas

    # ---- accounting -----------------------------------------------------------------------------------------

    def _forget(self, request: Request) -> None:
        processor = self._processors.pop(request.request_id, None)
        if processor is None:
            return
        group = self._groups[processor.public_id]
        group.unfinished -= 1
        if group.unfinished == 0:
            del self._groups[processor.public_id]
        stats = FinishedRequestStats(
            finish_reason=request.finish_reason or "abort",
            num_prompt_tokens=request.num_prompt_tokens,
            num_cached_tokens=request.num_cached_tokens,
            num_generation_tokens=len(request.output_token_ids),
            n=request.sampling_params.n,
            max_tokens=request.sampling_params.max_tokens,
            finish_time=time.monotonic(),
            metrics=metrics_of(request),
            index=request.index,
        )
        for listener in self.listeners:
            listener.on_finished(stats)

    def _report(self, plans: list[StepPlan], begin: float) -> None:
        if not self.listeners:
            self._stats = StepStats()
            return
        stats, self._stats = self._stats, StepStats()
        scheduler = self.scheduler
        stats.num_running, stats.num_waiting = scheduler.num_running, scheduler.num_waiting
        stats.kv_cache_usage = scheduler.usage
        stats.num_prompt_tokens = sum(s.num_tokens for plan in plans for s in plan.prefills)
        stats.num_compiles, self.compiles.count = self.compiles.count, 0
        scheduler.take_counters(stats)
        stats.step_seconds = time.monotonic() - begin
        for listener in self.listeners:
            listener.on_step(stats)


def check_prompt(prompt_token_ids: list[int], vocab_size: int, max_model_len: int) -> None:
    if not prompt_token_ids:
        raise InvalidRequestError("the prompt is empty: give at least one token", param="prompt")
    if len(prompt_token_ids) >= max_model_len:
        raise InvalidRequestError(
            f"the prompt has {len(prompt_token_ids):,} tokens, and the context of {max_model_len:,} needs room for "
            "at least one more: shorten it",
            param="prompt",
        )
    if not 0 <= min(prompt_token_ids) <= max(prompt_token_ids) < vocab_size:
        raise InvalidRequestError(f"prompt token ids must be in [0, {vocab_size:,})", param="prompt")
